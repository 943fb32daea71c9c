"""A synthetic twin of CelebA: drawn faces of people who smile more or less often.

A person's skin, hair, background, proportions and way of smiling are hashed
from (seed, person), a picture's light, place and expression from (seed, person,
row). The mouth's corners decide the label: 1 where they are up, 0 down.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from subfleet.core.scaling import SIGNED
from subfleet.core.seeds import generator
from subfleet.datasets.drawn import Drawn, Rows
from subfleet.datasets.draws import uniforms
from subfleet.datasets.federation import checked_number

_PERSON_LANES = 28
_ROW_LANES = 12
_CHUNK_PIXELS = 1 << 17  # pictures drawn together: their arrays stay in the second-level cache
_NOISE = 1 << 15
_BACKGROUND, _HAIR, _SKIN, _SHADE, _WHITE, _IRIS, _LIPS, _TEETH, _PARTS = range(9)


class SyntheticCelebA(Drawn):
    """`clients` people's pictures, uint8 [3, size, size], labelled 1 smiling, 0 not.

    The defaults are ADDS's Table 1 (its samples over its clients, as its mean
    contradicts them). skew: how far people differ in how often they smile, 0
    not at all, 1 as a flat Dirichlet draw.

    >>> data = SyntheticCelebA(size=32)
    >>> block = data.block(np.array([7, 3]), "test")
    >>> block.x.shape[1:], block.x.dtype == np.uint8, len(block.offsets)
    ((3, 32, 32), True, 3)
    """

    def __init__(
        self,
        clients: int = 1213,
        seed: int = 0,
        *,
        size: int = 112,
        mean_samples: float = 39.5,
        sd_samples: float = 11.0,
        skew: float = 1.0,
    ) -> None:
        checked_number("size", size, 16, 512, whole=True)
        checked_number("skew", skew, 0, 4)
        options = {"size": size, "mean_samples": mean_samples}
        options |= {"sd_samples": sd_samples, "skew": skew}
        super().__init__(
            "synthetic_celeba",
            clients,
            seed,
            options,
            num_classes=2,
            input_shape=(3, size, size),
            scale=SIGNED,
        )

    def _labels(self, rows: Rows) -> np.ndarray:
        return self._binary_labels(rows, self._shares(rows.ids))

    def _draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        labels = self._labels(rows)
        person = uniforms(self._key("people"), rows.ids, _PERSON_LANES)
        row = uniforms(self._key("pictures"), rows.counters, _ROW_LANES)
        size = self.input_shape[1]
        pictures = np.empty((len(labels), 3, size, size), dtype=np.uint8)
        step = max(1, _CHUNK_PIXELS // size**2)
        for start in range(0, len(labels), step):
            s = slice(start, start + step)
            who = person[rows.owner[s]]
            face = _face(who, row[s], labels[s], size)
            _paint(_parts(face), _colours(who), row[s], pictures[s])
        return pictures, labels


class _Face(NamedTuple):
    """Shapes in units of half a face: across (folded at the middle), down, and measures."""

    across: np.ndarray  # [rows, 1, size], from the middle outwards
    down: np.ndarray  # [rows, size, 1]
    hair: np.ndarray  # how far hair reaches down, each [rows, 1, 1] from here on
    fringe: np.ndarray
    eyes_apart: np.ndarray
    eye: np.ndarray  # half an eye's height
    brow: np.ndarray  # its slope
    beard: np.ndarray  # bool
    mouth: np.ndarray  # half its width
    lips: np.ndarray  # half their height
    curve: np.ndarray  # how far the corners are up, negative down
    teeth: np.ndarray  # how far the mouth is open


def _face(who: np.ndarray, row: np.ndarray, labels: np.ndarray, size: int) -> _Face:
    """The shapes of each row from uniforms of its person and of its own."""

    def of(draw: np.ndarray, lane: int, low: float, high: float) -> np.ndarray:
        return (low + (high - low) * draw[:, lane])[:, None, None].astype(np.float32)

    pixel = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
    height = of(who, 0, 0.62, 0.78) * of(row, 0, 0.92, 1.08)
    width = height * of(who, 1, 0.68, 0.88)
    smiling = labels[:, None, None] == 1
    # A person smiles broadly or faintly, and each picture shows it more or less.
    broad = of(who, 2, 0.6, 1.2) * of(row, 1, 0.5, 1.3)
    return _Face(
        across=np.abs(pixel[None, None, :] - of(row, 2, -0.12, 0.12)) / width,
        down=(pixel[None, :, None] - of(row, 3, -0.1, 0.14)) / height,
        hair=of(who, 3, 0.0, 0.9),
        fringe=of(who, 4, 0.5, 0.8),
        eyes_apart=of(who, 5, 0.36, 0.5),
        eye=of(who, 6, 0.06, 0.11) * of(row, 4, 0.6, 1.2),
        brow=of(who, 7, -0.35, 0.35) + of(row, 5, -0.15, 0.15),
        beard=of(who, 8, 0, 1) < 0.25,
        mouth=of(who, 9, 0.34, 0.5) * of(row, 6, 0.85, 1.15),
        lips=of(who, 10, 0.07, 0.12),
        curve=0.2 * broad * np.where(smiling, np.float32(1), np.float32(-1)),
        teeth=np.maximum(of(row, 7, -0.16, 0.14), 0),
    )


def _parts(face: _Face) -> np.ndarray:
    """Which part of the picture each pixel shows, uint8 [rows, size, size].

    Ellipses and curves are a term of the column plus a term of the row.
    """
    x, y = face.across, face.down
    eye_x = (x - face.eyes_apart) ** 2
    inside = x**2 + y**2 < 1
    reach = 1.15 + face.hair / 2
    part = np.zeros(inside.shape, dtype=np.uint8)
    part[(x / 1.2) ** 2 + ((y + 1.2 - reach) / reach) ** 2 < 1] = _HAIR
    part[inside] = _SKIN
    part[inside & face.beard & (y - x**2 / 2 > 0.25)] = _SHADE
    part[inside & (y - x**2 / 2 < -face.fringe)] = _HAIR
    part[(x / 0.09) ** 2 + ((y - 0.12) / 0.16) ** 2 < 1] = _SHADE
    part[eye_x / 0.026 + ((y + 0.16) / face.eye) ** 2 < 1] = _WHITE
    part[(eye_x + (y + 0.16) ** 2 < 0.005) & (np.abs(y + 0.16) < face.eye)] = _IRIS
    tilt = face.brow * (x - face.eyes_apart) + 1.2 * eye_x
    part[(np.abs(y + 0.37 + tilt) < 0.045) & (eye_x < 0.045)] = _HAIR
    # The middle stays where the corners' mean is, so that a mouth's place tells nothing.
    bend = face.curve * (2 * (x / face.mouth) ** 2 - 1)
    below = y - 0.52 + bend
    wide = x < face.mouth
    part[(np.abs(below) < face.lips + face.teeth) & wide] = _LIPS
    part[(np.abs(below) < face.teeth) & wide] = _TEETH
    return part


def _colours(who: np.ndarray) -> np.ndarray:
    """The colour of each part for each row's person, float32 [rows, parts, 3]."""
    colour = np.empty((len(who), _PARTS, 3), dtype=np.float32)
    colour[:, _BACKGROUND] = 40 + 190 * who[:, 11:14]
    shade, red = who[:, 14:15], who[:, 15:16] - 0.5
    skin = np.array([90, 55, 40]) + shade * np.array([150, 150, 140]) + red * np.array([16, 0, -16])
    colour[:, _SKIN] = skin
    colour[:, _SHADE] = 0.72 * skin
    colour[:, _LIPS] = 0.45 * skin + np.array([20, 0, 5]) + np.array([60, 5, 10]) * who[:, 16:17]
    dark = np.array([30, 22, 18]) + who[:, 17:18] ** 2 * np.array([180, 150, 90])
    grey = np.array([140, 138, 135]) + 60 * who[:, 18:19]
    colour[:, _HAIR] = np.where(who[:, 19:20] < 0.15, grey, dark)
    colour[:, _WHITE] = 225
    colour[:, _IRIS] = 20 + 90 * who[:, 20:23]
    colour[:, _TEETH] = np.array([235, 230, 215])
    return colour


