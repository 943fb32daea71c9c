"""How a writer holds the pen: from styles and distance fields to images.

An image is drawn backwards: each pixel is mapped to a place in the glyph's
distance field, and the distance found there is compared with the pen's width.
Only sums, products and roots are used, so that every CPU draws the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from subfleet.core.seeds import generator
from subfleet.datasets.draws import nearly_normal
from subfleet.datasets.glyphs import FAR, GRID, REACH, distance_fields

SIDE = 28
PEN_LANES = 40  # uniforms that `writer_pens` takes for each writer
ROW_LANES = 12  # uniforms that `draw_images` takes for each row
_CHUNK = 64  # images drawn together: their arrays stay in the second-level cache
_NOISE = 1 << 16


class Pen(NamedTuple):
    """Styles of several writers, each float64 [writers]."""

    height_px: np.ndarray  # of a capital letter
    aspect: np.ndarray  # width over height, 1 as the strokes are defined
    slant: np.ndarray  # x moved for each y, positive leans right
    turn: np.ndarray  # rotation, as a tangent
    bow_x: np.ndarray  # bends upright lines: x moved for each y squared
    bow_y: np.ndarray  # bends level lines
    half_px: np.ndarray  # half the width of the line
    soft_px: np.ndarray  # how wide the line's edge fades
    ink: np.ndarray  # 255 is black
    grain: np.ndarray  # standard deviation of the noise in the ink and on the paper
    unsteady: np.ndarray  # how much a writer's samples differ from each other


def writer_pens(draw: np.ndarray, variation: float) -> Pen:
    """The styles of writers from uniforms [writers, PEN_LANES]."""

    def normal(number: int) -> np.ndarray:
        return nearly_normal(draw[:, 4 * number : 4 * number + 4]) * variation

    def between(number: int, low: float, high: float) -> np.ndarray:
        middle, half = (low + high) / 2, (high - low) / 2
        return middle + half * min(variation, 1.0) * (2 * draw[:, number] - 1)

    return Pen(
        height_px=17.5 + 1.5 * np.clip(normal(0), -2.5, 2),
        aspect=1 + 0.13 * np.clip(normal(1), -3, 3),
        slant=0.1 + 0.22 * normal(2),
        turn=0.1 * normal(3),
        bow_x=0.16 * normal(4),
        bow_y=0.16 * normal(5),
        half_px=between(24, 0.7, 1.8),
        soft_px=between(28, 0.8, 1.6),
        ink=between(32, 150, 255),
        grain=between(36, 0, 24),
        unsteady=between(37, 0.5, 1.5),
    )


def draw_images(
    field: np.ndarray, pens: Pen, owner: np.ndarray, draw: np.ndarray, variation: float
) -> np.ndarray:
    """Images uint8 [rows, SIDE, SIDE].

    field: where each row's distance field starts in the flat table, int64
    [rows]; owner: each row's writer, an index into `pens`; draw: uniforms
    [rows, ROW_LANES].
    """
    terms = _pixel_terms(pens, owner, draw, variation)
    rows = len(owner)
    half, soft = pens.half_px[owner], pens.soft_px[owner]
    half = half * (1 + 0.12 * (2 * draw[:, 10] - 1) * variation)
    unit_px = pens.height_px[owner] * (FAR / 255)
    ink = pens.ink[owner]
    # Ink falls linearly over `soft` pixels around the line's edge.
    slope = (-unit_px / soft * ink).astype(np.float32)
    level = ((half / soft + 0.5) * ink).astype(np.float32)
    ceiling = ink.astype(np.float32)
    grain = pens.grain[owner].astype(np.float32)
    place = (draw[:, 11] * _NOISE).astype(np.int64)
    flat, noise = distance_fields().reshape(-1), draw_noise()
    images = np.empty((rows, SIDE * SIDE), dtype=np.uint8)
    for start in range(0, rows, _CHUNK):
        s = slice(start, start + _CHUNK)
        column = terms[0][s, None, :] + terms[1][s, :, None]
        line = terms[2][s, None, :] + terms[3][s, :, None]
        # Beyond the field there is only paper, as at its border.
        np.clip(column, 0, GRID - 1, out=column)
        np.clip(line, 0, GRID - 1, out=line)
        cell = line.astype(np.int32)
        cell *= GRID
        cell += column.astype(np.int32)
        cell += field[s, None, None].astype(np.int32)
        dark = flat[cell.reshape(len(cell), -1)].astype(np.float32)
        dark *= slope[s, None]
        dark += level[s, None]
        np.clip(dark, 0, ceiling[s, None], out=dark)
        speck = noise[place[s]] * grain[s, None]
        dark += speck
        np.clip(dark, 0, 255, out=dark)
        np.subtract(255.5, dark, out=dark)
        images[s] = dark
    return images.reshape(rows, SIDE, SIDE)


def _pixel_terms(
    pens: Pen, owner: np.ndarray, draw: np.ndarray, variation: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The field's column and line at pixel (r, c) as sums of a term of c and a term of r.

    Returns (column of c, column of r, line of c, line of r), float32 [rows, SIDE]
    each, with field column = first + second, field line = third + fourth.
    """
    shake = (2 * draw[:, :8] - 1) * (variation * pens.unsteady[owner])[:, None]
    height = pens.height_px[owner] * (1 + 0.1 * shake[:, 0])
    width = height * pens.aspect[owner] * (1 + 0.1 * shake[:, 1])
    slant = pens.slant[owner] + 0.12 * shake[:, 2]
    turn = pens.turn[owner] + 0.1 * shake[:, 3]
    bow_x = pens.bow_x[owner] + 0.1 * shake[:, 4]
    bow_y = pens.bow_y[owner] + 0.1 * shake[:, 5]
    pixel = np.arange(SIDE) - (SIDE - 1) / 2
    c = pixel - 1.6 * shake[:, 6:7]
    r = pixel - 1.6 * shake[:, 7:8]
    cells = GRID / (2 * REACH)  # cells in one unit
    upright = (r / height[:, None]) ** 2 - 0.1
    level = (c / width[:, None]) ** 2 - 0.1
    column_of_c = c * (cells / width)[:, None] + GRID / 2
    column_of_r = ((turn + slant) / width)[:, None] * r * cells + bow_x[:, None] * upright * cells
    line_of_c = (-turn / height)[:, None] * c * cells + bow_y[:, None] * level * cells
    line_of_r = r * (cells / height)[:, None] + GRID / 2
    terms = column_of_c, column_of_r, line_of_c, line_of_r
    return tuple(t.astype(np.float32) for t in terms)  # type: ignore[return-value]


@functools.cache
def draw_noise() -> np.ndarray:
    """Windows of noise of variance 1, float32 [_NOISE, SIDE * SIDE], a view of one table."""
    table = generator(0, "paper grain").random((_NOISE + SIDE * SIDE - 1, 4))
    noise = nearly_normal(table).astype(np.float32)
    return np.lib.stride_tricks.sliding_window_view(noise, SIDE * SIDE)
