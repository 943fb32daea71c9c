"""Heat maps as small PNG files, drawn in a millisecond: no plotting library."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np

# Pixels of a row, however many values it has: with names beside it, what TensorBoard shows
# without shrinking it.
WIDTH = 256
_ROW, _GAP, _MARGIN, _LINE = 14, 2, 8, 20  # heights in pixels

# A pixel is the number of a colour: first the scale, then grey, then from paper to ink.
# One hue from light to dark can be told apart without seeing colours, and in print.
_STOPS = ((247, 251, 255), (158, 202, 225), (66, 146, 198), (8, 48, 107))
_NOTHING = (216, 209, 199)
_PAPER, _INK = (255, 255, 255), (34, 34, 34)
_DARKEST, _GREY, _BLANK = 199, 200, 201


def heat_map(rows: Mapping[str, np.ndarray], *, title: str, first: str, last: str) -> bytes:
    """A PNG file with one row for each name, its values in [0, 1] along it, light to dark.

    Rows may differ in length: each is drawn over the same width, and where it has more
    values than pixels, their means. NaN is grey. `first` and `last` are written below the
    two ends of the axis.
    """
    from PIL import Image

    left = _MARGIN + max(_label(name).shape[1] for name in rows) + _MARGIN
    top = _MARGIN + _LINE
    height = top + len(rows) * (_ROW + _GAP) + _LINE + _MARGIN
    picture = np.full((height, left + WIDTH + _MARGIN), _BLANK, np.uint8)
    _write(picture, left, _MARGIN + 5, title)
    for i, (name, values) in enumerate(rows.items()):
        at = top + i * (_ROW + _GAP)
        picture[at : at + _ROW, left : left + WIDTH] = _shades(stretched(values, WIDTH))
        _write(picture, left - _MARGIN, at + _ROW // 2, name, to_the_left=True)
    below, scale = height - _MARGIN - _LINE // 2, left + WIDTH // 2 - 30
    picture[below - 5 : below + 5, scale : scale + 60] = _shades(np.linspace(0, 1, 60))
    _write(picture, left, below, first)
    _write(picture, scale - 4, below, "0", to_the_left=True)
    _write(picture, scale + 64, below, "1")
    _write(picture, left + WIDTH, below, last, to_the_left=True)
    image = Image.fromarray(picture, "P")
    image.putpalette(_palette())
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)  # flat areas; more would cost and save little
    return file.getvalue()


def stretched(values: np.ndarray, width: int) -> np.ndarray:
    """Values over so many pixels: repeated, or the means of those that share one.

    >>> stretched(np.array([0.0, 1.0]), 4).tolist()
    [0.0, 0.0, 1.0, 1.0]
    >>> stretched(np.array([0.0, 1.0, np.nan, 0.5, np.nan, np.nan]), 3).tolist()
    [0.5, 0.5, nan]
    """
    values = np.asarray(values, float)
    starts = np.arange(width) * len(values) // width
    if len(values) <= width:
        return values[starts]
    known = ~np.isnan(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return np.divide(sums, counts, out=np.full(width, np.nan), where=counts > 0)


def _shades(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    shades = np.full(len(values), _GREY, np.uint8)
    shades[known] = np.round(np.clip(values[known], 0.0, 1.0) * _DARKEST)
    return shades


def _write(
    picture: np.ndarray, x: int, middle: int, text: str, *, to_the_left: bool = False
) -> None:
    """Writes over the picture what fits: from x on, or so that it ends there."""
    label = _label(text)
    height, width = label.shape
    at = max(0, x - width) if to_the_left else x
    place = picture[middle - height // 2 : middle + height // 2, at : at + width]
    place[:] = label[:, : place.shape[1]]


@lru_cache(maxsize=256)
def _label(text: str) -> np.ndarray:
    """A text as colours of the palette, [16, its width]; drawing letters is what takes time."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (max(1, int(_font().getlength(text)) + 1), 16))
    ImageDraw.Draw(image).text((0, 8), text, fill=255, font=_font(), anchor="lm")
    return (_BLANK + np.asarray(image, np.uint16) * (255 - _BLANK) // 255).astype(np.uint8)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(11)


@cache
def _palette() -> bytes:
    scale, ink = _blend(_STOPS, _DARKEST + 1), _blend((_PAPER, _INK), 256 - _BLANK)
    return np.vstack([scale, _NOTHING, ink]).round().astype(np.uint8).tobytes()


def _blend(stops: tuple[tuple[int, int, int], ...], steps: int) -> np.ndarray:
    """Colours from the first stop to the last, [steps, 3]."""
    at = np.linspace(0, len(stops) - 1, steps)
    channels = [np.interp(at, range(len(stops)), values) for values in zip(*stops, strict=True)]
    return np.stack(channels, axis=1)
