"""A federation that is arrays in memory, for tests, benchmarks and one's own data."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import PIXELS, Scaling
from subfleet.datasets.federation import Block, checked_ids
from subfleet.datasets.split import TEST, TRAIN, Parts, check_shares, seeded_split


class InMemory:
    """Clients whose rows are `x[offsets[i] : offsets[i + 1]]`; pickles its arrays.

    x: [rows, *input_shape]; y: integers [rows] in 0 .. num_classes - 1; offsets:
    integers [clients + 1], from 0 to rows, never falling. `train` (bool [rows])
    names the rows that train, the others test; without it `test_share` of each
    client's rows test and `val_share` validate, drawn from the seed.

    >>> data = InMemory(np.zeros((10, 3), np.float32), np.arange(10) % 2, np.array([0, 5, 10]))
    >>> data.sizes(np.array([1, 0]), "train"), data.block(np.array([1]), "test").x.shape
    (array([4, 4]), (1, 3))
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        offsets: np.ndarray,
        *,
        num_classes: int | None = None,
        scale: Scaling | None = None,
        seed: int = 0,
        train: np.ndarray | None = None,
        test_share: float = 0.2,
        val_share: float = 0.0,
        name: str = "in_memory",
    ) -> None:
        self.name = name
        self._x = np.asarray(x)
        self._y = np.asarray(y, dtype=np.int64)
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._check_shapes()
        self.num_clients = len(self._offsets) - 1
        self.num_classes = int(self._y.max(initial=0)) + 1 if num_classes is None else num_classes
        if self._y.size and not 0 <= self._y.min() <= self._y.max() < self.num_classes:
            raise InputError(
                f"y has labels from {self._y.min()} to {self._y.max()}, outside "
                f"0..{self.num_classes - 1}; correct them or raise num_classes"
            )
        self.input_shape: tuple[int, ...] = self._x.shape[1:]
        self.scale = scale or (PIXELS if self._x.dtype == np.uint8 else Scaling())
        if train is not None and len(train) != len(self._y):
            raise InputError(f"train has {len(train)} rows, y {len(self._y)}; give one a row")
        if train is None:
            check_shares(test_share, val_share)
            codes = seeded_split(seed, self._offsets, None, test_share, val_share)
        else:
            codes = np.where(np.asarray(train, bool), TRAIN, TEST).astype(np.int8)
        self._parts = Parts(codes, self._offsets)

    def _check_shapes(self) -> None:
        rows = len(self._y)
        if len(self._x) != rows:
            raise InputError(f"x has {len(self._x)} rows, y {rows}; they must be equal")
        ends = self._offsets[[0, -1]] if self._offsets.size else np.array([-1, -1])
        if ends[0] != 0 or ends[1] != rows or np.any(np.diff(self._offsets) < 0):
            raise InputError(
                f"offsets run from {ends[0]} to {ends[1]}; they must rise from 0 to {rows}, "
                "the number of rows"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest (sha256, hexadecimal) of all rows, and of who holds and trains which."""
        digest = hashlib.sha256()
        for array in (self._x, self._y, self._offsets, self._parts.codes):
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        return self._parts.sizes(checked_ids(ids, self.num_clients), part)

    def _rows(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the part, client after client, and the clients' offsets."""
        return self._parts.rows(checked_ids(ids, self.num_clients), part)

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        rows, offsets = self._rows(ids, part)
        return count_labels(self._y[rows], offsets, self.num_classes)

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows in their stored order."""
        rows, offsets = self._rows(ids, part)
        return Block(self._x[rows], self._y[rows], offsets)


def count_labels(y: np.ndarray, offsets: np.ndarray, num_classes: int) -> np.ndarray:
    """Label histograms of clients stored one after another, int64 [clients, num_classes].

    >>> count_labels(np.array([0, 2, 2]), np.array([0, 1, 3]), 3)
    array([[1, 0, 0],
           [0, 0, 2]])
    """
    clients = len(offsets) - 1
    cell = np.repeat(np.arange(clients), np.diff(offsets)) * num_classes + y
    return np.bincount(cell, minlength=clients * num_classes).reshape(clients, num_classes)
