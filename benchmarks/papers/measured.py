"""What a table says of its finished cells, computed from their run folders alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from common import Row, Table
from common import reports as read_reports

from subfleet.core.algorithm import FULL
from subfleet.core.skew import njsd
from subfleet.launch import Run
from subfleet.registry import build_data, build_model, model_facts
from subfleet.sweep import Cell

WINDOW = 5  # rounds of the moving average


@dataclass(frozen=True)
class Clients:
    """The last row of every client that trained, by client (arrays of K, sorted by client)."""

    client: np.ndarray
    acc_local: np.ndarray
    params: np.ndarray
    macs: np.ndarray
    steps: np.ndarray


class Finished:
    """A finished cell and its figures."""

    def __init__(self, cell: Cell, run: Run) -> None:
        self.cell, self.run = cell, run
        self.seed = cell.experiment.run.seed
        self.metrics = run.metrics

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        table = self.run.clients()
        names = ("round", "client", "acc_local", "params", "macs", "steps", "seconds")
        columns = {name: table.column(name).to_numpy() for name in names}
        merged = np.array([status == "ok" for status in table.column("status").to_pylist()])
        return {name: values[merged] for name, values in columns.items()}

    @cached_property
    def clients(self) -> Clients:
        """Of each client what its most recent round with a local test gave."""
        tested = ~np.isnan(self._rows["acc_local"].astype(np.float64))
        rows = {name: values[tested] for name, values in self._rows.items()}
        order = np.lexsort((rows["round"], rows["client"]))
        ids, first = np.unique(rows["client"][order][::-1], return_index=True)
        last = order[::-1][first]
        names = ("acc_local", "params", "macs", "steps")
        return Clients(ids, *(rows[name][last] for name in names))

    @cached_property
    def accuracy(self) -> np.ndarray:
        """acc_global by round; every round is evaluated."""
        known = [record.get("acc_global") for record in self.metrics]
        return np.array([np.nan if value is None else value for value in known], np.float64)

    @cached_property
    def smooth(self) -> np.ndarray:
        """Means over the last `WINDOW` rounds, from round `WINDOW` on; one of a shorter run."""
        return moving_average(self.accuracy, WINDOW)

    def rounds_to(self, target: float) -> int | None:
        """The first round whose moving average reaches the target; None if none does."""
        reached = np.flatnonzero(self.smooth >= target)
        window = min(WINDOW, len(self.accuracy))
        return int(reached[0]) + window if len(reached) else None

    @property
    def pooled(self) -> bool:
        """Whether all data were those of one client: what is said of clients has no meaning."""
        return len(np.unique(self._rows["client"])) == 1

    @cached_property
    def figures(self) -> dict[str, float]:
        """By name, in the units of the tables: percent, megabytes, seconds, numbers."""
        last = self._rows["round"] == self._rows["round"].max()
        own, pooled = self.clients.acc_local, self.pooled
        return {
            "acc_global": 100 * float(self.accuracy[-1]),
            "acc_global_last_5": 100 * float(self.smooth[-1]),
            "acc_global_best": 100 * float(self.smooth.max()),
            "acc_local": float("nan") if pooled or not len(own) else 100 * float(own.mean()),
            "params": float(self._rows["params"][last].mean()),
            "macs": float(self._rows["macs"][last].mean()),
            "mb_up": sum(record["bytes_up"] for record in self.metrics) / 1e6,
            "mb_down": sum(record["bytes_down"] for record in self.metrics) / 1e6,
            "client_s": float("nan") if pooled else float(np.median(self._rows["seconds"])),
        }


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` values (all, where there are fewer), the last value's place last.

    >>> moving_average(np.array([1.0, 2.0, 3.0, 4.0]), 2)
    array([1.5, 2.5, 3.5])
    """
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


@dataclass(frozen=True)
class Line:
    """One row of a table with its finished cells."""

    row: Row
    finished: Sequence[Finished]

    def values(self, figure: str) -> list[float]:
        """Of each seed."""
        return [one.figures[figure] for one in self.finished]

    def rounds_to(self, target: float) -> list[int | None]:
        """Of each seed."""
        return [one.rounds_to(target) for one in self.finished]


@dataclass(frozen=True)
class Results:
    """A table and what is finished of it.

    `full` has the whole network's params and macs, `units` the size of its unit groups.
    """

    table: Table
    lines: Sequence[Line]
    full: Mapping[str, float]
    units: Mapping[str, int]

    def line(self, name: str) -> Line | None:
        """The row of that name, if a cell of it is finished."""
        return next((line for line in self.lines if line.row.name == name), None)

    def environments(self) -> list[dict[str, Any]]:
        """What each cell was made on, as its run folder says."""
        finished = [one for line in self.lines for one in line.finished]
        return [json.loads((one.run.path / "environment.json").read_text()) for one in finished]

    def to_json(self) -> dict[str, Any]:
        """All figures of all seeds."""
        return {
            "table": self.table.name,
            "full": dict(self.full),
            "rows": {
                line.row.name: {
                    "seeds": [one.seed for one in line.finished],
                    "paper": dict(line.row.paper),
                    **{
                        name: [None if value != value else value for value in line.values(name)]
                        for name in line.finished[0].figures
                    },
                    "rounds_to": {str(t): line.rounds_to(t) for t in self.table.targets},
                }
                for line in self.lines
            },
        }


