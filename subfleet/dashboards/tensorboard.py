"""TensorBoard: numbers and how they are laid out, pictures, histograms, settings of a run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from subfleet.dashboards import tensorboard_values as values
from subfleet.dashboards.eventfile import EventFile
from subfleet.dashboards.heatmap import heat_map, stretched
from subfleet.dashboards.settings import settings
from subfleet.platform.columns import METRICS_COLUMNS
from subfleet.platform.files import to_jsonable
from subfleet.platform.metrics import read_metrics

# At most so many of each kind a run, and those of the last round: also of one that ends early.
PICTURES, HISTOGRAMS = 10, 100
_TAGS = {column.name: column.tag for column in METRICS_COLUMNS}
_BARS = 128  # of a histogram of units, at most; TensorBoard shows 30
_BINS = np.linspace(0.0, 1.0, 21)  # of accuracies


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every finite number of a record; keys of its own go under `algorithm/`.

    >>> record = {"round": 3, "acc_global": 0.5, "acc_tier": {"low": 0.25}, "rate": 2}
    >>> dict(scalars(record))
    {'accuracy/global': 0.5, 'accuracy/tier/low': 0.25, 'algorithm/rate': 2.0}
    """
    for key, value in to_jsonable(record).items():
        tag = _TAGS.get(key, f"algorithm/{key}")
        if tag:
            yield from _numbers(tag, value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{tag}/{key}", item)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield tag, float(value)


class TensorBoardWriter:
    """An `Observer` that writes event files into a folder.

    On a resume whatever the events hold beyond the checkpoint is void. What is written
    follows from the rounds alone, but for the times of events. Nothing of TensorBoard is
    imported before `on_start`. A full disk raises `RunFailed`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._events: EventFile | None = None
        self._waiting: list[Any] = []  # what belongs to the round that is not told yet
        self._kept: list[dict[str, float]] = []  # of each round from the first on
        self._rounds = 1
        # The newest of each kind that is not drawn yet: its round, and how.
        self._owed: dict[str, tuple[int, Callable[[], Iterable[Any]]]] = {}

    def on_start(self, info: dict[str, Any]) -> None:
        """Open the event file; write the experiment as text and as hyper-parameters."""
        start, config = info.get("start", 0), info.get("config", {})
        fleet = config.get("fleet", {})
        simulated = any("device" in table for table in (fleet, *fleet.get("tiers", ())))
        self._rounds = info.get("rounds", 1)
        self._kept = list(_earlier(info)) if start else []
        self._events = EventFile(self.folder, purge_step=start + 1 if start else None)
        # Code, in Markdown.
        indented = "".join(f"    {line}\n" for line in tomli_w.dumps(config).splitlines())
        first = [
            values.text("experiment", indented),
            values.layout(simulated=simulated),
            values.session_start(dict(settings(config)), time.time()),
        ]
        self._events.add(first, start)

    def on_clients(self, round: int, columns: Mapping[str, np.ndarray]) -> None:
        """Keep how clients' accuracy before merging is spread, where it was measured."""
        del round
        self._waiting = list(_spread(columns))

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Write the round: its numbers, who trained which unit, and now and then pictures."""
        assert self._events is not None, "on_start first"
        parts, self._waiting = self._waiting, []
        parts += [values.scalar(tag, value) for tag, value in scalars(record)]
        self._kept.append(record.get("keep") or {})
        round, clients = record["round"], record.get("clients")
        self._owed["trained"] = round, partial(_trained, coverage)
        self._owed["coverage"] = round, partial(self._coverage, round)
        if clients:  # where nobody arrived there are no shares
            self._owed["shares"] = round, partial(_shares, coverage, clients)
        for kind, times in (("trained", HISTOGRAMS), ("coverage", PICTURES), ("shares", PICTURES)):
            if self._due(round, times) and self._owed.get(kind, (0,))[0] == round:
                parts += self._owed.pop(kind)[1]()
        self._events.add(parts, round)

    def _due(self, round: int, times: int) -> bool:
        return round % math.ceil(self._rounds / times) == 0 or round == self._rounds

    def _coverage(self, round: int) -> Iterator[Any]:
        """The column `keep` of all rounds so far, where there is any."""
        groups = list(dict.fromkeys(group for kept in self._kept for group in kept))
        if groups:
            rows = {
                group: np.array([kept.get(group, np.nan) for kept in self._kept])
                for group in groups
            }
            first = round - len(self._kept) + 1
            drawn = heat_map(
                rows,
                title="share of clients that trained a unit, mean",
                first=f"round {first}",
                last=f"round {round}",
            )
            yield values.picture("heatmap/coverage", drawn)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Write what only the summary knows, and what is not drawn of the last rounds; close."""
        if self._events is None:
            return
        events, self._events = self._events, None
        own = {key: value for key, value in to_jsonable(summary).items() if key not in _TAGS}
        own.pop("finished", None)
        parts = [values.scalar(tag, value) for tag, value in _numbers("final", own)]
        if summary.get("finished"):  # else it may be gone on with
            parts.append(values.session_end(time.time()))
        try:
            for round, draw in self._owed.values():
                events.add(draw(), round)
            events.add(parts, summary.get("rounds", 0))
        finally:
            events.close()


def _earlier(info: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """The column `keep` of the rounds before a resume."""
    path = Path(info.get("run_folder", "")) / "metrics.jsonl"
    if path.is_file():
        for record in read_metrics(path):
            if record["round"] <= info["start"]:
                yield record.get("keep") or {}


def _trained(coverage: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """How many clients trained each unit: units along the axis, clients as heights."""
    for group, counts_C in coverage.items():
        units = len(counts_C)
        bars = min(units, _BARS)
        edges = np.arange(bars + 1) * units // bars
        yield values.histogram(f"coverage/{group}", edges, stretched(counts_C, bars))


def _shares(coverage: Mapping[str, np.ndarray], clients: int) -> Iterator[Any]:
    """A row for each group: the share of the clients that trained each of its units."""
    if coverage:
        drawn = heat_map(
            {f"{group} ({len(counts)})": counts / clients for group, counts in coverage.items()},
            title="share of clients that trained each unit",
            first="first unit",
            last="last unit",
        )
        yield values.picture("heatmap/keep_ratio", drawn)


def _spread(columns: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """Histograms of local accuracy: of all clients, and of each tier's."""
    known = ~np.isnan(columns["acc_local"])
    accuracy, tiers = columns["acc_local"][known], columns["tier"][known]
    if len(accuracy):
        yield values.histogram("clients/acc_local", _BINS, np.histogram(accuracy, _BINS)[0])
    for tier in np.unique(tiers).tolist():
        heights, _ = np.histogram(accuracy[tiers == tier], _BINS)
        yield values.histogram(f"clients/acc_local/{tier}", _BINS, heights)
