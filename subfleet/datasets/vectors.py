"""Vectors of a linear problem, so cheap to draw that the rest of a round is what is timed."""

from __future__ import annotations

import functools

import numpy as np

from subfleet.core.scaling import Scaling
from subfleet.core.seeds import generator
from subfleet.datasets.draws import hashes, row_keys, stream_key
from subfleet.datasets.federation import (
    Block,
    checked_ids,
    checked_number,
    checked_part,
    offsets_of,
    part_sizes,
    train_sizes,
)
from subfleet.datasets.memory import count_labels

_NOISE = 1 << 18  # float32 values of noise, shared by all clients: 1 MiB, so it stays in cache


class SyntheticVectors:
    """Any number of clients with `samples` vectors each: a class's centre plus noise.

    x: float32 [rows, dim]; labels are even over `num_classes`. The noise is a
    window of one shared table at a place hashed from (seed, client, row), so a
    row costs little more than its copy. `signal` is the centres' standard
    deviation; the noise's is 0.58.

    >>> data = SyntheticVectors(1_000_000, seed=1, samples=50, dim=4, num_classes=3)
    >>> data.sizes(np.array([999_999]), "train"), data.block(np.array([7, 8]), "all").x.shape
    (array([40]), (100, 4))
    """

    def __init__(
        self,
        clients: int = 1000,
        seed: int = 0,
        *,
        samples: int = 63,
        dim: int = 784,
        num_classes: int = 62,
        signal: float = 0.12,
    ) -> None:
        checked_number("clients", clients, 1, whole=True)
        checked_number("samples", samples, 2, 1 << 24, whole=True)
        checked_number("dim", dim, 1, whole=True)
        checked_number("num_classes", num_classes, 1, whole=True)
        checked_number("signal", signal, 0)
        self.name = "synthetic_vectors"
        self.num_clients, self.num_classes = clients, num_classes
        self.input_shape: tuple[int, ...] = (dim,)
        self.scale = Scaling()
        self.seed, self.samples, self.signal = seed, samples, signal

    def __reduce__(self) -> tuple:
        options = {"samples": self.samples, "dim": self.input_shape[0]}
        options |= {"num_classes": self.num_classes, "signal": self.signal}
        return functools.partial(SyntheticVectors, **options), (self.num_clients, self.seed)

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Noise windows [_NOISE, dim] (a view) and class centres [num_classes, dim]."""
        draw = generator(self.seed, "vectors")
        dim = self.input_shape[0]
        noise = draw.random(_NOISE + dim - 1, dtype=np.float32) * 2 - 1
        centres = draw.standard_normal((self.num_classes, dim), dtype=np.float32) * self.signal
        return np.lib.stride_tricks.sliding_window_view(noise, dim), centres.astype(np.float32)

    def _draws(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row's place in the noise and label, and the clients' offsets."""
        ids = checked_ids(ids, self.num_clients)
        offsets = offsets_of(self.sizes(ids, part))
        skipped = train_sizes(np.full(len(ids), self.samples)) * (part == "test")
        bits = hashes(stream_key(self.seed, "rows"), row_keys(ids, offsets, skipped), 2)
        place = (bits[:, 0] >> np.uint64(46)).astype(np.int64)
        label = (bits[:, 1] >> np.uint64(32)) * np.uint64(self.num_classes) >> np.uint64(32)
        return place, label.astype(np.int64), offsets

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        ids = checked_ids(ids, self.num_clients)
        return part_sizes(np.full(len(ids), self.samples), checked_part(part))

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        _, label, offsets = self._draws(ids, part)
        return count_labels(label, offsets, self.num_classes)

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows, drawn anew, the same bits each time."""
        place, label, offsets = self._draws(ids, part)
        noise, centres = self._tables
        x = centres[label]
        for row, start in zip(x, place, strict=True):
            row += noise[start]
        return Block(x, label, offsets)
