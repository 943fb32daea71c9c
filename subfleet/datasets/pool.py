"""What a partition is made of: rows without clients, by number.

A prepared CIFAR, or a synthetic twin of it, has labels and rows but nobody who
holds them; `subfleet.datasets.partitioned.Partitioned` deals them to clients.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from subfleet.core.scaling import Scaling


@runtime_checkable
class Pool(Protocol):
    """Rows 0 .. n - 1, the same bits whoever asks. It is cheap to pickle and opens lazily."""

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`, or the user's own."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels run from 0 to this, exclusive."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row of x."""
        ...

    @property
    def scale(self) -> Scaling:
        """What turns stored x into the network's input, on the device."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short string that changes with the rows or their order, not with where they lie."""
        ...

    def labels(self) -> np.ndarray:
        """The label of every row, int64 [rows]; costs no pixels."""
        ...

    def from_test(self) -> np.ndarray:
        """Which rows the publisher set aside to test, bool [rows]; none may be."""
        ...

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64 [n], any order, repeats allowed), in that order.

        [n, *input_shape], of one dtype whatever n is, 0 included.
        """
        ...
