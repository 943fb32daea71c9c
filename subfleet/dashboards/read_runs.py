"""Runs as they lie on the disk: finished, going on, cut short, or written by another version."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

import subfleet
from subfleet.core.errors import InputError
from subfleet.platform.runfolder import RunFolder

State = Literal["finished", "running", "stopped", "cut short"]
_UNREADABLE = (OSError, pa.ArrowInvalid)
DEEPEST = 3  # folders below a given one in which runs are looked for


@dataclass(frozen=True)
class ReadRun:
    """What a run folder tells; whatever is missing there is empty here.

    `label` is the folder's shortest name among the runs read together. `notes` are sentences on
    what is odd about the run. Nothing is written, and nothing is locked but for a moment.
    """

    folder: RunFolder
    label: str
    state: State
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def seed(self) -> int | None:
        """The seed of the run."""
        return self.config.get("run", {}).get("seed")

    @property
    def rounds(self) -> int:
        """How many rounds are done."""
        return self.records[-1]["round"] if self.records else 0

    @property
    def planned(self) -> int:
        """How many rounds there were to be."""
        return self.config.get("run", {}).get("rounds", self.rounds)

    @cached_property
    def groups(self) -> dict[str, int]:
        """The super-network's unit groups and their sizes, in order."""
        return _table(self.folder.network).get("groups", {})

    @cached_property
    def tiers(self) -> list[dict[str, Any]]:
        """The rows of `tiers.json`."""
        return _json(self.folder.tiers) or []

    @cached_property
    def labels(self) -> pa.Table | None:
        """`labels.parquet`, None where there is none that can be read."""
        try:
            return pq.read_table(self.folder.labels)
        except _UNREADABLE:
            return None

    def series(self, key: str) -> dict[int, float]:
        """The known values of a number of `metrics.jsonl`, by round."""
        found = ((record["round"], record.get(key)) for record in self.records)
        return {round: float(value) for round, value in found if isinstance(value, int | float)}

    def clients(self, round: int) -> pa.Table:
        """The rows of `clients/` of one round; no rows where there are none that can be read."""
        for path in sorted(self.folder.clients.glob("part-*.parquet")):
            span = re.fullmatch(r"part-(\d+)-(\d+)\.parquet", path.name)
            if span and int(span[1]) <= round <= int(span[2]):
                try:
                    return pq.read_table(path, filters=[("round", "=", round)])
                except _UNREADABLE:  # cut, or gone: a resume has just put another in its place
                    break
        return pa.table({})


def read_runs(paths: Sequence[str | os.PathLike]) -> list[ReadRun]:
    """The runs in some folders, each a run's own or one that holds runs, in order, each once.

    Raises `InputError` for a folder that is not there or holds no run, and for no folder at all.
    """
    if not paths:
        raise InputError("no runs: give the folders of some, or one that holds them")
    found = list(dict.fromkeys(run.resolve() for path in paths for run in find_runs(Path(path))))
    labels = short_names(found)
    return [_read(path, label) for path, label in zip(found, labels, strict=True)]


def find_runs(path: Path) -> list[Path]:
    """The folders of runs at or below a path, sorted; `InputError` where there is none."""
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give a run folder, or one that holds runs")
    found = sorted(_below(path, DEEPEST))
    if not found:
        raise InputError(
            f"{path}: holds no run (no config.toml, nor {DEEPEST} folders below); give the folder "
            "that `subfleet run` printed last, or a sweep's"
        )
    return found


def _below(path: Path, depth: int) -> Iterator[Path]:
    if (path / "config.toml").is_file():
        yield path
    elif depth:
        for child in path.iterdir():
            if child.is_dir():
                yield from _below(child, depth - 1)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of some paths that tell them apart.

    >>> short_names([Path("/a/x/s0"), Path("/a/y/s0")]), short_names([Path("/a/x")])
    (['x/s0', 'y/s0'], ['x'])
    """
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _read(path: Path, label: str) -> ReadRun:
    folder = RunFolder(path, "")
    busy = folder.busy  # asked first: a run that ends meanwhile is then taken for a running one
    notes: list[str] = []
    config, environment = {}, _table(folder.environment)
    try:
        tables = tomllib.loads(folder.config.read_text())
        config = {key: table for key, table in tables.items() if isinstance(table, dict)}
    except (OSError, ValueError) as error:
        notes.append(f"config.toml cannot be read ({error})")
    summary = _table(folder.summary)
    records = list(_records(folder.metrics, notes))
    notes += [f"{name} cannot be read and is left out" for name in _damaged(folder)]
    version = (environment.get("packages") or {}).get("subfleet")
    if version != subfleet.__version__:
        notes.append(f"written by subfleet {version or 'of an unknown version'}")
    state = "running" if busy else _state(summary, records)
    if state != "finished":
        done = records[-1]["round"] if records else 0
        planned = config.get("run", {}).get("rounds", "an unknown number of")
        notes.append(f"{_WORDS[state]}: {done} of {planned} rounds")
    return ReadRun(folder, label, state, config, environment, summary, records, tuple(notes))


def _damaged(folder: RunFolder) -> Iterator[str]:
    """Parquet files without their end, by name: a copy that was cut short, say."""
    for path in (*sorted(folder.clients.glob("part-*.parquet")), folder.labels):
        try:
            if path.is_file():
                pq.read_metadata(path)
        except _UNREADABLE:
            yield str(path.relative_to(folder.path))


_WORDS = {
    "running": "still running",
    "stopped": "ended by its time limit",
    "cut short": "crashed, was interrupted, or goes on on another machine",
}


def _state(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> State:
    """Of a run that nothing on this machine works at; one that came to its end has a summary."""
    if summary and (not records or (summary.get("rounds") or 0) >= records[-1]["round"]):
        return "finished" if summary.get("finished", True) else "stopped"
    return "cut short"


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines that can be read; of the others the notes tell."""
    if not path.is_file():
        notes.append("has no metrics.jsonl yet")
        return
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record: Any = json.loads(line)
            known = isinstance(record["round"], int)
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            yield record
        else:
            damaged.append(number)
    if damaged:
        lines = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines"
        notes.append(
            f"metrics.jsonl: {lines} cannot be read and {_is(damaged)} left out, of sums, too"
        )


def _is(things: Sequence[Any]) -> str:
    return "is" if len(things) == 1 else "are"


def _table(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
