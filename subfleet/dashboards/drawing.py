"""Figures as SVG in one look: readable at the width of a phone, on paper, without colours."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subfleet.dashboards.plots import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++")
WIDTH, HEIGHT = 4.4, 2.6  # inches; a phone shows such a figure at about its own size
LINE = 0.17  # inches of a line of a legend
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and sharp at any size
    "svg.hashsalt": "subfleet",  # the same figure gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """A figure of a page and the data behind it.

    `alt` says in words what is to be seen. `rows` are what the figure draws, one dict a point.
    """

    name: str
    title: str
    alt: str
    svg: bytes
    rows: Sequence[Mapping[str, Any]]

    @property
    def src(self) -> str:
        """The figure as a data address."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"

    @property
    def csv(self) -> str:
        """The data behind it, a CSV file as a data address."""
        return csv_address(self.rows)


def csv_address(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a CSV file that is a data address."""
    return f"data:text/csv;base64,{base64.b64encode(csv_bytes(rows)).decode()}"


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    r"""Rows as CSV, UTF-8; columns in the order in which they first come.

    >>> csv_bytes([{"a": 1}, {"a": 2, "b": "x,y"}])
    b'a,b\r\n1,\r\n2,"x,y"\r\n'
    """
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text)
    writer.writerow(map(_inert, keys))
    writer.writerows([_inert(row.get(key, "")) for key in keys] for row in rows)
    return text.getvalue().encode(errors="replace")


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a name may be anything."""
    return (
        f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
    )


class Drawing:
    """A figure being drawn; `axes` is its only pair of axes.

    >>> with Drawing() as drawing:
    ...     _ = drawing.axes.plot([0, 1], [0, 1])
    >>> drawing.svg.startswith(b"<?xml")
    True
    """

    figure: Figure
    axes: Axes

    def __init__(self, height: float = HEIGHT) -> None:
        self._height = height
        self.svg = b""

    def __enter__(self) -> Drawing:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._context = mpl.rc_context(_SETTINGS)
        self._context.__enter__()
        # Not pyplot: it keeps figures alive and would choose a window system.
        self.figure = Figure(figsize=(WIDTH, self._height), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes = self.figure.add_subplot()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                file = io.BytesIO()
                self.figure.savefig(file, format="svg", metadata={"Date": None})
                self.svg = file.getvalue()
        finally:
            self._context.__exit__(kind, *rest)

    def legend(self, *, columns: int = 1) -> None:
        """A legend below the axes, where it hides no curve, if anything is labelled."""
        handles, labels = self.axes.get_legend_handles_labels()
        if labels:
            lines = -(-len(labels) // columns)
            self.figure.set_size_inches(WIDTH, self._height + LINE * lines)
            self.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def large_numbers(axes: Axes) -> None:
    """Ticks of the x axis as 20 M, not 2.0 under a lost 1e7."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())


def look(number: int, points: int) -> dict[str, Any]:
    """Colour, line and a few markers of the `number`-th curve, which has so many points."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "markevery": max(1, points // 6),
    }


def plain(text: object, most: int = 44) -> str:
    r"""A label as it is, cut if it is long: matplotlib reads formulas, and hides leading `_`.

    >>> plain("a$b"), plain("_x") == "\u200b_x", plain("x" * 60)[-1]
    ('a\\$b', True, '…')
    """
    words = str(text).replace("\n", " ")
    words = words if len(words) <= most else words[: most - 1] + "…"
    words = words.replace("\\", "\\\\").replace("$", "\\$")
    return f"\u200b{words}" if words.startswith("_") else words
