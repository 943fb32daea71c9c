"""The training clients' rows in one place, for algorithms that train centrally."""

from __future__ import annotations

import functools
from hashlib import blake2b
from typing import Any

import numpy as np

from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import Block, Federation, checked_ids, offsets_of

POOL = 0  # the client that holds all


class Pooled:
    """Client 0 has the rows of `train_ids`, part by part; the others follow in their order.

    The others are held out, and `held_out` says so. The pool's rows are in the order of
    a digest of what they hold, so that they lie the same whoever had them: which client
    gave a row leaves no trace. Parts that were asked for stay in memory.

    >>> from subfleet.datasets.memory import InMemory
    >>> apart = InMemory(np.zeros((12, 3), np.float32), np.arange(12) % 2, np.array([0, 5, 7, 12]))
    >>> data = Pooled(apart, np.array([0, 2]))
    >>> data.num_clients, data.held_out.tolist(), data.sizes(np.array([0, 1]), "train").tolist()
    (2, [1], [8, 1])
    """

    def __init__(self, federation: Federation, train_ids: np.ndarray) -> None:
        self.federation = federation
        self.train_ids = np.sort(checked_ids(train_ids, federation.num_clients))
        others = np.setdiff1d(np.arange(federation.num_clients), self.train_ids)
        self._others = others.astype(np.int64)
        self._pool = functools.cache(self._pooled)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pooled, (self.federation, self.train_ids)

    @property
    def name(self) -> str:
        """The name of the data that were pooled."""
        return self.federation.name

    @property
    def num_clients(self) -> int:
        """The pool, and those held out."""
        return 1 + len(self._others)

    @property
    def held_out(self) -> np.ndarray:
        """All but the pool, int64."""
        return np.arange(1, self.num_clients)

    @property
    def num_classes(self) -> int:
        """Labels run from 0 to this, exclusive."""
        return self.federation.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row of x."""
        return self.federation.input_shape

    @property
    def scale(self) -> Scaling:
        """What turns stored x into the network's input, on the device."""
        return self.federation.scale

    def __getattr__(self, name: str) -> Any:
        # What some data sets say besides: their fingerprint, vocabulary, report, ...
        if name in _TOLD and "federation" in self.__dict__:
            return getattr(self.federation, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        return self._gathered(ids, self.federation.sizes(self._members(ids), part))

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        return self._gathered(ids, self.federation.label_counts(self._members(ids), part))

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The rows of `part` of the clients, in the order of `ids`."""
        ids = checked_ids(ids, self.num_clients)
        if not (ids == POOL).any():
            return self.federation.block(self._others[ids - 1], part)
        pieces = [
            self._pool(part) if id == POOL else self.federation.block(self._others[[id - 1]], part)
            for id in ids
        ]
        if len(pieces) == 1:
            return pieces[0]
        x, y = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("x", "y"))
        return Block(x, y, offsets_of(np.array([len(p.y) for p in pieces])))

    def _pooled(self, part: str) -> Block:
        """The pool's rows, in the order of their digests."""
        block = self.federation.block(self.train_ids, part)
        digests = [
            blake2b(np.ascontiguousarray(x).tobytes() + y.tobytes(), digest_size=16).digest()
            for x, y in zip(block.x, block.y, strict=True)
        ]
        order = np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)
        return Block(block.x[order], block.y[order], offsets_of(np.array([len(order)])))

    def _members(self, ids: np.ndarray) -> np.ndarray:
        """Whose rows the clients have, one after another."""
        ids = checked_ids(ids, self.num_clients)
        pieces = [self.train_ids if id == POOL else self._others[[id - 1]] for id in ids]
        return np.concatenate([np.empty(0, np.int64), *pieces])

    def _gathered(self, ids: np.ndarray, of_members: np.ndarray) -> np.ndarray:
        """Sums over each client's members, [len(ids), ...]."""
        counts = np.where(checked_ids(ids, self.num_clients) == POOL, len(self.train_ids), 1)
        owner = np.repeat(np.arange(len(counts)), counts)
        sums = np.zeros((len(counts), *of_members.shape[1:]), np.int64)
        np.add.at(sums, owner, of_members)
        return sums


_TOLD = ("fingerprint", "report", "vocabulary", "embedding")
