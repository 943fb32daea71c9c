"""What the page of APFL's tables says: computed from the cells, in tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import figures
import measured
import numpy as np
from common import reports
from measured import Finished, Line, Results

METHODS = ("fedavg", "feduniform", "fedcs")
FLEETS = ("high", "low")


def explained(small: bool) -> str:
    """What the columns mean, and what is smaller than in the paper."""
    scaled = (
        " Scaled down: 7,319 training and 1,017 test images, 10 clients, MobileNetV2 of a quarter "
        "of the width with channels in multiples of 2 and a stem of stride 2, 20 rounds of 2 "
        "epochs; no augmentation. FedCS warms up for 6 rounds before, and searches with 128 "
        "images a client, lazily (`algorithm.lazy`)."
    )
    return f"""\
Glo. is the accuracy of the super-network on each client's test part, its BatchNorm statistics
re-estimated on the client's training part; Loc. that of the client's own sub-network with its own
statistics; both after the last round, over all test images, in percent. ±: sample standard
deviation over seeds. FedAvg trains the half-width network for everybody. Parameters (biases and
norms included) and operations (multiply-accumulates) are means over clients.{
        scaled if small else ""
    }"""


# --- one cell ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What the page needs of a finished cell."""

    one: Finished

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The records of training rounds with an evaluation, in order."""
        return [r for r in self.training if r.get("acc_global") is not None]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The records of training rounds."""
        return [r for r in self.one.metrics if r["phase"] == "train"]

    def final(self, key: str) -> float:
        """The last value of a metric, in percent; NaN where there is none."""
        value = self.evaluated[-1].get(key)
        return float("nan") if value is None else 100 * value

    @cached_property
    def megabytes(self) -> np.ndarray:
        """Megabytes sent, both ways, up to each evaluated round of the training."""
        sent = np.cumsum([r["bytes_up"] + r["bytes_down"] for r in self.training]) / 1e6
        first = self.training[0]["round"]
        return np.array([sent[r["round"] - first] for r in self.evaluated])

    @property
    def before(self) -> float:
        """Megabytes sent before the training: in warm-up and search."""
        rest = [r for r in self.one.metrics if r["phase"] != "train"]
        return sum(r["bytes_up"] + r["bytes_down"] for r in rest) / 1e6

    @cached_property
    def accuracy(self) -> np.ndarray:
        """acc_global of each evaluated round of the training, percent."""
        return 100 * np.array([r["acc_global"] for r in self.evaluated])

    def megabytes_to(self, target: float) -> float:
        """Megabytes until the accuracy first reaches the target; NaN if it never does."""
        reached = np.flatnonzero(self.accuracy >= target)
        return float(self.megabytes[reached[0]]) if len(reached) else float("nan")

    @cached_property
    def sizes(self) -> dict[int, tuple[str, float, float]]:
        """Of each client its tier, parameters and operations in the last round."""
        table = self.one.run.clients()
        last = max(table.column("round").to_pylist())
        rows = zip(
            *(table.column(n).to_pylist() for n in ("round", "client", "tier", "params", "macs")),
            strict=True,
        )
        return {c: (tier, params, macs) for r, c, tier, params, macs in rows if r == last}

    def mean_size(self, at: int) -> float:
        """The mean over clients of the parameters (1) or the operations (2)."""
        return statistics.fmean(float(size[at]) for size in self.sizes.values())

    @cached_property
    def found(self) -> dict[int, np.ndarray]:
        """The units of each group that a client found; clients that keep the whole have none."""
        return {
            client: np.array(report["units"])
            for client, report in reports(self.one.run.path).items()
            if "units" in report and self.sizes[client][0] != "high"
        }

    def distances(self) -> list[float]:
        """L2 distances between the networks of clients of one budget, in units."""
        pairs = combinations(sorted(self.found), 2)
        return [
            float(np.linalg.norm(self.found[a] - self.found[b]))
            for a, b in pairs
            if self.sizes[a][0] == self.sizes[b][0]
        ]

    def seconds(self, phase: str) -> float:
        """Seconds that a phase's clients took in all, one after the other."""
        table = self.one.run.clients()
        rounds = {r["round"] for r in self.one.metrics if r["phase"] == phase}
        rows = zip(*(table.column(n).to_pylist() for n in ("round", "seconds")), strict=True)
        return sum(seconds for round, seconds in rows if round in rounds)


