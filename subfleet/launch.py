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

import numpy as np
import pyarrow as pa
import torch

from subfleet import registry
from subfleet.config import Experiment, TrainTable
from subfleet.config import Tier as TierTable
from subfleet.core.algorithm import Setting, TierSize
from subfleet.core.budget import Tier
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Params, Stream
from subfleet.core.schedule import Schedule
from subfleet.core.supernet import SuperNetwork
from subfleet.dashboards.console import ConsoleProgress, LoggedWarnings, Preparation, waiting
from subfleet.dashboards.tensorboard import TensorBoardWriter
from subfleet.datasets.federation import Federation, identity, split_of
from subfleet.datasets.pooled import Pooled
from subfleet.doubts import doubts
from subfleet.going_on import how_to_go_on
from subfleet.platform import checkpoint
from subfleet.platform.devices import Devices
from subfleet.platform.engine import Work
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.files import last_checkpoint
from subfleet.platform.fleet import Fleet
from subfleet.platform.job import Job, RunOptions
from subfleet.platform.metrics import ClientsLog, Observer, read_metrics
from subfleet.platform.record import EngineRecord
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.start import Start
from subfleet.platform.tracefiles import TraceFiles

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

    def traces(self) -> pa.Table:
        """What the clients' programs wrote about their work: `round`, `client`, their columns."""
        return TraceFiles(self.path / "traces").read()

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
        rule=_rule(experiment.train, experiment.run.rounds),
        stream=_stream(experiment.train),
        seed=seed,
        rounds=experiment.run.rounds,
    )
    algorithm = registry.build_algorithm(experiment.algorithm, setting)
    options = {name: getattr(experiment.run, name) for name in RunOptions.__dataclass_fields__}
    if algorithm.pools:
        options["cohort"] = 1
        if isinstance(federation, Federation):  # without its rows it is remembered as pooled
            federation = Pooled(federation, split_of(federation, seed, experiment.run.held_out)[0])
    fleet = Fleet(tiers, federation.num_clients, seed)
    devices = Devices.of(experiment.fleet.devices(), [t.name for t in tiers], fleet.tier_of, seed)
    facts = identity(federation)
    start = None
    if (former := experiment.run.start_from) is not None:
        start = Start.read(former, net, experiment.to_tables(), facts)
    return Job(
        work=Work(net, algorithm, federation.scale, seed),
        federation=federation,
        fleet=fleet,
        options=RunOptions(**options),
        config=experiment.to_tables(),
        fingerprint=_fingerprint(experiment, facts, start, devices),
        record=record or EngineRecord(),
        start=start,
        devices=devices,
    )


def _fingerprint(
    experiment: Experiment, data: dict[str, Any], start: Start | None, devices: Devices | None
) -> str:
    """A digest of all that the rounds of a run follow from: experiment, data, start, traces."""
    facts = [experiment.fingerprint(stops=False), data, *([start.facts] if start else [])]
    facts += [devices.facts] if devices and devices.facts else []
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sized(net: SuperNetwork, table: TierTable) -> TierSize:
    tier = Tier(**table.model_dump(exclude={"device"}))
    return TierSize(
        tier.name,
        tier.share,
        tier.largest_map(net),
        flops=table.flops,
        params=table.params,
        width=table.width,
    )


def _rule(train: TrainTable, rounds: int) -> LocalRule:
    options = {"milestones": train.milestones or (), "decay": train.decay or 1.0}
    return LocalRule(
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        schedule=Schedule(train.schedule, rounds, train.warmup, **options),
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
    restarts: int | None = None,
    progress: Console | None = None,
    alone: bool = True,
    observers: Sequence[Observer] = (),
) -> Run:
    """Runs an experiment to its end.

    An interrupt (Ctrl-C, a KeyboardInterrupt) saves the last finished round and goes on
    its way.

    Args:
        experiment: What to run.
        out: The run folder; a new one under `runs/` when left out. A run that fails
            before its first round is over leaves nothing there.
        resume: Continue from the newest checkpoint in `out`.
        local: Run in this process, without Ray.
        address: A Ray cluster to use; Ray is started in this process otherwise.
        engine_record: An `engine.json` whose choices to replay.
        restarts: How often to go on by itself from the newest checkpoint when the coordinator's
            process dies. With a number, 0 too, a run that `out` holds already is gone on with,
            so that the same call may be made again after the whole machine was lost.
        progress: Where a live line of progress goes; without one only warnings are logged.
        alone: Whether `progress` is for this run alone: then it also hears of the steps
            before the first round and, after an interrupt, of the command to go on with.
        observers: Further watchers, called in the process that runs the rounds.

    Raises:
        InputError: The experiment, its data or the folder cannot be used.
        RunFailed: The run could not be finished.
    """
    say = _teller(progress if alone else None)
    if restarts is not None:
        resume = resume or _holds_a_run(out, restarts, local)
    record = EngineRecord.load(str(engine_record)) if engine_record is not None else None
    try:
        say("reading the data ...")
        job = _assembled(experiment, record, progress)
        device = local_device(experiment.run.device) if local else experiment.run.device
        folder = _folder(experiment, job, out, resume)
    except (KeyboardInterrupt, SystemExit):
        say(f"stopped; {out} is as it was" if resume else "stopped; nothing saved yet")
        raise
    if progress is not None:
        line = ConsoleProgress(experiment.run.rounds, progress)
    else:
        line = LoggedWarnings()
    watching = [TensorBoardWriter(folder.tensorboard), *observers]
    try:
        _describe(folder, job)
        if local:
            workers = max(1, experiment.run.hosts)
            summary = _run_here(job, folder, device, workers, [*watching, line])
        else:
            from subfleet.cluster.start import ray_started, run_on_ray

            if not ray_started():
                say("starting Ray ..." if address is None else f"joining Ray at {address} ...")
            summary = run_on_ray(
                job,
                folder,
                watching,
                line,
                address=address,
                hosts=experiment.run.hosts,
                device=device,
                restarts=restarts or 0,
            )
    except BaseException as error:
        line.close()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            for words in how_to_go_on(folder, experiment.run.rounds, local, address):
                say(words)
        # Nothing was trained: leave nothing that would be in the way of the next try.
        if not resume and not folder.begun:
            folder.discard()
        raise
    finally:
        line.close()
    return Run(folder.path, summary)


