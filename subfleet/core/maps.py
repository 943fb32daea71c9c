"""The index map: which units of the super-network a sub-network keeps.

An index map names, for each unit group, the kept units in increasing order; a
group that it does not name is kept whole. Equal maps have equal `key`s, which is
how clients of one sub-network are found and summed together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from subfleet.core.errors import InputError

if TYPE_CHECKING:
    from subfleet.core.units import UnitSpace

Indices = np.ndarray
"""Kept units of one group: int64, shape (kept,), strictly increasing."""


def _as_indices(group: str, units: Iterable[int] | np.ndarray) -> Indices:
    array = np.array(units if isinstance(units, np.ndarray) else list(units))
    if array.size == 0:
        array = array.reshape(-1).astype(np.int64)  # a block may be skipped; see `validate`
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"group {group!r}: kept units have shape {array.shape} and type {array.dtype}; "
            "give a flat list of integers"
        )
    array = array.astype(np.int64)
    if (array[:1] < 0).any() or (array[1:] <= array[:-1]).any():
        raise InputError(
            f"group {group!r}: kept units {array[:8].tolist()} are not strictly increasing "
            "from 0 upwards; sort them and drop duplicates"
        )
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False, repr=False)
class IndexMap:
    """The kept units of each group, `{group: int64 array}`; an omitted group means all.

    Hashable and equal by content. Raises `InputError` for indices that are negative or not
    strictly increasing; `UnitSpace.validate` checks names, ranges, and that only groups
    which stand for a block that may be skipped keep nothing.

    >>> a = IndexMap.prefix({"conv1": 2})
    >>> a == IndexMap.of({"conv1": [0, 1]}), a.is_prefix
    (True, True)
    >>> IndexMap.of({"conv1": [0, 3]})
    IndexMap(conv1: [0, 3])
    """

    kept: Mapping[str, Indices]

    def __post_init__(self) -> None:
        kept = {group: _as_indices(group, self.kept[group]) for group in sorted(self.kept)}
        object.__setattr__(self, "kept", kept)

    @classmethod
    def full(cls) -> IndexMap:
        """Every unit of every group."""
        return cls({})

    @classmethod
    def of(cls, kept: Mapping[str, Iterable[int] | np.ndarray]) -> IndexMap:
        """The units given for each group, strictly increasing."""
        return cls(kept)  # pyright: ignore[reportArgumentType]

    @classmethod
    def prefix(cls, counts: Mapping[str, int]) -> IndexMap:
        """The first `counts[g]` units of each group (HeteroFL, slimmable networks)."""
        return cls({group: np.arange(count) for group, count in counts.items()})

    @classmethod
    def from_masks(cls, masks: Mapping[str, np.ndarray]) -> IndexMap:
        """The units whose mask, shape (C_g,), is true or non-zero."""
        return cls({group: np.flatnonzero(mask) for group, mask in masks.items()})

    @classmethod
    def rolling(cls, space: UnitSpace, counts: Mapping[str, int], start: int) -> IndexMap:
        """A window of `counts[g]` units that begins at `start` and wraps round (FedRolex).

        >>> from subfleet.core.units import UnitSpace
        >>> IndexMap.rolling(UnitSpace({"h": 4}, {}, {}), {"h": 2}, start=3)
        IndexMap(h: [0, 3])
        """
        return cls(
            {
                group: np.sort((start + np.arange(count)) % space.size(group))
                for group, count in counts.items()
            }
        )

    @classmethod
    def random(
        cls, space: UnitSpace, counts: Mapping[str, int], generator: np.random.Generator
    ) -> IndexMap:
        """`counts[g]` units of each group, drawn without replacement, groups by name."""
        kept = {}
        for group in sorted(counts):
            size, count = space.size(group), counts[group]
            if not 1 <= count <= size:
                raise InputError(
                    f"group {group!r}: {count} units asked of {size}; ask for 1 to {size}"
                )
            kept[group] = np.sort(generator.permutation(size)[:count])
        return cls(kept)

    @cached_property
    def key(self) -> bytes:
        """16 bytes that equal maps share."""
        digest = hashlib.blake2b(digest_size=16)
        for group, indices in self.kept.items():
            digest.update(f"{group}/{len(indices)}/".encode())
            digest.update(indices.tobytes())
        return digest.digest()

    @cached_property
    def is_prefix(self) -> bool:
        """Whether every group keeps its first units, so that slices are contiguous."""
        return all(_is_prefix(indices) for indices in self.kept.values())

    def is_full(self, space: UnitSpace) -> bool:
        """Whether no unit of `space` is dropped."""
        return all(len(i) == space.size(group) for group, i in self.kept.items())

    def wire_bytes(self, space: UnitSpace) -> int:
        """Bytes that describe this map in a message.

        A full map needs none, since its message carries the whole network. Where the
        units of every layer are a prefix, a uint16 count for each such group; otherwise
        one bit for each unit, all groups packed together: ceil(J_w / 8). A byte besides
        for each block that may be skipped and each kernel that may be smaller.
        """
        if self.is_full(space):
            return 0
        choices = len(space.groups) - len(space.widths)
        if all(_is_prefix(self.kept[g]) for g in space.widths if g in self.kept):
            return 2 * len(space.widths) + choices
        return (space.num_units + 7) // 8 + choices

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexMap) and self.key == other.key

    def __repr__(self) -> str:
        parts = [f"{group}: {_brief(indices)}" for group, indices in self.kept.items()]
        return f"IndexMap({', '.join(parts) or 'full'})"

    def __getstate__(self) -> dict[str, Any]:
        # A prefix group travels as its count: tasks carry maps by the thousand.
        packed = {g: len(i) if _is_prefix(i) else i for g, i in self.kept.items()}
        return {"packed": packed, "key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = {}
        for group, indices in state["packed"].items():
            kept[group] = np.arange(indices) if isinstance(indices, int) else indices
            kept[group].setflags(write=False)
        self.__dict__.update(kept=kept, key=state["key"])


def _is_prefix(indices: Indices) -> bool:
    return len(indices) == 0 or int(indices[-1]) == len(indices) - 1


def _brief(indices: Indices) -> str:
    if len(indices) > 4 and int(indices[-1]) == len(indices) - 1:
        return f"[0..{len(indices) - 1}]"
    shown = ", ".join(str(i) for i in indices[:6].tolist())
    return f"[{shown}{', ...' if len(indices) > 6 else ''}]"
