"""The stress ladder: each rung a short run of its own processes, so that its memory is its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from subfleet.cluster.stress import Measured, Rung, measured
from subfleet.cluster.watch import Watch, machine_bytes
from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.launch import Run, launch, local_device

AROUND = 2  # rounds that do not count: the first, which warms up, and the last, which evaluates
POLL_S = 0.1
END_S = 30.0  # how long a rung that is told to stop may take
_GIVEN = {"data.clients": "--clients", "run.cohort": "--cohort", "run.rounds": "--rounds"}


@dataclass(frozen=True)
class Ladder:
    """What all rungs share."""

    out: Path
    widths: tuple[float, ...] = (1.0, 0.5, 0.25)
    rounds: int = 5
    overrides: tuple[str, ...] = ()
    local: bool = False
    address: str | None = None
    minutes: float | None = None  # of the whole ladder

    def __post_init__(self) -> None:
        for override in self.overrides:
            key = override.partition("=")[0].strip()
            if key in _GIVEN:
                raise InputError(f"--set {override}: each rung has its own; give {_GIVEN[key]}")
        self.experiment(Rung(1, 1))  # what is wrong with --set is wrong on every rung

    def experiment(self, rung: Rung) -> Experiment:
        """The rung's run: so little training that what is around it shows.

        A step on 20 drawn images for each client of FedPA on a CNN of 15 thousand parameters.
        """
        named = {override.partition("=")[0].strip() for override in self.overrides}
        # Another model or data set has options of its own.
        model = {"channels": [4, 8], "hidden": 32} if "model.name" not in named else {}
        data = {"mean_samples": 20} if "data.name" not in named else {}
        share = 1 / len(self.widths)
        tiers = [{"name": f"width {w:g}", "share": share, "width": w} for w in self.widths]
        return Experiment(
            data={"name": "synthetic_femnist", "clients": rung.clients, **data},
            model={"name": "small_cnn", **model},
            fleet={"tiers": tiers},
            algorithm={"name": "fedpa"},
            train={"batch_size": 20, "steps": 1},
            run={
                "rounds": self.rounds + AROUND,
                "cohort": rung.cohort,
                "held_out": 0.0,
                "eval_every": 0,
                "eval_clients": 20,
                "checkpoint_every": 0,
            },
        ).with_overrides(self.overrides)

    def folder(self, rung: Rung) -> Path:
        """Where a rung's run goes."""
        return self.out / f"clients-{rung.clients}-cohort-{rung.cohort}"


@dataclass(frozen=True)
class Outcome:
    """How a rung went: "ok", "failed" or "skipped", and why."""

    rung: Rung
    status: str
    why: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # of `Measured.to_json`

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        head = {"clients": self.rung.clients, "cohort": self.rung.cohort}
        return {**head, "status": self.status, "why": self.why, **self.figures}


def climb(
    ladder: Ladder, rungs: Sequence[Rung], say: Callable[[Rung, int], None]
) -> Iterator[Outcome]:
    """Runs one rung after the other; `say` hears of the rounds that are done.

    What the engine chose on the first rung that ends holds on all others, so that they differ
    in their clients alone.
    """
    until = None if ladder.minutes is None else time.monotonic() + 60 * ladder.minutes
    record: Path | None = None
    for rung in rungs:
        if rung.impossible is not None:
            yield Outcome(rung, "skipped", rung.impossible)
        elif until is not None and time.monotonic() >= until:
            yield Outcome(rung, "skipped", f"--minutes {ladder.minutes:g} were over")
        else:
            outcome = _in_its_own_process(ladder, rung, record, until, say)
            if outcome.status == "ok" and record is None:
                record = ladder.folder(rung) / "engine.json"
            yield outcome


