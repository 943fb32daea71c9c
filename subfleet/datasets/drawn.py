"""What the synthetic twins share: clients of any number, drawn from (seed, client) alone.

A twin's sizes have the mean and the standard deviation asked for, whatever the
seed and from a few dozen clients on, since consecutive clients take evenly
spread quantiles in a scrambled order.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.scaling import Scaling
from subfleet.datasets.draws import hashes, stream_key, uniforms
from subfleet.datasets.federation import (
    Block,
    checked_ids,
    checked_number,
    offsets_of,
    part_sizes,
    train_sizes,
)
from subfleet.datasets.memory import count_labels

"""Pixels from -1 to 1, in colour: plain SGD starts far better than from 0 to 1."""

_AT_ONCE = 4096  # clients whose rows are labelled together


class Rows(NamedTuple):
    """Rows of several clients, by number."""

    ids: np.ndarray  # [clients], int64
    offsets: np.ndarray  # [clients + 1], int64
    owner: np.ndarray  # [rows], int64: whose row, an index into `ids`
    number: np.ndarray  # [rows], int64: the row's number within its client

    @property
    def counters(self) -> np.ndarray:
        """What `draws` hashes for each row, uint64 [rows]; a client may have 2^24 rows."""
        client = self.ids[self.owner].astype(np.uint64)
        return (client << np.uint64(24)) | self.number.astype(np.uint64)


class Drawn(ABC):
    """A federation drawn on the fly; a subclass says what labels and inputs rows have.

    A client's rows are numbered; the first 80 % train, the others test, none
    validate. `options` are the subclass's keyword arguments; among them are
    `mean_samples` and `sd_samples`, which `totals` follows.
    """

    def __init__(
        self,
        name: str,
        clients: int,
        seed: int,
        options: dict[str, Any],
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        scale: Scaling,
    ) -> None:
        checked_number("clients", clients, 1, 1 << 32, whole=True)
        checked_number("mean_samples", options["mean_samples"], 2, 1e5)
        checked_number("sd_samples", options["sd_samples"], 0, 2 * options["mean_samples"])
        self.name, self.num_clients, self.seed = name, clients, seed
        self.num_classes, self.input_shape, self.scale = num_classes, input_shape, scale
        self._options = options

    def __reduce__(self) -> tuple:
        return functools.partial(type(self), **self._options), (self.num_clients, self.seed)

    @property
    def fingerprint(self) -> str:
        """What the samples follow from: the seed, the options and the version of the drawing."""
        return f"drawn 1, seed {self.seed}, {self._options}"

    def _key(self, purpose: str) -> np.ndarray:
        return stream_key(self.seed, f"{self.name} {purpose}")

    def totals(self, ids: np.ndarray) -> np.ndarray:
        """How many rows each client has in all, int64 [len(ids)], at least 2."""
        at = spread(self._key("sizes"), ids)
        rows = np.rint(weibull(at, self._options["mean_samples"], self._options["sd_samples"]))
        return np.maximum(rows, 2).astype(np.int64)

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        return self._bounds(checked_ids(ids, self.num_clients), part)[1]

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        ids = checked_ids(ids, self.num_clients)
        counts = np.empty((len(ids), self.num_classes), dtype=np.int64)
        for start in range(0, len(ids), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            rows = self._rows(ids[some], part)
            counts[some] = count_labels(self._labels(rows), rows.offsets, self.num_classes)
        return counts

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows, drawn anew, the same bits each time."""
        rows = self._rows(checked_ids(ids, self.num_clients), part)
        x, y = self._draw(rows)
        return Block(x, y, rows.offsets)

    def _bounds(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Each client's first row in `part` and how many there are, int64 [len(ids)]."""
        total = self.totals(ids)
        first = train_sizes(total) if part == "test" else np.zeros_like(total)
        return first, part_sizes(total, part)

    def _rows(self, ids: np.ndarray, part: str) -> Rows:
        first, sizes = self._bounds(ids, part)
        offsets = offsets_of(sizes)
        owner = np.repeat(np.arange(len(ids)), sizes)
        return Rows(ids, offsets, owner, np.arange(offsets[-1]) + (first - offsets[:-1])[owner])

    @abstractmethod
    def _labels(self, rows: Rows) -> np.ndarray:
        """The labels, int64 [rows]."""

    @abstractmethod
    def _draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [rows, *input_shape] and labels, int64 [rows]."""

    def _binary_labels(self, rows: Rows, share: np.ndarray) -> np.ndarray:
        """Labels of which `share` [clients] of a client's are 1 on average, int64 [rows]."""
        draw = uniforms(self._key("labels"), rows.counters, 1)[:, 0]
        return (draw < share[rows.owner]).astype(np.int64)

    def _shares(self, ids: np.ndarray) -> np.ndarray:
        """Each client's share of label 1, float64 [len(ids)], by the option `skew`.

        With a skew of 1 shares are even over 0..1, a flat Dirichlet draw; with 0 all are 1/2.
        """
        # -log(u) is exponential, and a ratio of such is a Dirichlet draw.
        weight = (-np.log(uniforms(self._key("shares"), ids, 2))) ** self._options["skew"]
        return weight[:, 1] / weight.sum(axis=1)


def spread(key: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1), float64 [len(ids)]: 2^k clients in a row take one of each 2^k-th.

    The van der Corput sequence in base 2, scrambled as Owen (1995) does, by the
    hash of Laine and Karras (2011): each bit flips by a hash of the bits below.

    >>> eight = spread(stream_key(0, "example"), np.arange(16, 24))
    >>> np.sort((eight * 8).astype(int))
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    salt = hashes(key, np.zeros(1, np.int64), 1)[0].astype(np.uint32)
    z = np.asarray(ids).astype(np.uint32) + salt
    for factor in (0x6C50B47C, 0xB82F1E52, 0xC7AFE638, 0x8D22F6E6):
        z ^= z * np.uint32(factor)
    # The lowest bit becomes the highest.
    octets = z.astype("<u4").view(np.uint8).reshape(-1, 4)
    turned = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)
    return (turned.view(">u4")[:, 0].astype(np.float64) + 0.5) * 2.0**-32


@functools.lru_cache(maxsize=64)
def _weibull_shape(variation: float) -> float:
    """The shape whose standard deviation is `variation` means, by bisection."""
    low, high = 0.3, 1000.0
    for _ in range(60):
        k = (low + high) / 2
        moments = math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k)
        low, high = (k, high) if math.expm1(moments) > variation**2 else (low, k)
    return low


def weibull(quantile: np.ndarray, mean: float, sd: float) -> np.ndarray:
    """Weibull's quantiles by mean and standard deviation, float64, above 0.

    Near the normal distribution where sd is a third of the mean, exponential
    where they are equal, with a heavy tail beyond: it fits all rows of Table 1.

    >>> draw = weibull((np.arange(10_000) + 0.5) / 10_000, 1183, 1218)
    >>> round(float(draw.mean())), abs(float(draw.std()) / 1218 - 1) < 0.01
    (1183, True)
    """
    shape = _weibull_shape(sd / mean)
    return mean / math.gamma(1 + 1 / shape) * (-np.log1p(-quantile)) ** (1 / shape)
