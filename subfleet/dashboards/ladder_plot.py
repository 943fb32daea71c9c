"""The picture of a stress ladder: seconds a round and memory over registered clients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subfleet.dashboards.plots import COLOURS, MARKERS


def ladder_plot(rungs: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Draws the rungs of a `stress.json` into a PNG file, a curve for each cohort.

    On the left seconds a round (whole lines) and what of them is overhead (dashed), on the
    right the peak of memory in all; a rung that failed is a red cross at the bottom.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures alive and would choose a window system.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    for number, cohort in enumerate(sorted({rung["cohort"] for rung in rungs})):
        done = [r for r in rungs if r["cohort"] == cohort and r["status"] == "ok"]
        clients = [rung["clients"] for rung in done]
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
        }
        label = f"cohort {cohort:,}"
        if not done:
            continue
        times.plot(clients, [rung["round_s"] for rung in done], label=label, **look)
        times.plot(
            clients,
            [rung["overhead_s"] for rung in done],
            label=f"{label}, overhead",
            linestyle="--",
            **look,
        )
        memory.plot(clients, [rung["peaks"]["all"] / 1e9 for rung in done], label=label, **look)
    failed = [rung["clients"] for rung in rungs if rung["status"] == "failed"]
    counts = [rung["clients"] for rung in rungs]
    for axes, words in ((times, "seconds a round"), (memory, "memory in all, GB (peak)")):
        axes.set_xscale("log")
        axes.set_xlim(0.5 * min(counts), 2 * max(counts))
        axes.set_xlabel("registered clients")
        axes.set_ylabel(words)
        if axes.lines:
            highest = max(value for line in axes.lines for value in line.get_ydata())
            axes.set_ylim(0, 1.15 * highest)
        if failed:
            low = axes.get_xaxis_transform()
            at = [0.02] * len(failed)
            axes.plot(failed, at, "x", color="#B00020", transform=low, label="failed")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": "subfleet"})
    return path
