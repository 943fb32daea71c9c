"""A synthetic twin of FEMNIST: any number of writers, drawn on the fly, nothing stored.

Each writer has hands, a slant, a pen and habits of their own, a number of
samples and a label mix; all are hashed from (seed, writer), so that a writer
costs nothing until it is asked for and is the same bits on every host.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from subfleet.core.scaling import INK
from subfleet.datasets.draws import hashes, nearly_normal, row_keys, stream_key, uniforms
from subfleet.datasets.federation import (
    Block,
    checked_ids,
    checked_number,
    checked_part,
    offsets_of,
    part_sizes,
    train_sizes,
)
from subfleet.datasets.glyphs import CHARACTERS, FORMS, GRID
from subfleet.datasets.pen import PEN_LANES, ROW_LANES, SIDE, draw_images, writer_pens

CLASSES = len(CHARACTERS)
_AT_ONCE = 65536  # clients whose label weights are in memory together: 33 MB


TABLE_1 = {"clients": 1062, "mean_samples": 227.6, "sigma": 0.34, "digits_only": 0.05}
"""The options for the row of FEMNIST in ADDS's Table 1; the mean is its samples over its clients,
which its own mean contradicts. Writers of digits only give the least of 9 classes."""


class SyntheticFemnist:
    """`clients` writers of 28 x 28 images: uint8 [1, 28, 28], 255 is paper and 0 ink.

    clients: how many writers; seed: which. mean_samples: a writer's samples on
    average (log-normal with `sigma`, at least `min_samples`, at most four times
    the mean). digits: the share of digits, 0.72 in LEAF's sample. skew: how far
    writers' label mixes differ, 0 not at all, 1 as a flat Dirichlet draw.
    variation: how far styles differ, 1 as people's do, more or less. digits_only:
    the share of writers who wrote nothing but digits. `TABLE_1` has the options for
    ADDS's Table 1.

    >>> data = SyntheticFemnist(1_000_000, seed=3)
    >>> block = data.block(np.array([999_999, 5]), "test")
    >>> block.x.shape[1:], block.x.dtype == np.uint8, len(block.offsets)
    ((1, 28, 28), True, 3)
    """

    def __init__(
        self,
        clients: int = 1000,
        seed: int = 0,
        *,
        mean_samples: float = 120.0,
        sigma: float = 0.4,
        min_samples: int = 10,
        digits: float = 0.5,
        skew: float = 0.7,
        variation: float = 1.0,
        digits_only: float = 0.0,
    ) -> None:
        checked_number("clients", clients, 1, whole=True)
        checked_number("min_samples", min_samples, 2, whole=True)
        checked_number("mean_samples", mean_samples, min_samples, 1e6)
        checked_number("sigma", sigma, 0, 2)
        checked_number("digits", digits, 0.01, 0.99)
        checked_number("skew", skew, 0, 4)
        checked_number("variation", variation, 0, 2)
        checked_number("digits_only", digits_only, 0, 1)
        self.name = "synthetic_femnist"
        self.num_clients, self.num_classes = clients, CLASSES
        self.input_shape: tuple[int, ...] = (1, SIDE, SIDE)
        self.scale = INK
        self.seed = seed
        self._options = {
            "mean_samples": mean_samples,
            "sigma": sigma,
            "min_samples": min_samples,
            "digits": digits,
            "skew": skew,
            "variation": variation,
            "digits_only": digits_only,
        }

    def __reduce__(self) -> tuple:
        return functools.partial(SyntheticFemnist, **self._options), (self.num_clients, self.seed)

    @functools.cached_property
    def _keys(self) -> dict[str, np.ndarray]:
        names = ("sizes", "labels", "digits only", "order", "style", "hands", "rows")
        return {name: stream_key(self.seed, f"synthetic {name}") for name in names}

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each writer in `part`, int64 [len(ids)]."""
        ids = checked_ids(ids, self.num_clients)
        mean, sigma = self._options["mean_samples"], self._options["sigma"]
        normal = nearly_normal(uniforms(self._keys["sizes"], ids, 4))
        # E[exp(m + s z)] = exp(m + s^2 / 2), so the mean is as asked for.
        total = np.rint(np.exp(math.log(mean) - sigma**2 / 2 + sigma * normal))
        total = np.clip(total, self._options["min_samples"], 4 * mean)
        return part_sizes(total.astype(np.int64), checked_part(part))

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each writer and class, int64 [len(ids), 62]."""
        ids = checked_ids(ids, self.num_clients)
        if checked_part(part) == "all":
            return self.label_counts(ids, "train") + self.label_counts(ids, "test")
        counts = np.empty((len(ids), CLASSES), dtype=np.int64)
        sizes = self.sizes(ids, part)
        for start in range(0, len(ids), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            counts[some] = self._label_counts(ids[some], sizes[some], part == "test")
        return counts

    def _label_counts(self, ids: np.ndarray, sizes: np.ndarray, test: bool) -> np.ndarray:
        """Counts in proportion to the writer's weights, rounded at a random phase.

        Row i of n takes the class in whose share of [0, n) the point i + phase
        lies, so the counts follow without drawing the rows.
        """
        draw = uniforms(self._keys["labels"], ids, CLASSES + 2)
        digits = self._options["digits"]
        prior = np.repeat([digits / 10, (1 - digits) / 52], [10, 52])
        # -log(u) is exponential; with a power of 1 the weights are a flat Dirichlet draw.
        weights = prior * (-np.log(draw[:, :CLASSES])) ** self._options["skew"]
        if self._options["digits_only"] > 0:
            lone = uniforms(self._keys["digits only"], ids, 1) < self._options["digits_only"]
            weights[:, 10:] *= ~lone
        upto = np.cumsum(weights, axis=1)
        phase = draw[:, CLASSES + int(test)]
        upto = np.floor(upto / upto[:, -1:] * sizes[:, None] + phase[:, None])
        upto[:, -1] = sizes
        return np.diff(upto, axis=1, prepend=0).astype(np.int64)

    def _labels(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels [rows] in mixed order, the rows' counters [rows] and offsets [len(ids) + 1]."""
        sizes = self.sizes(ids, part)
        offsets = offsets_of(sizes)
        counts = self.label_counts(ids, part)
        labels = np.repeat(np.tile(np.arange(CLASSES), len(ids)), counts.reshape(-1))
        first = train_sizes(self.sizes(ids, "all")) * (part == "test")
        counters = row_keys(ids, offsets, first)
        draw = hashes(self._keys["order"], counters, 1)[:, 0]
        owner = np.repeat(np.arange(len(ids)), sizes)
        # Labels are sorted within each writer; which of equal ones goes where is no matter.
        return labels[np.lexsort((draw, owner))], counters, offsets

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The writers' images, drawn anew, the same bits each time."""
        ids = checked_ids(ids, self.num_clients)
        if checked_part(part) == "all":
            return _joined(self.block(ids, "train"), self.block(ids, "test"))
        labels, counters, offsets = self._labels(ids, part)
        owner = np.repeat(np.arange(len(ids)), np.diff(offsets))
        pens = writer_pens(uniforms(self._keys["style"], ids, PEN_LANES), self.variation)
        hand = hashes(self._keys["hands"], ids[owner] * CLASSES + labels, 1)[:, 0]
        field = labels * FORMS + (hand % np.uint64(FORMS)).astype(np.int64)
        shaky = uniforms(self._keys["rows"], counters, ROW_LANES)
        images = draw_images(field * (GRID * GRID), pens, owner, shaky, self.variation)
        return Block(images.reshape(-1, *self.input_shape), labels, offsets)

    @property
    def variation(self) -> float:
        """How far styles differ."""
        return self._options["variation"]


def _joined(train: Block, test: Block) -> Block:
    """Each client's train rows, then its test rows."""
    offsets = train.offsets + test.offsets
    client = np.arange(len(offsets) - 1)
    owner = np.concatenate(
        [np.repeat(client, np.diff(train.offsets)), np.repeat(client, np.diff(test.offsets))]
    )
    order = np.argsort(owner, kind="stable")
    x, y = np.concatenate([train.x, test.x]), np.concatenate([train.y, test.y])
    return Block(x[order], y[order], offsets)