def _paint(part: np.ndarray, colour: np.ndarray, row: np.ndarray, out: np.ndarray) -> None:
    """Colours the parts under the picture's light and grain; writes uint8 [rows, 3, size, size]."""
    rows, size = part.shape[0], part.shape[1]
    line = np.linspace(-1, 1, size, dtype=np.float32)
    light = (0.7 + 0.5 * row[:, 8, None]).astype(np.float32)
    slope = (0.5 * (row[:, 9:11] - 0.5)).astype(np.float32)
    shading = (light + slope[:, :1] * line)[:, None, :] + (slope[:, 1:] * line)[:, :, None]
    place = (row[:, 11] * _NOISE).astype(np.int64)
    grain = noise_windows(size * size)
    which = part + np.arange(rows)[:, None, None] * _PARTS
    for channel in range(3):
        shown = colour[:, :, channel].reshape(-1)[which]
        shown *= shading
        # Another place of the table for each channel.
        shown += grain[(place + channel * 9973) % _NOISE].reshape(shown.shape)
        np.clip(shown, 0, 255, out=shown)
        out[:, channel] = shown


@functools.cache
def noise_windows(width: int) -> np.ndarray:
    """Windows of noise, even over -18..18, float32 [_NOISE, width], a view of one table."""
    table = generator(0, "picture grain").random(_NOISE + width - 1, dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(36 * table - 18, width)