def _cells(line: Line) -> list[Cell]:
    return [Cell(one) for one in line.finished]


def _values(line: Line, of: Callable[[Cell], float]) -> list[float]:
    return [of(cell) for cell in _cells(line)]


# --- the page ----------------------------------------------------------------------------------


def summary(tables: Sequence[Results]) -> str:
    """The order of the methods, in a line for each partition and fleet."""
    lines = []
    for results in tables:
        for fleet, rows in _by_fleet(results).items():
            title = f"{results.table.title}, {fleet.upper()}" if fleet else results.table.title
            words = ", ".join(f"{line.row.title} {_accuracies(line)}" for line in rows)
            lines.append(f"* {title}, Glo. / Loc.: {words}.")
    return "\n".join(lines)


def _accuracies(line: Line) -> str:
    return " / ".join(
        "–" if mean != mean else f"{mean:.1f}"
        for mean in (_mean_final(line, "acc_global"), _mean_final(line, "acc_own"))
    )


def _mean_final(line: Line, key: str) -> float:
    return statistics.fmean(_values(line, lambda cell: cell.final(key)))


def _by_fleet(results: Results) -> dict[str, list[Line]]:
    """The rows of each fleet that has any of its own, and FedAvg's, which is of both."""
    both = [line for line in results.lines if line.row.name == "fedavg"]
    found: dict[str, list[Line]] = {}
    for fleet in FLEETS:
        names = (f"feduniform-{fleet}", f"fedcs-{fleet}")
        if own := [line for name in names if (line := results.line(name)) is not None]:
            found[fleet] = both + own
    return found or ({"": both} if both else {})


def section(results: Results, folder: Path, stem: str) -> str:
    """A partition's part of the page; draws its figure into `folder`."""

    def final(key: str) -> Callable[[Line], str]:
        return lambda line: measured.plus_minus(_values(line, lambda cell: cell.final(key)), 1)

    def size(at: int, unit: float, digits: int) -> Callable[[Line], str]:
        return lambda line: measured.plus_minus(
            [value / unit for value in _values(line, lambda cell: cell.mean_size(at))], digits
        )

    accuracy: list[measured.Column] = [
        ("Glo., paper", lambda line: line.row.paper.get("acc_global", "–")),
        ("Glo.", final("acc_global")),
        ("Loc., paper", lambda line: line.row.paper.get("acc_own", "–")),
        ("Loc.", final("acc_own")),
        ("Loc., worst tenth", final("acc_own_worst10")),
    ]
    target = _target(results)
    costs: list[measured.Column] = [
        ("parameters, thousand", size(1, 1e3, 1)),
        ("operations, million", size(2, 1e6, 3)),
        ("MB, training", lambda line: _megabytes(line, lambda cell: cell.megabytes[-1])),
        (f"MB to {target:.0f} %", lambda line: _megabytes(line, lambda c: c.megabytes_to(target))),
        ("MB before", lambda line: _megabytes(line, lambda cell: cell.before)),
        ("warm-up, s", lambda line: _seconds(line, "warm-up")),
        ("search, s", lambda line: _seconds(line, "search")),
    ]
    name = f"{stem}-{results.table.name}-bytes.png"
    _bytes_figure(results, folder / name)
    parts = [
        f"## {results.table.title}",
        measured.table_text(results, accuracy),
        measured.table_text(results, costs),
        "Megabytes go both ways together, to the highest whole percent that every row reaches in "
        "every seed. Seconds are those of all clients one after the other on one core.",
        f"![Accuracy against the megabytes sent in training, mean over seeds]({name})",
    ]
    return "\n\n".join(parts)


def _megabytes(line: Line, of: Callable[[Cell], float]) -> str:
    values = _values(line, of)
    return "–" if any(v != v for v in values) else measured.plus_minus(values, 1)


def _seconds(line: Line, phase: str) -> str:
    values = _values(line, lambda cell: cell.seconds(phase))
    return measured.plus_minus(values, 0) if any(values) else "–"


def _target(results: Results) -> float:
    """The highest whole percent that every cell reaches."""
    best = [float(cell.accuracy.max()) for line in results.lines for cell in _cells(line)]
    return float(np.floor(min(best)))


