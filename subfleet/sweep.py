"""Sweeps: a grid of experiments and seeds, as resumable cells, with mean ± sd.

A cell is one experiment with one seed. Its folder is named after what decides
its result, so a finished cell is never run again, an interrupted one goes on
from its checkpoint, and cells of several sweeps may share a folder.
"""

from __future__ import annotations

import itertools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.dashboards.console import Preparation, duration, waiting
from subfleet.going_on import command_name
from subfleet.launch import Run, assemble, launch
from subfleet.platform import checkpoint
from subfleet.platform.files import last_checkpoint
from subfleet.platform.runfolder import RunFolder

REPORTED = ("acc_global", "acc_local", "loss_global", "params_mean", "total_bytes_up")


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep, and what of the grid it stands for."""

    label: str
    settings: Mapping[str, Any]
    experiment: Experiment
    folder: Path

    def done(self) -> Run | None:
        """The finished run, None when there is none yet."""
        if not (self.folder / "summary.json").exists():
            return None
        opened = RunFolder.open(self.folder, self.experiment.fingerprint(stops=False))
        summary = opened.read_summary()
        if summary is None or not summary["finished"]:
            return None
        return Run(self.folder, summary)


def grid_points(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """All points of a grid by label, the last axis fastest; what all share is in no label.

    >>> list(grid_points({"train.lr": [0.1, 0.2], "algorithm.name": ["fedpa"]}))
    ['lr=0.1', 'lr=0.2']
    """
    varied = [key for key, values in grid.items() if len(values) > 1]
    points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    return {
        ", ".join(f"{key.split('.')[-1]}={point[key]}" for key in varied) or "all": point
        for point in points
    }


def cells(
    experiment: Experiment,
    seeds: Sequence[int],
    points: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> list[Cell]:
    """The cells of labelled settings, in their order, seeds innermost.

    Raises `InputError`, with the cell's name, for a value that cannot be.
    """
    found = []
    for label, settings in points.items():
        for seed in seeds:
            with _named(label):
                one = experiment.with_values({**settings, "run.seed": seed})
            ending = f"-s{seed}-{one.fingerprint()[:10]}"
            found.append(Cell(label, settings, one, _folder(out, _slug(label), ending)))
    return found


def _folder(out: Path, slug: str, ending: str) -> Path:
    """Where a cell goes: where it is already, if another grid labelled it otherwise."""
    folder = out / f"{slug}{ending}"
    if folder.exists():
        return folder
    return min(out.glob(f"*{ending}"), default=folder)


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Errors within the block name the cell."""
    try:
        yield
    except (InputError, RunFailed) as error:
        raise type(error)(f"cell {label}: {error}") from error


def check(todo: Sequence[Cell], progress: Console | None = None) -> None:
    """Builds what each unfinished cell would run, without running it.

    A mistake in the last cell then shows before the first one is trained. Of the seeds of
    a point, which differ in nothing else, one is built. `progress` shows how far that is.
    Raises `InputError`.
    """
    first = {cell.label: cell for cell in reversed(todo) if cell.done() is None}
    console = progress or Console(quiet=True)
    with waiting(console, "reading the data") as step:
        for number, (label, cell) in enumerate(reversed(first.items()), start=1):
            step(f"reading the data of cell {number} of {len(first)}")
            with _named(label):
                assemble(cell.experiment, progress=Preparation(console))


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "=._" else "-" for c in label)[:60]


def run_cells(
    todo: Sequence[Cell],
    *,
    local: bool = False,
    address: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Console | None = None,
) -> list[Run]:
    """Runs the cells that are not finished; returns every cell's run, in order.

    All cells are checked before the first one runs. Says which cell runs and, after the
    first that really ran, how long the rest will take; `progress` shows the rounds of
    each. Unless `local`, one Ray serves them all.
    """
    left = sum(cell.done() is None for cell in todo)
    say(f"{_count(len(todo))}, {len(todo) - left} finished before, {left} to run")
    if left:
        say("reading the data ...")
        check(todo, progress)
    if left and not local:
        say("starting Ray ..." if address is None else f"joining Ray at {address} ...")
    with nullcontext() if local or not left else _ray(address):
        return _run_each(todo, local=local, address=address, say=say, progress=progress)


def _count(cells: int) -> str:
    return f"{cells} cell" if cells == 1 else f"{cells} cells"


def _ray(address: str | None) -> AbstractContextManager[Any]:
    from subfleet.cluster.start import ray_session

    return ray_session(address)