def _assembled(
    experiment: Experiment, record: EngineRecord | None, progress: Console | None
) -> Job:
    """`assemble`, which says on a console how far it is."""
    if progress is None:
        return assemble(experiment, record)
    with waiting(progress, "reading the data", first_s=10.0):
        return assemble(experiment, record, Preparation(progress))


def _holds_a_run(out: str | os.PathLike | None, restarts: int, local: bool) -> bool:
    """Whether there is a run to go on with; InputError where nothing could be restarted."""
    if local:
        raise InputError(
            f"--restarts {restarts}: nothing is restarted with --local, where the rounds run in "
            "this process; leave one of them out"
        )
    if out is None:
        raise InputError(f"--restarts {restarts} needs --out: a folder that a next start finds")
    if restarts < 0:
        raise InputError(f"--restarts {restarts}: is below 0; give how often to start again")
    return (Path(out) / "config.toml").is_file()


def _teller(console: Console | None) -> Callable[[str], None]:
    def say(words: str) -> None:
        if console is not None:
            console.print(words, soft_wrap=True, markup=False, highlight=False)

    return say


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
    folder = _made_or_found(experiment, job, out, resume)
    told = getattr(job.federation, "report", {}).get("warnings", [])
    return replace(folder, warnings=(*folder.warnings, *told, *doubts(experiment, job)))


def _made_or_found(
    experiment: Experiment, job: Job, out: str | os.PathLike | None, resume: bool
) -> RunFolder:
    config, fingerprint = experiment.to_toml(), experiment.fingerprint(stops=False)
    facts = {
        "data": identity(job.federation),
        "start": job.start.facts if job.start else None,
        "traces": job.devices.facts if job.devices else None,
    }
    if not resume:
        where = out if out is not None else _new_name(experiment)
        return RunFolder.create(where, config, fingerprint, **facts)
    if out is None:
        raise InputError("resume needs the run's folder; give out=")
    folder = RunFolder.open(out, fingerprint, config, **facts)
    notes = []
    if changes := folder.environment_changes():
        notes.append(
            "resumed on another machine or other versions than it began on "
            f"({'; '.join(changes)}): the last bits may differ"
        )
    last = last_checkpoint(folder.metrics)
    done = checkpoint.number(last) if last is not None else 0
    if done >= experiment.run.rounds:
        notes.append(
            f"run.rounds = {experiment.run.rounds}, and {done} rounds are done already: nothing "
            f"is trained; set run.rounds above {done} to go on"
        )
    return replace(folder, warnings=tuple(notes))


def _new_name(experiment: Experiment) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = experiment.algorithm.name.replace(":", ".")
    base = Path("runs") / f"{stamp}-{name}-s{experiment.run.seed}"
    taken = 0
    while (path := base if not taken else Path(f"{base}-{taken}")).exists():
        taken += 1
    return path


LABELS_SHOWN = 200  # clients whose label counts a run folder holds


def _describe(folder: RunFolder, job: Job) -> None:
    """What a report shows of tiers, network and data, which the rounds do not write."""
    folder.write_network(job.work.net.space.groups)
    _write_tiers(folder, job)
    if not folder.labels.exists():
        folder.write_labels(_labels(job))


def _labels(job: Job) -> pa.Table:
    """Clients at even distances, or all of them where there are few."""
    ids = np.unique(np.linspace(0, job.federation.num_clients - 1, LABELS_SHOWN).astype(np.int64))
    names = np.array([tier.name for tier in job.fleet.tiers])
    counts = job.federation.label_counts(ids).tolist()
    return pa.table({"client": ids, "tier": names[job.fleet.tier_of[ids]], "counts": counts})


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