def _bytes_figure(results: Results, path: Path) -> None:
    fleets = _by_fleet(results)
    figure, panels = figures.panelled(len(fleets), 2, (3.8, 3.0))
    styles = dict(zip(METHODS, ("-", "--", "-."), strict=True))
    for axes, (fleet, rows) in zip(panels, fleets.items(), strict=True):
        for line in rows:
            cells = _cells(line)
            axes.plot(
                np.mean([cell.megabytes for cell in cells], axis=0),
                np.mean([cell.accuracy for cell in cells], axis=0),
                styles[line.row.name.partition("-")[0]],
                label=line.row.title,
            )
        axes.set_title(fleet.upper(), fontsize=9)
        axes.legend(fontsize=7)
    figure.supxlabel("megabytes sent in training, both ways", fontsize=9)
    figure.supylabel("Glo., percent", fontsize=9)
    figures.save(figure, path)


def comparison(tables: Sequence[Results], folder: Path, stem: str) -> str:
    """What the searched networks look like: the paper's Figures 3 and 5."""
    lines = {
        f"{results.table.title}, {fleet.upper()}": line
        for results in tables
        for fleet in FLEETS
        if (line := results.line(f"fedcs-{fleet}")) is not None
    }
    if not lines:
        return ""
    rows = [[title, *_distance_words(line)] for title, line in lines.items()]
    parts = [
        "## The searched networks",
        "Distance between the channel numbers of two clients of one budget, L2, over all such "
        "pairs: the paper's Fig. 3 finds larger ones under non-IID data.",
        measured.markdown(("", "mean ± sd over pairs", "pairs", "seeds"), rows),
        "Parameters and operations by tier, uniform beside searched: the paper's Fig. 5 finds "
        "fewer parameters at nearly equal operations.",
        measured.markdown(
            ("", "tier", "operations, uniform", "searched", "parameters, uniform", "searched"),
            [row for results in tables for fleet in FLEETS for row in _tiers(results, fleet)],
        ),
    ]
    units = tables[0].units
    shares = {title: _shares(line, units) for title, line in lines.items()}
    if shares := {title: groups for title, groups in shares.items() if groups}:
        name = f"{stem}-units.png"
        _units_figure(shares, folder / name)
        parts.append(f"![Share of the channels that clients keep, layer by layer]({name})")
    return "\n\n".join(parts)


def _distance_words(line: Line) -> list[str]:
    found = [d for cell in _cells(line) for d in cell.distances()]
    return [measured.plus_minus(found, 1), str(len(found)), str(len(line.finished))]


def _tiers(results: Results, fleet: str) -> list[list[str]]:
    uniform, searched = (results.line(f"{method}-{fleet}") for method in METHODS[1:])
    if uniform is None or searched is None:
        return []
    rows = []
    for tier in ("medium", "low"):
        words = [
            f"{statistics.fmean(_of_tier(line, tier, at)) / unit:,.1f} {letter}"
            for at, unit, letter in ((2, 1e3, "k"), (1, 1e3, "k"))
            for line in (uniform, searched)
        ]
        rows.append([f"{results.table.title}, {fleet.upper()}", tier, *words])
    return rows


def _of_tier(line: Line, tier: str, at: int) -> list[float]:
    return [
        float(size[at]) for cell in _cells(line) for size in cell.sizes.values() if size[0] == tier
    ]


def _shares(line: Line, units: Mapping[str, int]) -> dict[str, list[float]]:
    sizes = np.array(list(units.values()))
    found = [kept / sizes for cell in _cells(line) for kept in cell.found.values()]
    return {group: [float(share[i]) for share in found] for i, group in enumerate(units) if found}


def _units_figure(shares: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    figure, panels = figures.panelled(len(shares), 2, (4.6, 2.4))
    for axes, (title, groups) in zip(panels, shares.items(), strict=True):
        places = np.arange(len(groups))
        axes.boxplot(
            list(groups.values()),
            positions=list(places),
            medianprops={"color": figures.ORANGE},
            flierprops={"markersize": 2},
        )
        axes.set_xticks(places[::3], [str(place + 1) for place in places[::3]], fontsize=7)
        axes.set_ylim(0, 1.05)
        axes.set_title(title, fontsize=8)
    figure.supxlabel("unit group, from the stem to the last stage", fontsize=9)
    figure.supylabel("share of channels kept", fontsize=9)
    figures.save(figure, path)
