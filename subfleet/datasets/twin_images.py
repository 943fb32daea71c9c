"""Synthetic twins of the image sets without clients: striped shapes on grounds of a colour.

A class is a shape, its colour, the ground's colour, and the direction and
width of its stripes; classes share these, so that none alone tells a class. Rows
differ in place, size, proportions, stripes' phase and tilt, colours, light
and grain, all hashed from (seed, row). Rows are drawn by number; nothing is stored.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.scaling import SIGNED
from subfleet.core.seeds import generator
from subfleet.datasets.draws import stream_key, uniforms
from subfleet.datasets.federation import checked_number

LANES = 20  # uniforms for each row
_CHUNK_PIXELS = 1 << 15  # pixels drawn together: their arrays stay in the second-level cache
_TURN = 4096  # steps of a full turn: sines are looked up, so that every CPU draws the same bits
_NOISE = 1 << 15

# The inner edge of each shape, and the power p of |x|^p + |y|^p, whose outer edge is at 1.
_SHAPES = np.array([[0, 1], [0, 2], [0, 8], [0.4, 1], [0.4, 2], [0.05, 8]])
_DIRECTIONS, _WIDTHS, _HUES = 6, 3, 8


class Preset(NamedTuple):
    """The measures of a published set."""

    num_classes: int
    size: int
    channels: int
    train: int
    test: int


PRESETS = {
    "cifar10": Preset(10, 32, 3, 50_000, 10_000),
    "cifar100": Preset(100, 32, 3, 50_000, 10_000),
    "cinic10": Preset(10, 32, 3, 180_000, 90_000),
    "mnist": Preset(10, 28, 1, 60_000, 10_000),
    "mini_imagenet": Preset(100, 84, 3, 60_000, 0),
    "tiny_imagenet": Preset(200, 64, 3, 100_000, 10_000),
}
"""CINIC-10's validation part, a third of it, counts as training data, as in most of the papers."""


