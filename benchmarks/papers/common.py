"""Scaled-down tables of papers: cells of rows and seeds, kept, estimated, run side by side.

A table is an experiment and rows, each with settings of its own and what the paper reports.
A cell is a row with a seed, in a folder of its own named after what decides its result
(`subfleet.sweep`): finished ones are never run again, cut ones go on where they stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from subfleet import sweep
from subfleet.config import Experiment
from subfleet.core.errors import RunFailed
from subfleet.launch import launch
from subfleet.platform import checkpoint
from subfleet.platform.metrics import read_metrics
from subfleet.sweep import Cell

PROBE_S = 20.0  # how long a row runs to learn its pace; these rounds count
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One row: what it changes in its table's experiment, and what the paper says of it."""

    name: str
    title: str
    settings: Mapping[str, Any]
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows that share an experiment. `targets` are accuracies to count the rounds to."""

    name: str
    title: str
    experiment: Experiment
    rows: tuple[Row, ...]
    targets: tuple[float, ...] = ()
    about: str = ""

    def only(self, names: Sequence[str] | None) -> Table:
        """The table with the rows of these names; all for None."""
        rows = tuple(row for row in self.rows if names is None or row.name in names)
        return Table(self.name, self.title, self.experiment, rows, self.targets, self.about)

    def cells(self, seeds: Sequence[int], cache: Path) -> list[Cell]:
        """A cell for each row and seed, labelled by the row's name, seeds innermost."""
        points = {row.name: dict(row.settings) for row in self.rows}
        return sweep.cells(self.experiment, seeds, points, cache / self.name)


# --- one cell --------------------------------------------------------------------------------


def train(cell: Cell, max_seconds: float | None = None, local: bool = True) -> None:
    """Runs a cell to its end, or for `max_seconds`; a finished one keeps only what is reported.

    Locally in this process, on one thread; else on Ray, with all that the machine has.
    """
    experiment = cell.experiment.with_values({"run.hosts": 1} if local else {})
    if max_seconds is not None:
        experiment = experiment.with_values({"run.max_seconds": max_seconds})
    if local:
        torch.set_num_threads(1)
    resume = (cell.folder / "config.toml").exists()
    launch(experiment, out=cell.folder, resume=resume, local=local)
    if cell.done() is not None:
        _slim(cell.folder)


def _slim(folder: Path) -> None:
    """Replaces the checkpoints, in which clients' states lie, by what the clients reported."""
    last = max(folder.glob("checkpoints/round-*"), default=None)
    if last is None:
        return
    owner = json.loads((last / "manifest.json").read_text())["fingerprint"]
    found = checkpoint.load_latest(last.parent, fingerprint=owner)
    reports = found.state["roster"]["reports"] if found is not None else {}
    written = {str(client): _plain(report) for client, report in reports.items()}
    (folder / "reports.json").write_text(json.dumps(written))
    shutil.rmtree(last.parent)