def _run_each(
    todo: Sequence[Cell],
    *,
    local: bool,
    address: str | None,
    say: Callable[[str], None],
    progress: Console | None,
) -> list[Run]:
    runs: list[Run] = []
    pace = _Pace(todo)
    for number, cell in enumerate(todo, start=1):
        run = cell.done()
        if run is None:
            name = f"{cell.label}, seed {cell.experiment.run.seed}"
            say(f"cell {number}/{len(todo)}: {name}{pace.left()}")
            with _named(name), pace.of(cell):
                run = launch(
                    cell.experiment,
                    out=cell.folder,
                    resume=(cell.folder / "config.toml").exists(),
                    local=local,
                    address=address,
                    progress=progress,
                    alone=False,
                )
        runs.append(run)
    return runs


class _Pace:
    """How long the cells that are left will take, from the seconds of a round so far."""

    def __init__(self, todo: Sequence[Cell]):
        self._rounds = {cell.folder: _rounds_left(cell) for cell in todo if cell.done() is None}
        self._seconds = 0.0
        self._done = 0

    def left(self) -> str:
        """In words, nothing before a cell was run."""
        if not self._done:
            return ""
        seconds = self._seconds / self._done * sum(self._rounds.values())
        return f", about {duration(seconds)} left"

    @contextmanager
    def of(self, cell: Cell) -> Iterator[None]:
        """Measures the block, which runs the cell."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
        self._done += self._rounds.pop(cell.folder)


def _rounds_left(cell: Cell) -> int:
    last = last_checkpoint(cell.folder / "config.toml")
    done = checkpoint.number(last) if last is not None else 0
    return max(1, cell.experiment.run.rounds - done)


def table(todo: Sequence[Cell], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each point of the grid: its settings, seeds, and mean and sd of what it reached."""
    rows = []
    for label, group in itertools.groupby(
        zip(todo, runs, strict=True), key=lambda pair: pair[0].label
    ):
        members = list(group)
        row: dict[str, Any] = {"cell": label, **members[0][0].settings, "seeds": len(members)}
        for key in REPORTED:
            values = [run.summary[key] for _, run in members if run.summary.get(key) is not None]
            if values:
                row[key] = statistics.mean(values)
                row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def plus_minus(row: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    """A mean and its standard deviation as text.

    >>> plus_minus({"acc_global": 0.71, "acc_global_sd": 0.012}, "acc_global")
    '0.710 ± 0.012'
    """
    if row.get(key) is None:
        return "–"
    sd = row.get(f"{key}_sd")
    return f"{row[key]:{form}}" + (f" ± {sd:{form}}" if sd is not None else "")


def sweep(
    experiment: Experiment,
    *,
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
    out: str | os.PathLike | None = None,
    local: bool = False,
    address: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Runs a grid and prints its table; finished cells in `out` are not run again.

    Without `out` the cells go to `cells/`. Raises what a cell raises; the cells
    before it are kept, and the same command goes on where it stopped, also after
    an interrupt.
    """
    folder = Path(out) if out is not None else Path("cells")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    if (folder / "config.toml").exists():
        raise InputError(f"--out {folder}: holds a run; give a folder of the sweep's own")
    todo = cells(experiment, seeds, grid_points(grid), folder)

    def say(text: str) -> None:
        if console is not None:
            console.print(text, soft_wrap=True, markup=False, highlight=False)

    try:
        runs = run_cells(todo, local=local, address=address, say=say, progress=console)
    except RunFailed as error:
        raise RunFailed(f"{error} (the finished cells in {folder} are kept)") from error
    except (KeyboardInterrupt, SystemExit):
        for words in _how_to_go_on(todo, folder):
            say(words)
        raise
    rows = table(todo, runs)
    say(f"to compare them on one page: {command_name()} report {shlex.quote(str(folder))}")
    _show(rows, [key for key, values in grid.items() if len(values) > 1], as_json)
    return rows


def _how_to_go_on(todo: Sequence[Cell], folder: Path) -> Iterator[str]:
    """What an interrupted sweep left, and the command that takes it up: the same."""
    done = sum(cell.done() is not None for cell in todo)
    if not done and not any(last_checkpoint(cell.folder / "config.toml") for cell in todo):
        yield "stopped; nothing saved yet"
        return
    yield f"stopped; {folder} holds {done} of {_count(len(todo))} finished; go on with"
    yield f"  {command_name()} {shlex.join(sys.argv[1:])}"


def _show(rows: Sequence[Mapping[str, Any]], varied: Sequence[str], as_json: bool) -> None:
    from subfleet.cli_support import print_json, print_table

    if as_json:
        print_json(list(rows))
        return
    print_table(
        [
            {
                **({key: row[key] for key in varied} or {"cell": row["cell"]}),
                "seeds": row["seeds"],
                "accuracy": plus_minus(row, "acc_global"),
                "local accuracy": plus_minus(row, "acc_local"),
                "parameters": round(row["params_mean"]),
                "MB up": round(row["total_bytes_up"] / 1e6, 1),
            }
            for row in rows
        ]
    )