class SyntheticImages:
    """A pool of rows without clients, uint8 [channels, size, size], for a partition to deal.

    name: "synthetic_" and what the rows stand in for. Labels are even over the
    classes, in the train and in the test part each, and lie in mixed order.
    variation: how far rows of one class differ, 0 little, 1 so that a small CNN
    learns most of ten classes and a linear model few.

    >>> pool = SyntheticImages.like("cifar10", seed=1)
    >>> pool.rows(np.array([59_999, 3])).shape, int(pool.from_test().sum())
    ((2, 3, 32, 32), 10000)
    """

    def __init__(
        self,
        name: str = "synthetic_images",
        num_classes: int = 10,
        size: int = 32,
        channels: int = 3,
        train: int = 50_000,
        test: int = 10_000,
        seed: int = 0,
        *,
        variation: float = 1.0,
    ) -> None:
        most = len(_SHAPES) * _DIRECTIONS * _WIDTHS * _HUES
        checked_number("num_classes", num_classes, 1, most, whole=True)
        checked_number("size", size, 8, 512, whole=True)
        if channels not in (1, 3):
            raise InputError(f"channels={channels!r} is neither; give 1 for grey or 3 for colour")
        checked_number("train", train, 1, 1 << 32, whole=True)
        checked_number("test", test, 0, 1 << 32, whole=True)
        checked_number("variation", variation, 0, 2)
        self.name, self.num_classes, self.seed = name, num_classes, seed
        self.input_shape: tuple[int, ...] = (channels, size, size)
        self.scale = SIGNED
        self.num_train, self.num_test, self.variation = train, test, variation

    @classmethod
    def like(
        cls,
        preset: str,
        seed: int = 0,
        *,
        num_classes: int | None = None,
        size: int | None = None,
        train: int | None = None,
        test: int | None = None,
        variation: float = 1.0,
    ) -> SyntheticImages:
        """Textured shapes in place of a published set; give other measures to replace its own."""
        if preset not in PRESETS:
            raise InputError(
                f"no synthetic images like {preset!r}; {did_you_mean(preset, PRESETS)}"
            )
        given = {"num_classes": num_classes, "size": size, "train": train, "test": test}
        replaced = {name: value for name, value in given.items() if value is not None}
        measures = PRESETS[preset]._asdict() | replaced
        return cls(f"synthetic_{preset}", **measures, seed=seed, variation=variation)

    def _options(self) -> dict[str, Any]:
        channels, size, _ = self.input_shape
        options = {"num_classes": self.num_classes, "size": size, "channels": channels}
        options |= {"train": self.num_train, "test": self.num_test}
        return options | {"seed": self.seed, "variation": self.variation}

    def __reduce__(self) -> tuple:
        return functools.partial(SyntheticImages, **self._options()), (self.name,)

    @property
    def fingerprint(self) -> str:
        """What the rows follow from: the options and the version of the drawing."""
        return f"drawn 1, {self._options()}"

    @functools.cached_property
    def _all_labels(self) -> np.ndarray:
        parts = []
        for part, rows in (("train", self.num_train), ("test", self.num_test)):
            draw = generator(self.seed, f"{self.name} {part} labels")
            parts.append(draw.permutation(np.arange(rows) % self.num_classes))
        return np.concatenate(parts).astype(np.int64)

    def labels(self) -> np.ndarray:
        """The label of every row, int64 [train + test]."""
        return self._all_labels.copy()

    def from_test(self) -> np.ndarray:
        """Which rows test, bool [train + test]: the last ones."""
        return np.arange(self.num_train + self.num_test) >= self.num_train

    @functools.cached_property
    def _classes(self) -> np.ndarray:
        """What each class looks like, int64 [classes, 5]: shape, direction, width, two hues."""
        sizes = (len(_SHAPES), _DIRECTIONS, _WIDTHS, _HUES)
        draw = generator(self.seed, f"{self.name} classes")
        chosen = draw.permutation(int(np.prod(sizes)))[: self.num_classes]
        ground = draw.integers(0, _HUES, self.num_classes)
        return np.stack([*np.unravel_index(chosen, sizes), ground], axis=1)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The images of these rows, uint8 [n, channels, size, size], the same bits each time.

        InputError when a number is outside 0 .. train + test - 1.
        """
        numbers = np.asarray(numbers, dtype=np.int64).reshape(-1)
        count = self.num_train + self.num_test
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
            wrong = numbers[(numbers < 0) | (numbers >= count)][0]
            raise InputError(f"row {wrong} is outside 0..{count - 1}; ask for one of these")
        key = stream_key(self.seed, f"{self.name} rows")
        images = np.empty((len(numbers), *self.input_shape), dtype=np.uint8)
        step = max(1, _CHUNK_PIXELS // self.input_shape[1] ** 2)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            looks = self._classes[self._all_labels[some]]
            draw = uniforms(key, some, LANES)
            _draw_images(looks, draw, self.variation, images[start : start + step])
        return images


def _draw_images(looks: np.ndarray, draw: np.ndarray, variation: float, out: np.ndarray) -> None:
    """Draws rows of `looks`, int64 [rows, 5]; `out` is uint8 [rows, channels, size, size]."""
    shake = ((2 * draw - 1) * variation).astype(np.float32)
    shape = _shape(looks[:, 0], shake, out.shape[-1])
    striped = _stripes(looks[:, 1], looks[:, 2], draw, shake, out.shape[-1]) * shape
    figure = _colours(looks[:, 3], shake[:, 7:11])
    ground = _colours(looks[:, 4], shake[:, 11:15])
    contrast = 45 + 25 * shake[:, 15]
    light = 40 * shake[:, 16]
    grain = _noise(out.shape[-1] ** 2)
    place = (draw[:, 17] * _NOISE).astype(np.int64)
    for channel in range(out.shape[1]):
        # Grey is the colours' mean, so that shape and stripes tell more.
        of = channel if out.shape[1] == 3 else slice(None)
        below = ground[:, of].reshape(len(out), -1).mean(axis=1) + light
        above = figure[:, of].reshape(len(out), -1).mean(axis=1) + light
        image = grain[(place + channel * 9973) % _NOISE].reshape(shape.shape)
        image += below[:, None, None]
        image += shape * (above - below)[:, None, None]
        image += striped * contrast[:, None, None]
        np.clip(image, 0, 255, out=image)
        out[:, channel] = image


def _shape(kind: np.ndarray, shake: np.ndarray, size: int) -> np.ndarray:
    """1 inside the shape and 0 outside, float32 [rows, size, size]."""
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
    half = 0.55 * (1 + 0.3 * shake[:, 0])
    stretch = 1 + 0.2 * shake[:, 1]
    x = np.abs(pixel - 0.35 * shake[:, 2:3]) / (half * stretch)[:, None]
    y = np.abs(pixel - 0.35 * shake[:, 3:4]) / (half / stretch)[:, None]
    power = _SHAPES[kind, 1][:, None]
    # Repeated squares in place of a power: the same bits on every CPU.
    for low in (1, 4):
        for _ in range(1 if low == 1 else 2):
            x, y = np.where(power > low, x * x, x), np.where(power > low, y * y, y)
    level = x[:, None, :] + y[:, :, None]
    inner = _SHAPES[kind, 0].astype(np.float32)[:, None, None]
    return ((level < 1) & (level >= inner)).astype(np.float32)


def _stripes(
    direction: np.ndarray, width: np.ndarray, draw: np.ndarray, shake: np.ndarray, size: int
) -> np.ndarray:
    """Waves from -1 to 1, float32 [rows, size, size].

    sin(a + b) = sin a cos b + cos a sin b, a of the column and b of the row, so
    that few sines are looked up.
    """
    sine = _sines()
    turn = (direction + 0.35 * shake[:, 4]) * (_TURN / 2 / _DIRECTIONS)
    waves = np.array([2.0, 3.6, 6.5])[width] * (1 + 0.12 * shake[:, 5])  # over the image
    step = waves * (_TURN / size)
    turn = turn.astype(np.int64) % _TURN
    pixel = np.arange(size)[None, :]
    along = (pixel * (step * sine[(turn + _TURN // 4) % _TURN])[:, None]).astype(np.int64)
    along += (draw[:, 18] * _TURN).astype(np.int64)[:, None]
    down = (pixel * (step * sine[turn])[:, None]).astype(np.int64)
    sin_a, cos_a = sine[along % _TURN], sine[(along + _TURN // 4) % _TURN]
    sin_b, cos_b = sine[down % _TURN], sine[(down + _TURN // 4) % _TURN]
    waved = sin_a[:, None, :] * cos_b[:, :, None]
    waved += cos_a[:, None, :] * sin_b[:, :, None]
    return waved


def _colours(hue: np.ndarray, shake: np.ndarray) -> np.ndarray:
    """A colour near each hue, float32 [rows, 3]; shake: float32 [rows, 4]."""
    corners = np.array([[(h >> bit) & 1 for bit in range(3)] for h in range(_HUES)])
    return (95 + 65 * corners[hue] + 75 * shake[:, :3] + 40 * shake[:, 3:]).astype(np.float32)


@functools.cache
def _sines() -> np.ndarray:
    """The sine over one turn, float32 [_TURN]."""
    return np.sin(np.arange(_TURN) * (2 * np.pi / _TURN)).astype(np.float32)


@functools.cache
def _noise(width: int) -> np.ndarray:
    """Windows of noise, even over -30..30, float32 [_NOISE, width], a view of one table."""
    table = generator(0, "image grain").random(_NOISE + width - 1, dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(60 * table - 30, width)
