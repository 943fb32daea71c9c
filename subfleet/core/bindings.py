"""Axis bindings: which indices of one tensor axis belong to the kept units of a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from subfleet.core.errors import InputError


@dataclass(frozen=True)
class Free:
    """An axis that no map cuts. Its extent is needed inside `Concat` and for costs only."""

    extent: int | None = None


@dataclass(frozen=True)
class Unit:
    """One index for each unit of the group."""

    group: str


@dataclass(frozen=True)
class Block:
    """`extent` neighbouring indices for each unit: a flattened (C, H, W) with extent H*W."""

    group: str
    extent: int


@dataclass(frozen=True)
class Gates:
    """`gates` stacked copies of the group: the rows of an LSTM, in torch's order i, f, g, o."""

    group: str
    gates: int = 4


@dataclass(frozen=True)
class Concat:
    """Bindings side by side: a bi-directional LSTM's output, a channel concatenation."""

    parts: tuple[Binding, ...]


@dataclass(frozen=True)
class Window:
    """The centre of a kernel: as many rows as the group keeps, but `least` at the fewest.

    A kernel that is computed from a larger one (Once-for-all's transformations) reads the
    larger one's centre.
    """

    group: str
    least: int


Binding = Free | Unit | Block | Gates | Concat | Window


def extent(binding: Binding, counts: Mapping[str, int]) -> int:
    """The length of an axis when group g has `counts[g]` units.

    >>> extent(Block("conv2", 49), {"conv2": 16})
    784
    """
    match binding:
        case Free(None):
            raise InputError("a free axis has no extent here; give it, as in Free(extent=10)")
        case Free(int(length)):
            return length
        case Unit(group):
            return counts[group]
        case Block(group, each):
            return counts[group] * each
        case Gates(group, gates):
            return counts[group] * gates
        case Concat(parts):
            return sum(extent(part, counts) for part in parts)
        case Window(group, least):
            return max(counts[group], least)
    raise TypeError(f"{binding!r} is not an axis binding")


def groups_of(binding: Binding) -> Iterator[str]:
    """The groups that an axis depends on.

    >>> list(groups_of(Concat((Unit("forward"), Unit("back")))))
    ['forward', 'back']
    """
    match binding:
        case Unit(group) | Block(group, _) | Gates(group, _) | Window(group, _):
            yield group
        case Concat(parts):
            for part in parts:
                yield from groups_of(part)
        case Free():
            return
