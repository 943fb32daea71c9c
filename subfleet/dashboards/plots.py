"""Pictures of runs, as PNG files, readable without telling colours apart."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subfleet.core.errors import InputError

# Okabe and Ito's palette, less its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def curve(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(rounds, values) of one key, without the rounds that lack it.

    >>> curve([{"round": 1, "a": 0.5}, {"round": 2}, {"round": 3, "a": None}], "a")
    ([1], [0.5])
    """
    points = [(r["round"], r[key]) for r in records if r.get(key) is not None]
    return [round for round, _ in points], [value for _, value in points]


def accuracy_plot(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike,
    *,
    key: str = "acc_global",
    title: str | None = None,
) -> Path:
    """Draw one curve a run, by label, of `key` over rounds into a PNG file.

    Each run has a colour, a line style and a marker of its own. Raises
    `InputError` when no run has the key.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {label: curve(records, key) for label, records in runs.items()}
    if not any(rounds for rounds, _ in curves.values()):
        raise InputError(f"plot of {key}: none of {len(runs)} runs has it; give another key")
    # Not pyplot: it keeps figures alive and would choose a window system.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, (rounds, values)) in enumerate(curves.items()):
        axes.plot(
            rounds,
            values,
            label=label,
            color=COLOURS[number % len(COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markevery=max(1, len(rounds) // 8),
            markersize=5,
        )
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy" if key.startswith("acc") else key)
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": "subfleet"})
    return path