def _plain(value: Any) -> Any:
    """A report as JSON: arrays and tensors become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def reports(folder: Path) -> dict[int, dict[str, Any]]:
    """What each client of a finished cell last reported, by client."""
    file = folder / "reports.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {int(client): report for client, report in found.items() if report is not None}


# --- all of them -----------------------------------------------------------------------------


@dataclass
class Pace:
    """Seconds a round of each row, from the rounds that any of its cells has run."""

    cells: Sequence[Cell]

    def of(self, cell: Cell) -> float | None:
        """Of this row; None before a round of it was run."""
        rows = [one for one in self.cells if _row(one) == _row(cell)]
        seconds = [s for one in rows for s in _seconds(one.folder)]
        return statistics.median(seconds) if seconds else None

    def left(self, cell: Cell) -> float:
        """Seconds that the rest of a cell will take; 0 where its row never ran."""
        rounds = cell.experiment.run.rounds - len(_records(cell.folder))
        return max(rounds, 0) * (self.of(cell) or 0.0)


def _row(cell: Cell) -> tuple[Path, str]:
    return cell.folder.parent, cell.label


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return list(read_metrics(file)) if file.exists() else []


def _seconds(folder: Path) -> list[float]:
    """Of each round but the first, which warms up; of that, where it is the only one, a part."""
    seconds = [record["seconds"] for record in _records(folder)]
    if len(seconds) == 1:
        # Before round 1 the engine tries ways to compute, which counts as planning.
        return [seconds[0]["total"] - seconds[0]["plan"]]
    return [one["total"] for one in seconds[1:]]


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """A future that is done."""
        done: Future = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def run(
    todo: Sequence[Cell], *, jobs: int, minutes: float, say: Say, local: bool = True
) -> dict[str, str]:
    """Runs the cells that are not finished, `jobs` at a time, each in a process of one thread.

    With `jobs` 0 they run one after another in this process, and unless `local` on Ray. Rows
    that never ran are tried for some seconds first, then the estimate is said. No cell is
    begun that would end after `minutes`. Returns the cells that are missing, by name, and why.
    """
    ends = time.monotonic() + 60 * minutes
    # All rows of one seed before the next seed: a table cut short is whole in one direction.
    todo = sorted(todo, key=lambda cell: cell.experiment.run.seed)
    left = [cell for cell in todo if cell.done() is None]
    say(f"{len(todo)} cells, {len(todo) - len(left)} finished before, {len(left)} to run")
    if not left:
        return {}
    for table in {cell.folder.parent for cell in left}:
        sweep.check([cell for cell in left if cell.folder.parent == table])
    pace = Pace(todo)
    pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs else _Here()
    try:
        work = partial(pool.submit, train, local=local)
        failed = _probe(left, pace, work, ends, say)
        say(estimate(left, pace, max(jobs, 1)))
        waiting = [cell for cell in left if name(cell) not in failed]
        # Of a seed the longest first: short ones fill the gaps at its end.
        waiting.sort(key=lambda cell: (cell.experiment.run.seed, -pace.left(cell)))
        return failed | _finish(waiting, pace, work, max(jobs, 1), ends, say)
    finally:
        # After an interrupt, which the running cells have heard too: they save what they have.
        pool.shutdown(cancel_futures=True)


def _probe(
    left: Sequence[Cell], pace: Pace, work: Callable[..., Future], ends: float, say: Say
) -> dict[str, str]:
    """Tries one cell of each row that never ran."""
    first = {_row(cell): cell for cell in reversed(left) if pace.of(cell) is None}
    if not first or time.monotonic() >= ends:
        return {}
    say(f"trying {len(first)} rows for {PROBE_S:.0f} s each")
    running = {work(cell, max_seconds=PROBE_S): cell for cell in reversed(first.values())}
    return dict(_failure(future, cell, say) for future, cell in running.items() if _bad(future))


def _finish(
    cells: Sequence[Cell],
    pace: Pace,
    work: Callable[..., Future],
    jobs: int,
    ends: float,
    say: Say,
) -> dict[str, str]:
    missing: dict[str, str] = {}
    running: dict[Future, Cell] = {}
    waiting = [cell for cell in cells if cell.done() is None]
    while waiting or running:
        while waiting and len(running) < jobs:
            cell = waiting.pop(0)
            if time.monotonic() + pace.left(cell) >= ends:
                missing[name(cell)] = "would have ended after the time allowed"
                continue
            say(f"{name(cell)}: about {pace.left(cell):.0f} s")
            running[work(cell)] = cell
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            if _bad(future):
                missing |= [_failure(future, cell, say)]
            else:
                say(f"{name(cell)}: finished")
    return missing


def name(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.folder.parent.name}, {cell.label}, seed {cell.experiment.run.seed}"


def _bad(future: Future) -> bool:
    """Waits; whether the run failed. Any other error is raised: the table is wrong then."""
    error = future.exception()
    if error is not None and not isinstance(error, RunFailed):
        raise error
    return error is not None


def _failure(future: Future, cell: Cell, say: Say) -> tuple[str, str]:
    say(f"{name(cell)}: failed: {future.exception()}")
    return name(cell), f"failed: {future.exception()}"


def estimate(left: Iterable[Cell], pace: Pace, jobs: int) -> str:
    """How long the cells that are left take, in all and row by row."""
    by_row: dict[str, list[float]] = {}
    for cell in left:
        seconds = by_row.setdefault(f"{cell.folder.parent.name}, {cell.label}", [])
        seconds.append(pace.left(cell))
    whole = sum(map(sum, by_row.values())) / jobs / 60
    lines = [f"about {whole:.0f} minutes, {jobs} cells at a time:"]
    lines += [
        f"  {row}: {len(seconds)} cells of about {statistics.fmean(seconds):.0f} s"
        for row, seconds in by_row.items()
    ]
    return "\n".join(lines)
