"""What a partition is: who holds which rows, and what became of those nobody holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.federation import checked_number, offsets_of

LEAST = 10
"""Clients get this many rows at least, as in FedML, where there are twice as many to deal."""


@dataclass(frozen=True)
class Report:
    """What a generator did, in numbers.

    `draws`: random draws until one served (or the last allowed). `least`: the rows
    that a repair gives each client at least, 0 where there is no such rule.
    `repaired`: clients that had fewer; `moved`: rows that went to them from the
    largest ones. `left_out`: rows that nobody holds, by reason. `absent`: classes
    without any row.
    """

    kind: str
    clients: int
    rows: int
    smallest: int
    largest: int
    draws: int = 1
    least: int = 0
    repaired: int = 0
    moved: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Partition:
    """Every row is with exactly one client or in `left_out`, for a reason that `report` gives."""

    rows: np.ndarray  # int64 [assigned]: client after client, each client's rising
    offsets: np.ndarray  # int64 [clients + 1]
    left_out: np.ndarray  # int64 [n - assigned], rising
    report: Report

    @property
    def sizes(self) -> np.ndarray:
        """The number of rows of each client, int64 [clients]."""
        return np.diff(self.offsets)

    def owners(self) -> np.ndarray:
        """The client of each of `rows`, int64 [assigned]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.sizes)


def gathered(owner: np.ndarray, clients: int, labels: np.ndarray, **facts: Any) -> Partition:
    """The partition in which row i is with client `owner[i]` (int [n]; -1: with nobody).

    `facts` are fields of `Report`.

    >>> part = gathered(np.array([1, 0, -1, 1]), 2, np.zeros(4, int), kind="toy")
    >>> part.rows.tolist(), part.offsets.tolist(), part.left_out.tolist()
    ([1, 0, 3], [0, 1, 3], [2])
    """
    left_out = np.flatnonzero(owner < 0)
    sizes = np.bincount(owner[owner >= 0] if len(left_out) else owner, minlength=clients)
    # A stable sort of small integers keeps each client's rows rising, and is the fast one.
    rows = np.argsort(owner.astype(np.min_scalar_type(-clients)), kind="stable")[len(left_out) :]
    present = np.bincount(labels, minlength=1)
    report = Report(
        clients=clients,
        rows=len(rows),
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
        absent=np.flatnonzero(present == 0).tolist(),
        **facts,
    )
    return Partition(rows, offsets_of(sizes), left_out, report)


def checked_labels(labels: np.ndarray, clients: int) -> np.ndarray:
    """`labels` as int64 [n]; InputError: not integers >= 0, or fewer rows than clients."""
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"labels have shape {array.shape} and type {array.dtype}; give integers [rows]"
        )
    if array.size and array.min() < 0:
        row = int(np.argmax(array < 0))
        raise InputError(f"labels[{row}] = {array[row]} is negative; number classes from 0")
    checked_number("clients", clients, 1, whole=True)
    if clients > array.size:
        raise InputError(
            f"clients={clients} are more than the {array.size} rows to deal, one each at least; "
            f"give at most {array.size} clients"
        )
    return array.astype(np.int64)


def rows_by_class(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Row numbers class after class, shuffled within each, int64 [n]."""
    mixed = draw.permutation(len(labels))
    # Labels in 16 bits or fewer are sorted by radix, ten times as fast.
    small = labels.astype(np.min_scalar_type(int(labels.max(initial=0))))
    return mixed[np.argsort(small[mixed], kind="stable")]


def least_rows(rows: int, clients: int) -> int:
    """min(10, rows / 2 clients), rounded down, but no client is left with nothing.

    >>> least_rows(50_000, 100), least_rows(50_000, 10_000), least_rows(15, 10)
    (10, 2, 1)
    """
    return max(min(LEAST, rows // (2 * clients)), 1)


def repair(owner: np.ndarray, clients: int, least: int) -> tuple[np.ndarray, int, int]:
    """Moves rows from the largest clients until each has `least`: (owner, repaired, moved).

    As if one row at a time went from whoever has most: donors end level, the ones
    of lower number a row lower where it does not come out even. A donor gives rows
    evenly spaced over its own, so its mix of labels stays about as it was.
    Needs `least * clients <= len(owner)`.
    """
    sizes = np.bincount(owner, minlength=clients)
    lacks = np.maximum(least - sizes, 0)
    wanted = int(lacks.sum())
    if wanted == 0:
        return owner, 0, 0
    gives = _given(sizes, wanted, least)
    donors = np.flatnonzero(gives)
    starts = offsets_of(sizes)
    rows = np.argsort(owner.astype(np.min_scalar_type(clients)), kind="stable")
    number = np.arange(wanted) - np.repeat(offsets_of(gives[donors])[:-1], gives[donors])
    # The middles of equal stretches: floor((i + 1/2) size / given).
    place = (2 * number + 1) * np.repeat(sizes[donors], gives[donors])
    place //= 2 * np.repeat(gives[donors], gives[donors])
    moved = rows[np.repeat(starts[donors], gives[donors]) + place]
    owner = owner.copy()
    owner[moved] = np.repeat(np.arange(clients), lacks)
    return owner, int((lacks > 0).sum()), wanted


def _given(sizes: np.ndarray, wanted: int, least: int) -> np.ndarray:
    """How many rows each client gives, int64 [clients], `wanted` in all."""
    low, high = least, int(sizes.max())  # the highest level above which there are enough
    while high - low > 1:
        middle = (low + high) // 2
        if np.maximum(sizes - middle, 0).sum() >= wanted:
            low = middle
        else:
            high = middle
    gives = np.maximum(sizes - low, 0)
    spare = int(gives.sum()) - wanted
    # One level up there are too few, so the spare rows are fewer than the donors.
    gives[np.flatnonzero(gives)[len(np.flatnonzero(gives)) - spare :]] -= 1
    return gives