def _in_its_own_process(
    ladder: Ladder,
    rung: Rung,
    record: Path | None,
    until: float | None,
    say: Callable[[Rung, int], None],
) -> Outcome:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_rung, args=(ladder, rung, record, theirs))
    process.start()
    theirs.close()
    over, done = False, 0
    try:
        while not over:
            if until is not None and time.monotonic() >= until:
                why = f"not done when --minutes {ladder.minutes:g} were over"
                return Outcome(rung, "failed", why)
            say(rung, done)
            if ours.poll(POLL_S):
                kind, value = ours.recv()
                over = kind != "rounds"
                done = done if over else value
        return Outcome(rung, "ok", figures=value) if kind == "ok" else Outcome(rung, kind, value)
    except EOFError:
        process.join()
        return Outcome(rung, "failed", _death(process.exitcode or 0))
    finally:
        ours.close()
        _end(process, over=over)


def _end(process: Any, *, over: bool) -> None:
    """Waits for a process that is over; stops another one, which takes its Ray down with it."""
    if over:
        process.join(END_S)
    process.terminate()
    process.join(END_S)
    if process.is_alive():
        process.kill()
        process.join()


def _death(status: int) -> str:
    """What the end of a process without a word means.

    >>> _death(-9)
    'its process was killed (SIGKILL), as it is when memory runs out'
    """
    if status >= 0:
        return f"its process ended with status {status}; its log says more"
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return "its process was killed (SIGKILL), as it is when memory runs out"
    return f"its process ended by {name}; its log says more"


# --- in the rung's own process -------------------------------------------------------------------


def _rung(ladder: Ladder, rung: Rung, record: Path | None, pipe: Connection) -> None:
    """Runs the rung and tells ("rounds", how many), then ("ok", figures) or ("failed", why)."""
    folder = ladder.folder(rung)
    ladder.out.mkdir(parents=True, exist_ok=True)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        found = _run(ladder, rung, record, lambda rounds: pipe.send(("rounds", rounds)))
    except (InputError, RunFailed) as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        raise
    else:
        pipe.send(("ok", found.to_json()))


def _run(ladder: Ladder, rung: Rung, record: Path | None, tell: Callable[[int], None]) -> Measured:
    experiment, folder = ladder.experiment(rung), ladder.folder(rung)
    began_s = time.perf_counter()
    hosts, room = max(1, experiment.run.hosts), {"machine": machine_bytes()}
    watch = Watch(
        folder / "metrics.jsonl", ray=not ladder.local, joined=ladder.address is not None, tell=tell
    )
    with ExitStack() as stack:
        if not ladder.local:
            from subfleet.cluster.start import ray_session
            from subfleet.platform.placement import placement

            ray = stack.enter_context(ray_session(ladder.address))
            hosts = placement(ray.nodes(), experiment.run.hosts, experiment.run.device).hosts
            store = sum(n["Resources"].get("object_store_memory", 0) for n in ray.nodes())
            room["object_store"] = int(store)
        else:
            hosts = 1  # its workers take turns
            local_device(experiment.run.device)
        watch.start()
        stack.callback(watch.stop)
        run = launch(
            experiment, out=folder, local=ladder.local, address=ladder.address, engine_record=record
        )
    return _figures(run, watch, rung, hosts, began_s, room)


def _figures(
    run: Run, watch: Watch, rung: Rung, hosts: int, began_s: float, room: dict[str, int]
) -> Measured:
    clients = run.clients()
    return measured(
        run.metrics,
        clients["round"].to_numpy(),
        clients["seconds"].to_numpy(),
        watch.ends,
        cohort=rung.cohort,
        hosts=hosts,
        began_s=began_s,
        params_mean=run.summary["params_mean"],
        peaks=watch.peaks,
        room=room,
    )


def write(ladder: Ladder, outcomes: Iterable[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """`stress.json` in the ladder's folder, and what is in it."""
    found = {
        **facts,
        "widths": list(ladder.widths),
        "rounds": ladder.rounds,
        "set": list(ladder.overrides),
        "local": ladder.local,
        "rungs": [outcome.to_json() for outcome in outcomes],
    }
    ladder.out.mkdir(parents=True, exist_ok=True)
    (ladder.out / "stress.json").write_text(json.dumps(found, indent=2) + "\n")
    return found
