"""Pictures of a table's cells as small PNG files, readable without telling colours apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from correlation import correlation
from measured import Results

from subfleet.dashboards.plots import accuracy_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#0072B2"  # of Okabe and Ito's palette
ORANGE = "#D55E00"


def curves(results: Results, key: str, path: Path) -> Path:
    """A curve for each row, mean over its seeds."""
    runs = {}
    for line in results.lines:
        seeds = [one.metrics for one in line.finished]
        runs[line.row.title] = [
            {"round": records[0]["round"], key: _mean([record.get(key) for record in records])}
            for records in zip(*seeds, strict=True)
        ]
    return accuracy_plot(runs, path, key=key, title=results.table.title)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as a small PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, format="png", metadata={"Software": "subfleet"})
    return path


def panelled(number: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Axes]]:
    """A figure of so many panels, so many side by side, each of `size` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-number // columns)
    # Not pyplot: it keeps figures alive and would choose a window system.
    figure = Figure(figsize=(size[0] * min(number, columns), size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(number, columns), squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for spare in panels[number:]:
        spare.remove()
    return figure, panels[:number]


def local_histograms(results: Results, path: Path) -> Path | None:
    """How clients' own accuracies are spread, with a smoothed density; a panel each row.

    None, and no figure, where no row has clients.
    """
    lines = [line for line in results.lines if not line.finished[0].pooled]
    if not lines:
        return None
    figure, panels = panelled(len(lines), 4, (2.4, 2.0))
    for axes, line in zip(panels, lines, strict=True):
        own = 100 * np.concatenate([one.clients.acc_local for one in line.finished])
        axes.hist(own, bins=list(range(0, 101, 5)), density=True, color=BLUE, alpha=0.5)
        grid = np.linspace(0, 100, 200)
        axes.plot(grid, density(own, grid), color="#000000", linewidth=1)
        axes.axvline(float(own.mean()), color=ORANGE, linestyle="--")
        axes.set_title(f"{line.row.title}: {own.mean():.1f}", fontsize=9)
    figure.supxlabel("a client's own accuracy, percent; dashed: mean", fontsize=9)
    return save(figure, path)


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density at the points of `grid`, bandwidth by Silverman's rule."""
    width = max(1.06 * float(values.std()) * len(values) ** -0.2, 1e-3)
    distance = (grid[:, None] - values[None]) / width
    return np.exp(-(distance**2) / 2).mean(axis=1) / (width * np.sqrt(2 * np.pi))


class Points(NamedTuple):
    """Of each client two numbers and, for its colour, a third; arrays [clients]."""

    x: np.ndarray
    y: np.ndarray
    colour: np.ndarray


def scatter(panels: Mapping[str, Points], path: Path, *, x: str, y: str, colour: str) -> Path:
    """Points, a panel each title, with the straight line of least squares and its correlation."""
    figure, all_axes = panelled(len(panels), 3, (3.4, 2.8))
    every = np.concatenate([points.colour for points in panels.values()])
    drawn = None
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        r = correlation(points.x, points.y)
        # Cividis looks the same to those who do not tell red from green.
        drawn = axes.scatter(
            *(points.x, points.y, 14, points.colour),
            **{"cmap": "cividis", "vmin": every.min(), "vmax": every.max()},
        )
        if r == r:
            ends = np.array([points.x.min(), points.x.max()])
            line = np.polyval(np.polyfit(points.x, points.y, 1), ends)
            axes.plot(ends, line, color=ORANGE, linestyle="--")
        axes.set_title(f"{title}: r = {r:.2f}", fontsize=9)
    figure.colorbar(drawn, ax=all_axes, label=colour)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return save(figure, path)


def keep_ratios(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> Path:
    """Of each unit group how much of it clients keep: boxes over clients, a panel each title."""
    figure, all_axes = panelled(len(panels), 3, (3.4, 2.8))
    for axes, (title, groups) in zip(all_axes, panels.items(), strict=True):
        style = {"color": BLUE}
        axes.boxplot(
            list(groups.values()),
            tick_labels=list(groups),
            medianprops={"color": ORANGE},
            boxprops=style,
            whiskerprops=style,
            capprops=style,
            flierprops={"markersize": 3},
        )
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_title(title, fontsize=9)
    figure.supylabel("share of units kept", fontsize=9)
    return save(figure, path)
