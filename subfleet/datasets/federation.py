"""What the platform sees of a data set: clients by number, their rows on demand.

A federation is cheap to pickle and opens lazily on each host. It holds arrays,
never an object per client, so that a dormant client costs a few bytes at most.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.scaling import Scaling
from subfleet.core.seeds import generator

PARTS = ("train", "val", "test", "all")


class Block(NamedTuple):
    """The rows of several clients, client after client.

    Rows `offsets[i]` to `offsets[i + 1]` belong to the i-th client asked for.

    >>> block = Block(np.zeros((3, 2), np.uint8), np.array([4, 5, 6]), np.array([0, 1, 3]))
    >>> block.y[block.offsets[1] : block.offsets[2]]
    array([5, 6])
    """

    x: np.ndarray  # [rows, *input_shape]: uint8 or float32; tokens int8, int16 or int32
    y: np.ndarray  # [rows], int64
    offsets: np.ndarray  # [clients + 1], int64


@runtime_checkable
class Federation(Protocol):
    """Clients 0 .. num_clients - 1, each with a train and a test part, and perhaps one to validate.

    The parts share no row. "all" is every row of a client, those in no part included.
    """

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`, or the user's own."""
        ...

    @property
    def num_clients(self) -> int:
        """Clients are numbered from 0 to this, exclusive."""
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

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        ...

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        ...

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The rows of `part` (one of `PARTS`) of the clients, in the order of `ids`."""
        ...


def identity(data: Federation) -> dict[str, Any]:
    """What tells these data from others, as plain JSON; a resume compares it.

    Name, clients, classes and shape; and, of a federation that has one, its
    `fingerprint`: a string that changes with its samples.
    """
    facts: dict[str, Any] = {
        "name": data.name,
        "clients": int(data.num_clients),
        "classes": int(data.num_classes),
        "input_shape": [int(size) for size in data.input_shape],
    }
    fingerprint = getattr(data, "fingerprint", None)
    return facts if fingerprint is None else facts | {"fingerprint": str(fingerprint)}


def checked_number(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
) -> None:
    """InputError unless `value` is a number in [low, high], and an integer if `whole`."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        bound = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise InputError(f"{name}={value!r} is out of bounds; give {kind} {bound}")


def checked_ids(ids: np.ndarray, num_clients: int) -> np.ndarray:
    """`ids` as int64 [n]; InputError when one is outside 0 .. num_clients - 1."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and (array.min() < 0 or array.max() >= num_clients):
        wrong = array[(array < 0) | (array >= num_clients)][0]
        raise InputError(
            f"client {wrong} is outside 0..{num_clients - 1}; "
            f"ask for one of the {num_clients} clients of this data set"
        )
    return array


def checked_part(part: str) -> str:
    """`part` itself; InputError when it is none of PARTS."""
    if part not in PARTS:
        raise InputError(f"part={part!r} is unknown; {did_you_mean(part, PARTS)}")
    return part


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Where each client starts, int64 [clients + 1].

    >>> offsets_of(np.array([2, 0, 3]))
    array([0, 2, 2, 5])
    """
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def train_sizes(sizes: np.ndarray) -> np.ndarray:
    """How many of a client's n samples train: 80 %, at least one, and one left to test.

    LEAF's rule: the fraction is rounded down; a client of two has one and one.

    >>> train_sizes(np.array([0, 1, 2, 3, 10, 14]))
    array([ 0,  1,  1,  2,  8, 11])
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    kept = np.maximum(np.minimum(sizes * 4 // 5, sizes - 1), 1)
    return np.minimum(kept, sizes)


def part_sizes(sizes: np.ndarray, part: str) -> np.ndarray:
    """The rows in `part` of clients with `sizes` rows in all, by `train_sizes`; none validate."""
    checked_part(part)
    sizes = np.asarray(sizes, dtype=np.int64)
    if part == "all":
        return sizes
    if part == "val":
        return np.zeros_like(sizes)
    return train_sizes(sizes) if part == "train" else sizes - train_sizes(sizes)


def split_clients(
    seed: int, num_clients: int, held_out: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """The clients that train and those held out to measure the global model.

    Both are sorted int64 arrays; of two clients or more there is one of each at
    least, unless `held_out` is 0. Source: the 80/20 client split of ADDS.

    >>> train, held = split_clients(0, 10)
    >>> len(train), len(held), np.array_equal(np.union1d(train, held), np.arange(10))
    (8, 2, True)
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out={held_out} is outside [0, 1); 0.2 is usual")
    count = 0
    if held_out > 0 and num_clients >= 2:
        count = min(max(round(held_out * num_clients), 1), num_clients - 1)
    chosen = generator(seed, "held-out clients").permutation(num_clients)[:count]
    held = np.zeros(num_clients, dtype=bool)
    held[chosen] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def split_of(
    federation: Federation, seed: int, held_out: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """As `split_clients`, unless the data say themselves who is held out: their `held_out`."""
    held = getattr(federation, "held_out", None)
    if held is None:
        return split_clients(seed, federation.num_clients, held_out)
    return np.setdiff1d(np.arange(federation.num_clients), held), np.asarray(held, np.int64)
