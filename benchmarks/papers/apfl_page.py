"""What the page of APFL's tables says: computed from the cells, in tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import measured
import numpy as np
from apfl_cells import Cell
from apfl_numbers import SMALL, SMALL_FEDCS, TRAINING, WARM_UP
from measured import Line, Results

METHODS = ("fedavg", "feduniform", "fedcs")
FLEETS = ("high", "low")


def explained(small: bool) -> str:
    """What the columns mean, and what is smaller than in the paper."""
    scaled = (
        " Scaled down: the samples of CIFAR-10 that were given, 10 clients, MobileNetV2 at "
        f"{SMALL['model.width']:g} of the width with channels in multiples of "
        f"{SMALL['model.divisor']} and a stem of stride {SMALL['model.stem_stride']}, "
        f"{TRAINING} rounds of {SMALL['train.epochs']} epochs, batches of "
        f"{SMALL['train.batch_size']}, rate {SMALL['train.lr']:g}; no augmentation. FedCS warms up "
        f"for {WARM_UP} rounds before, and searches with {SMALL_FEDCS['algorithm.samples']} images "
        "a client, lazily (`algorithm.lazy`)."
    )
    return f"""\
Glo. is the accuracy of the super-network on each client's test part, its BatchNorm statistics
re-estimated on the client's training part; Loc. that of the client's own sub-network with its own
statistics; both after the last round, over the test parts of all clients, in percent. ±: sample
standard deviation over seeds. FedAvg trains the half-width network for everybody. Parameters
(biases and norms included) and operations (multiply-accumulates) are means over clients.{
        scaled if small else ""
    }"""


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


def to_json(tables: Sequence[Results]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All figures by table and row, one entry a seed."""
    return {
        results.table.name: {
            line.row.name: [cell.to_json() for cell in _cells(line)] for line in results.lines
        }
        for results in tables
    }


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
    ]
    times: list[measured.Column] = [
        ("loss after warm-up", lambda line: _known(line, lambda cell: cell.warm, 2)),
        ("warm-up, s", lambda line: _seconds(line, "warm-up", np.sum)),
        ("search, s", lambda line: _seconds(line, "search", np.sum)),
        ("search, slowest client, s", lambda line: _seconds(line, "search", np.max)),
    ]
    searched = [line for line in results.lines if line.row.name.startswith("fedcs")]
    name = f"{stem}-{results.table.name}-bytes.png"
    _bytes_figure(results, folder / name)
    parts = [
        f"## {results.table.title}",
        measured.table_text(results, accuracy),
        measured.table_text(results, costs),
        "Megabytes go both ways together, to the highest whole percent that every row reaches in "
        "every seed.",
        measured.table_text(replace(results, lines=searched), times) if searched else "",
        "Seconds are those of all clients one after the other on one core.",
        f"![Accuracy against the megabytes sent in training, mean over seeds]({name})",
    ]
    return "\n\n".join(part for part in parts if part)


def _known(line: Line, of: Callable[[Cell], float], digits: int) -> str:
    values = _values(line, of)
    return "–" if any(v != v for v in values) else measured.plus_minus(values, digits)


def _megabytes(line: Line, of: Callable[[Cell], float]) -> str:
    return _known(line, of, 1)


def _seconds(line: Line, phase: str, of: Callable[[np.ndarray], float]) -> str:
    found = [cell.seconds(phase) for cell in _cells(line)]
    return measured.plus_minus([float(of(s)) for s in found], 0) if all(map(len, found)) else "–"


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
    distances = {title: _distances(line) for title, line in lines.items()}
    if distances := {title: found for title, found in distances.items() if found}:
        name = f"{stem}-distances.png"
        _distances_figure(distances, folder / name)
        parts.insert(3, f"![Distances between clients of one budget]({name})")
    if sizes := _sizes(tables):
        name = f"{stem}-sizes.png"
        _sizes_figure(sizes, folder / name)
        parts.append(f"![Parameters against operations, uniform and searched]({name})")
    units = tables[0].units
    shares = {title: _shares(line, units) for title, line in lines.items()}
    if shares := {title: groups for title, groups in shares.items() if groups}:
        name = f"{stem}-units.png"
        _units_figure(shares, folder / name)
        parts.append(f"![Share of the channels that clients keep, layer by layer]({name})")
    return "\n\n".join(parts)


def _distances(line: Line) -> list[float]:
    return [d for cell in _cells(line) for d in cell.distances()]


def _distances_figure(panels: Mapping[str, Sequence[float]], path: Path) -> None:
    figure, (axes,) = figures.panelled(1, 1, (5.6, 2.8))
    axes.boxplot(
        list(panels.values()),
        orientation="horizontal",
        tick_labels=list(panels),
        medianprops={"color": figures.ORANGE},
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("L2 distance between channel numbers, clients of one budget", fontsize=8)
    figures.save(figure, path)


def _sizes(tables: Sequence[Results]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Of each partition and fleet: (operations, parameters) of clients, by method."""
    found = {}
    for results in tables:
        for fleet, lines in _by_fleet(results).items():
            own = {
                line.row.title: [
                    (float(macs), float(params))
                    for cell in _cells(line)
                    for tier, params, macs in cell.sizes.values()
                    if tier != "high"
                ]
                for line in lines
                if line.row.name != "fedavg"
            }
            if len(own) > 1 and all(own.values()):
                found[f"{results.table.title}, {fleet.upper()}"] = own
    return found


def _sizes_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path
) -> None:
    figure, all_axes = figures.panelled(len(panels), 2, (3.8, 2.6))
    for axes, (title, methods) in zip(all_axes, panels.items(), strict=True):
        for (method, points), marker in zip(methods.items(), ("s", "."), strict=False):
            macs, params = np.array(points).T
            axes.plot(macs / 1e6, params / 1e3, marker, label=method)
        axes.set_title(title, fontsize=8)
        axes.legend(fontsize=7)
    figure.supxlabel("operations of a sample, million", fontsize=9)
    figure.supylabel("parameters, thousand", fontsize=9)
    figures.save(figure, path)


def _distance_words(line: Line) -> list[str]:
    found = _distances(line)
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
