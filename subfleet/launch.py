"""From an experiment to a finished run: builds the parts and hands them to the platform."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from subfleet import registry
from subfleet.config import Experiment, TrainTable
from subfleet.config import Tier as TierTable
from subfleet.core.algorithm import Setting, TierSize
from subfleet.core.budget import Tier, width_map
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Params, Stream
from subfleet.core.supernet import SuperNetwork
from subfleet.dashboards.console import ConsoleProgress, LoggedWarnings, Preparation
from subfleet.dashboards.tensorboard import TensorBoardWriter
from subfleet.datasets.federation import identity
from subfleet.platform.engine import Work
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.fleet import Fleet
from subfleet.platform.job import Job, RunOptions
from subfleet.platform.metrics import ClientsLog, Observer, read_metrics
from subfleet.platform.record import EngineRecord
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Run:
    """A finished run and its folder."""

    path: Path
    summary: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one a round."""
        return list(read_metrics(self.path / "metrics.jsonl"))

    def clients(self) -> pa.Table:
        """All rows of `clients/`: one per client and round."""
        return ClientsLog(self.path / "clients").read()

    def params(self) -> Params:
        """The super-network after the last round."""
        return RunFolder(self.path, "").read_final()

    @cached_property
    def tiers(self) -> list[dict[str, Any]]:
        """A row for each tier: name, clients, params, mflops, accuracy."""
        rows = json.loads((self.path / "tiers.json").read_text())
        accuracy = self.summary.get("acc_tier", {})
        return [row | {"accuracy": accuracy.get(row["tier"])} for row in rows]


def assemble(
    experiment: Experiment,
    record: EngineRecord | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Job:
    """Builds data set, super-network, fleet and algorithm of an experiment.

    `progress(what, done, total)` hears of long preparations of data. Raises
    `InputError` for whatever does not fit together.
    """
    registry.check_names(experiment)
    seed = experiment.run.seed
    federation = registry.build_data(experiment.data, seed=seed, progress=progress)
    net = registry.build_model(experiment.model, **registry.model_facts(federation))
    tiers = tuple(_sized(net, tier) for tier in experiment.fleet.tiers)
    setting = Setting(
        net=net,
        tiers=tiers,
        rule=_rule(experiment.train),
        stream=_stream(experiment.train),
        seed=seed,
        rounds=experiment.run.rounds,
    )
    algorithm = registry.build_algorithm(experiment.algorithm, setting)
    options = {name: getattr(experiment.run, name) for name in RunOptions.__dataclass_fields__}
    return Job(
        work=Work(net, algorithm, federation.scale, seed),
        federation=federation,
        fleet=Fleet(tiers, federation.num_clients, seed),
        options=RunOptions(**options),
        config=experiment.to_tables(),
        fingerprint=_fingerprint(experiment, identity(federation)),
        record=record or EngineRecord(),
    )


def _fingerprint(experiment: Experiment, data: dict[str, Any]) -> str:
    """A digest of all that the rounds of a run follow from: the experiment and its data."""
    text = json.dumps([experiment.fingerprint(stops=False), data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sized(net: SuperNetwork, table: TierTable) -> TierSize:
    tier = Tier(**table.model_dump())
    return TierSize(
        tier.name,
        tier.share,
        width_map(net, tier.largest_width(net)),
        flops=table.flops,
        params=table.params,
    )


def _rule(train: TrainTable) -> LocalRule:
    return LocalRule(
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
    )


def _stream(train: TrainTable) -> Stream:
    return Stream(batch=train.batch_size, epochs=train.epochs or 1, steps=train.steps)


def launch(
    experiment: Experiment,
    *,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    local: bool = False,
    address: str | None = None,
    engine_record: str | os.PathLike | None = None,
    progress: Console | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Runs an experiment to its end.

    Args:
        experiment: What to run.
        out: The run folder; a new one under `runs/` when left out. A run that fails
            before its first round is over leaves nothing there.
        resume: Continue from the newest checkpoint in `out`.
        local: Run in this process, without Ray.
        address: A Ray cluster to use; Ray is started in this process otherwise.
        engine_record: An `engine.json` whose choices to replay.
        progress: Where a live line of progress goes; without one only warnings are logged.
        observers: Further watchers, called in the process that runs the rounds.

    Raises:
        InputError: The experiment, its data or the folder cannot be used.
        RunFailed: The run could not be finished.
    """
    record = EngineRecord.load(str(engine_record)) if engine_record is not None else None
    job = assemble(experiment, record, Preparation(progress) if progress is not None else None)
    device = local_device(experiment.run.device) if local else experiment.run.device
    folder = _folder(experiment, job, out, resume)
    if progress is not None:
        line = ConsoleProgress(experiment.run.rounds, progress)
    else:
        line = LoggedWarnings()
    watching = [TensorBoardWriter(folder.tensorboard), *observers]
    try:
        _write_tiers(folder, job)
        if local:
            workers = max(1, experiment.run.hosts)
            summary = _run_here(job, folder, device, workers, [*watching, line])
        else:
            from subfleet.cluster.start import run_on_ray

            summary = run_on_ray(
                job,
                folder,
                watching,
                line,
                address=address,
                hosts=experiment.run.hosts,
                device=device,
            )
    except BaseException:
        # Nothing was trained: leave nothing that would be in the way of the next try.
        if not resume and not folder.begun:
            folder.discard()
        raise
    finally:
        line.close()
    return Run(folder.path, summary)


def _run_here(
    job: Job, folder: RunFolder, device: str, workers: int, observers: Sequence[Observer]
) -> dict[str, Any]:
    executor = InlineExecutor(job.work, job.federation, device, workers)
    try:
        return Rounds(job, executor, folder, observers).run()
    finally:
        executor.close()


def local_device(wanted: str) -> str:
    """Where to train, "cuda" or "cpu"; InputError when a GPU is asked for and there is none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError('run.device = "cuda": torch sees no GPU here; use "auto" or "cpu"')
    return wanted


def _folder(
    experiment: Experiment, job: Job, out: str | os.PathLike | None, resume: bool
) -> RunFolder:
    config, fingerprint = experiment.to_toml(), experiment.fingerprint(stops=False)
    data = identity(job.federation)
    if not resume:
        where = out if out is not None else _new_name(experiment)
        return RunFolder.create(where, config, fingerprint, data)
    if out is None:
        raise InputError("resume needs the run's folder; give out=")
    folder = RunFolder.open(out, fingerprint, config, data)
    changes = folder.environment_changes()
    if not changes:
        return folder
    words = f"resumed on another machine or other versions than it began on ({'; '.join(changes)})"
    return replace(folder, warnings=(f"{words}: the last bits may differ",))


def _new_name(experiment: Experiment) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = experiment.algorithm.name.replace(":", ".")
    base = Path("runs") / f"{stamp}-{name}-s{experiment.run.seed}"
    taken = 0
    while (path := base if not taken else Path(f"{base}-{taken}")).exists():
        taken += 1
    return path


def _write_tiers(folder: RunFolder, job: Job) -> None:
    views = job.work.algorithm.views({})
    rows = []
    for tier, clients in zip(job.fleet.tiers, job.fleet.counts, strict=True):
        map = views.get(tier.name, tier.map)
        rows.append(
            {
                "tier": tier.name,
                "clients": clients,
                "params": job.work.net.stored_params(map, "local"),
                "mflops": job.work.net.cost(map).macs / 1e6,
            }
        )
    folder.write_tiers(rows)