def results(table: Table, cells: Sequence[Cell]) -> Results | None:
    """The finished ones of a table's cells; None where there is none."""
    lines = []
    for row in table.rows:
        own = [(cell, cell.done()) for cell in cells if cell.label == row.name]
        finished = [Finished(cell, run) for cell, run in own if run is not None]
        if finished:
            lines.append(Line(row, finished))
    if not lines:
        return None
    federation = build_data(table.experiment.data, seed=table.experiment.run.seed)
    net = build_model(table.experiment.model, **model_facts(federation))
    full = {"params": net.stored_params(FULL, "local"), "macs": net.cost(FULL).macs}
    return Results(table, lines, full, {g: net.space.size(g) for g in net.space.widths})


# --- numbers as text -------------------------------------------------------------------------


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; the mean alone of one value.

    >>> plus_minus([1.0, 3.0], 1), plus_minus([2.0], 1), plus_minus([], 1)
    ('2.0 ± 1.4', '2.0', '–')
    """
    known = [value for value in values if value == value]
    if not known:
        return "–"
    sd = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{sd}"


def rounds_text(rounds: Sequence[int | None]) -> str:
    """Mean ± sd where every seed got there; else the rounds of those that did.

    >>> rounds_text([4, 6]), rounds_text([4, None]), rounds_text([None])
    ('5.0 ± 1.4', '4, –', '–')
    """
    known = [value for value in rounds if value is not None]
    if len(known) == len(rounds):
        return plus_minus(known, 1)
    return ", ".join("–" if value is None else str(value) for value in rounds) if known else "–"


def size_text(values: Sequence[float], full: float) -> str:
    """A number of parameters or operations, and its share of the whole network's.

    >>> size_text([50_000.0, 60_000.0], 110_000.0)
    '0.055 M (50.0 %)'
    """
    mean = statistics.fmean(values)
    return f"{mean / 1e6:.3f} M ({100 * mean / full:.1f} %)"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


Column = tuple[str, Callable[[Line], str]]


def table_text(results: Results, columns: Sequence[Column]) -> str:
    """One Markdown table of a table's rows."""
    return markdown(
        ["", *(heading for heading, _ in columns)],
        [[line.row.title, *(text(line) for _, text in columns)] for line in results.lines],
    )


def accuracy_columns() -> list[Column]:
    """Accuracies in percent beside the paper's."""
    return [
        ("Acc_G, paper", lambda line: line.row.paper.get("acc_global", "–")),
        ("Acc_G, last 5 rounds", lambda line: plus_minus(line.values("acc_global_last_5"))),
        (
            "best 5 rounds, chosen on the test part",
            lambda line: plus_minus(line.values("acc_global_best")),
        ),
        ("Acc_L, paper", lambda line: line.row.paper.get("acc_local", "–")),
        ("Acc_L", lambda line: plus_minus(line.values("acc_local"))),
        ("seeds", lambda line: str(len(line.finished))),
    ]


def size_columns(full: Mapping[str, float]) -> list[Column]:
    """What a client trains, mean over the clients of the last round."""
    return [
        ("parameters, paper", lambda line: line.row.paper.get("params", "–")),
        ("parameters", lambda line: size_text(line.values("params"), full["params"])),
        ("operations, paper", lambda line: line.row.paper.get("macs", "–")),
        ("operations", lambda line: size_text(line.values("macs"), full["macs"])),
    ]


def cost_columns(results: Results, reference: str = "fedavg") -> list[Column]:
    """Bytes and seconds, these also against a reference row's."""
    base = results.line(reference)

    def factor(line: Line) -> str:
        if base is None or line.finished[0].pooled:
            return "–"
        own, its = (statistics.fmean(one.values("client_s")) for one in (line, base))
        return f"{own / its:.2f}"

    return [
        ("MB up", lambda line: plus_minus(line.values("mb_up"), 1)),
        ("MB down", lambda line: plus_minus(line.values("mb_down"), 1)),
        ("seconds a client", lambda line: plus_minus(line.values("client_s"), 3)),
        ("× FedAvg's", factor),
    ]


def rounds_columns(results: Results) -> list[Column]:
    """Rounds to the paper's targets, where it tells them, and to the table's own."""

    def rounds(target: float) -> Column:
        return (
            f"rounds to {100 * target:.0f} %",
            lambda line: rounds_text(line.rounds_to(target)),
        )

    return [
        *([("rounds to, paper", lambda line: line.row.paper["rounds"])] if _told(results) else []),
        *(rounds(target) for target in results.table.targets),
    ]


def _told(results: Results) -> bool:
    return all("rounds" in line.row.paper for line in results.lines)


# --- what figures need -----------------------------------------------------------------------


def kept_shares(one: Finished, units: Mapping[str, int]) -> dict[str, list[float]]:
    """Of each unit group the share that each client returned, where clients report such a thing.

    Of the units themselves: the keep ratio is before rounding and before a budget's cap.
    """
    found: dict[str, list[float]] = {}
    for report in read_reports(one.run.path).values():
        for group, kept in (report.get("units") or {}).items():
            found.setdefault(group, []).append(kept / units[group])
    return found


def divergences(one: Finished) -> np.ndarray:
    """The normalised Jensen-Shannon divergence of each of `one.clients`' labels, in [0, 1]."""
    federation = build_data(one.cell.experiment.data, seed=one.seed)
    return njsd(federation.label_counts(one.clients.client))
