"""Unit groups, how each axis of each tensor depends on them, and what a map keeps.

A *unit* is a channel or a neuron. A *unit group* is a set of units that are kept
or dropped together everywhere they appear. An *axis binding* says which indices
of one tensor axis belong to the kept units.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from subfleet.core.bindings import (
    Binding,
    Block,
    Concat,
    Free,
    Gates,
    Unit,
    Window,
    extent,
    groups_of,
)
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.maps import IndexMap
from subfleet.core.presence import When, centre, check_kernel


@dataclass(frozen=True)
class Space:
    """The unit groups of a super-network and the axis bindings of its tensors.

    `groups`: units of each group. `axes`: one binding for each axis of each tensor.
    `shapes`: the full shapes. `when`: for tensors that not every sub-network has, what a
    map must keep for them; all of it. `kernels`: groups that are the rows of a kernel, and
    the sizes it may have. Raises `InputError` where they contradict each other.
    """

    groups: Mapping[str, int]
    axes: Mapping[str, tuple[Binding, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    when: Mapping[str, tuple[When, ...]] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.axes) != set(self.shapes):
            odd = sorted(set(self.axes) ^ set(self.shapes))
            raise InputError(f"tensors {odd} have a binding or a shape, but not both; give both")
        for name, bindings in self.axes.items():
            shape = tuple(self.shapes[name])
            wanted = tuple(
                size if isinstance(binding, Free) else extent(binding, self.groups)
                for binding, size in zip(bindings, shape, strict=False)
            )
            if len(bindings) != len(shape) or wanted != shape:
                raise InputError(
                    f"tensor {name!r} has shape {shape}, its bindings say {wanted}; correct one"
                )

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The groups that stand for a block which a map may skip: of one unit each."""
        needed = {w.group for conditions in self.when.values() for w in conditions if w.least > 0}
        return tuple(group for group in self.groups if group in needed)

    @cached_property
    def widths(self) -> tuple[str, ...]:
        """The groups of channels and neurons: neither blocks nor kernels."""
        others = {*self.blocks, *self.kernels}
        return tuple(group for group in self.groups if group not in others)

    @property
    def num_units(self) -> int:
        """J_w, the channels and neurons of all groups together."""
        return sum(self.groups[group] for group in self.widths)

    def size(self, group: str) -> int:
        """C_g, the units of one group; `InputError` for an unknown group."""
        if group not in self.groups:
            raise InputError(f"unknown unit group {group!r}; {did_you_mean(group, self.groups)}")
        return self.groups[group]

    def validate(self, map: IndexMap) -> None:
        """Raise `InputError` for a map that is none of this network.

        That is: an unknown group, a unit beyond its group, nothing of a group that is no
        block, rows of a kernel that are not its centre.
        """
        for group, indices in map.kept.items():
            size = self.size(group)
            if len(indices) == 0 and group not in self.blocks:
                raise InputError(
                    f"group {group!r} keeps no unit; keep at least 1, or leave the group out to "
                    "keep all"
                )
            if len(indices) > 0 and indices[-1] >= size:
                raise InputError(
                    f"group {group!r} has units 0 to {size - 1}, the map keeps unit "
                    f"{int(indices[-1])}; keep units below {size}"
                )
            if group in self.kernels:
                check_kernel(group, size, self.kernels[group], indices)

    def canonical(self, map: IndexMap) -> IndexMap:
        """The same map without groups that it keeps whole or that nothing of it uses.

        Then equal means equal. A block that is skipped uses none of its own groups.
        """
        used = self.used(map)
        kept = {g: i for g, i in map.kept.items() if len(i) < self.size(g) and g in used}
        return map if len(kept) == len(map.kept) else IndexMap(kept)

    def used(self, map: IndexMap) -> dict[str, np.ndarray | slice]:
        """The kept units of each group that a tensor of the sub-network depends on."""
        own = {group: map.kept.get(group, slice(None)) for group in self.groups}
        if not self.when:
            return own
        counts = self.counts_by_group(map)
        return {
            group: units
            for group, units in own.items()
            if group not in self._users
            or any(self.has(name, counts) for name in self._users[group])
        }

    @cached_property
    def _users(self) -> dict[str, list[str]]:
        """The tensors whose axes depend on each group; blocks are not among the groups."""
        users: dict[str, list[str]] = {}
        for name, axes in self.axes.items():
            for group in {group for binding in axes for group in groups_of(binding)}:
                users.setdefault(group, []).append(name)
        return users

    def has(self, name: str, counts: Mapping[str, int]) -> bool:
        """Whether a tensor is part of the sub-network in which group g has `counts[g]` units."""
        return all(condition.holds(counts) for condition in self.when.get(name, ()))

    def counts_by_group(self, map: IndexMap) -> dict[str, int]:
        """Kept units of each group."""
        kept = map.kept
        return {g: len(kept[g]) if g in kept else size for g, size in self.groups.items()}

    def counts(self, map: IndexMap) -> tuple[int, ...]:
        """Kept units in the order of `groups`: the static shape of the sub-network."""
        return tuple(self.counts_by_group(map).values())

    def indices(self, binding: Binding, map: IndexMap, size: int | None = None) -> np.ndarray:
        """The kept indices of an axis, int64 and increasing; `size` is a free axis's extent."""
        match binding:
            case Free(length):
                length = length if length is not None else size
                return np.arange(extent(Free(length), self.groups))
            case Unit(group):
                return self._units(map, group)
            case Block(group, each):
                units = self._units(map, group)
                return (units[:, None] * each + np.arange(each)).reshape(-1)
            case Gates(group, gates):
                offsets = np.arange(gates) * self.size(group)
                return (offsets[:, None] + self._units(map, group)).reshape(-1)
            case Concat(parts):
                ends = np.cumsum([0] + [extent(part, self.groups) for part in parts])
                pieces = [self.indices(p, map) + e for p, e in zip(parts, ends, strict=False)]
                return np.concatenate(pieces)
            case Window(group, least):
                # Within a sub-network of a small kernel the group is smaller than what is stored.
                kept, stored = len(self._units(map, group)), max(self.size(group), least)
                return centre(stored, max(kept, least))
        raise TypeError(f"{binding!r} is not an axis binding")

    def _units(self, map: IndexMap, group: str) -> np.ndarray:
        kept = map.kept.get(group)
        return np.arange(self.size(group)) if kept is None else kept

    def slice_shapes(self, map: IndexMap) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the sub-network; those that it lacks are left out."""
        counts = self.counts_by_group(map)
        return {
            name: tuple(
                size if isinstance(binding, Free) else extent(binding, counts)
                for binding, size in zip(bindings, self.shapes[name], strict=True)
            )
            for name, bindings in self.axes.items()
            if self.has(name, counts)
        }

    def slice_numel(self, map: IndexMap, without: Collection[str] = ()) -> int:
        """Entries of all tensors of the sub-network together, but for those in `without`."""
        shapes = self.slice_shapes(map)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in without)
