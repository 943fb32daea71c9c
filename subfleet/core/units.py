"""Unit groups, and how each axis of each tensor depends on them.

A *unit* is a channel or a neuron. A *unit group* is a set of units that are kept
or dropped together everywhere they appear. An *axis binding* says which indices
of one tensor axis belong to the kept units; a `UnitSpace` holds the bindings of a
whole super-network, cuts sub-networks out of it and puts them back.

A tree may hold leaves beside the network's own tensors. A leaf whose name ends, after
its last "/", in the name of a tensor is cut like that tensor: "momentum/conv1.weight"
like "conv1.weight". Every other leaf is *free*: no map cuts it, it travels whole, and
whoever returns it covers all of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subfleet.core.bindings import Binding as Binding
from subfleet.core.bindings import Block as Block
from subfleet.core.bindings import Concat as Concat
from subfleet.core.bindings import Free as Free
from subfleet.core.bindings import Gates as Gates
from subfleet.core.bindings import Unit as Unit
from subfleet.core.bindings import extent as extent
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.maps import IndexMap as IndexMap

Tensors = dict[str, Tensor]
"""A flat parameter tree with module-style names, such as "conv1.weight"."""


class _Cut(NamedTuple):
    """How one tensor is sliced: contiguous axes as slices, the others by index."""

    shape: torch.Size | None  # None: a free leaf, of any shape
    slices: tuple[slice, ...] | None  # None: every axis whole
    select: tuple[tuple[int, Tensor], ...]  # (axis, int64 indices) of non-contiguous axes
    grid: tuple[Tensor, ...] | None  # broadcast indices when several axes are selected


_FREE = _Cut(None, None, (), None)


class _Cuts(dict[str, _Cut]):
    """The cuts of one map; a name that is not a tensor's own is looked up by the rule above."""

    def __missing__(self, name: str) -> _Cut:
        return self.get(_last(name), _FREE)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


_MAX_CUTS = 256  # random maps differ for every client; keep a bundle's worth


@dataclass(frozen=True)
class UnitSpace:
    """The unit groups of a super-network and the axis bindings of its tensors.

    `groups`: units of each group. `axes`: one binding for each axis of each tensor.
    `shapes`: the full shapes. Raises `InputError` where they contradict each other.

    >>> space = UnitSpace({"h": 3}, {"w": (Unit("h"), Free())}, {"w": (3, 2)})
    >>> w = {"w": torch.arange(6.0).reshape(3, 2)}
    >>> space.extract(w, IndexMap.of({"h": [0, 2]}))["w"].tolist()
    [[0.0, 1.0], [4.0, 5.0]]
    """

    groups: Mapping[str, int]
    axes: Mapping[str, tuple[Binding, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    _cuts: OrderedDict[bytes, _Cuts] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

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

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups, "axes": self.axes, "shapes": self.shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cuts=OrderedDict())

    # -- what a map means here

    @property
    def num_units(self) -> int:
        """J_w, the units of all groups together."""
        return sum(self.groups.values())

    def size(self, group: str) -> int:
        """C_g, the units of one group; `InputError` for an unknown group."""
        if group not in self.groups:
            raise InputError(f"unknown unit group {group!r}; {did_you_mean(group, self.groups)}")
        return self.groups[group]

    def validate(self, map: IndexMap) -> None:
        """Raise `InputError` for an unknown group or a unit beyond its group."""
        for group, indices in map.kept.items():
            size = self.size(group)
            if indices[-1] >= size:
                raise InputError(
                    f"group {group!r} has units 0 to {size - 1}, the map keeps unit "
                    f"{int(indices[-1])}; keep units below {size}"
                )

    def canonical(self, map: IndexMap) -> IndexMap:
        """The same map without the groups that it keeps whole, so that equal means equal."""
        kept = {g: i for g, i in map.kept.items() if len(i) < self.size(g)}
        return map if len(kept) == len(map.kept) else IndexMap(kept)

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
        raise TypeError(f"{binding!r} is not an axis binding")

    def _units(self, map: IndexMap, group: str) -> np.ndarray:
        kept = map.kept.get(group)
        return np.arange(self.size(group)) if kept is None else kept

    def bound(self, name: str) -> str | None:
        """The tensor whose bindings cut a leaf of this name; None for a free leaf.

        >>> space = UnitSpace({"h": 3}, {"w": (Unit("h"),)}, {"w": (3,)})
        >>> space.bound("w"), space.bound("momentum/w"), space.bound("device")
        ('w', 'w', None)
        """
        if name in self.shapes:
            return name
        last = _last(name)
        return last if last in self.shapes else None

    def full_shape(self, name: str, leaf: Tensor) -> tuple[int, ...]:
        """The shape of a leaf before any cut; a free leaf's is its own."""
        bound = self.bound(name)
        return tuple(leaf.shape) if bound is None else tuple(self.shapes[bound])

    def slice_shapes(self, map: IndexMap) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the sub-network."""
        counts = self.counts_by_group(map)
        return {
            name: tuple(
                size if isinstance(binding, Free) else extent(binding, counts)
                for binding, size in zip(bindings, self.shapes[name], strict=True)
            )
            for name, bindings in self.axes.items()
        }

    def slice_numel(self, map: IndexMap, without: Collection[str] = ()) -> int:
        """Entries of all tensors of the sub-network together, but for those in `without`."""
        shapes = self.slice_shapes(map)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in without)

    def cut_numel(self, tensors: Mapping[str, Tensor], map: IndexMap) -> int:
        """Entries of the sub-network's cut of a tree of full tensors, free leaves whole."""
        shapes = self.slice_shapes(map)
        return sum(
            leaf.numel() if (of := self.bound(name)) is None else math.prod(shapes[of])
            for name, leaf in tensors.items()
        )

    # -- cutting out and putting back

    def extract(
        self, tensors: Mapping[str, Tensor], map: IndexMap, *, copy: bool = True
    ) -> Tensors:
        """The sub-network's tensors, `T[ix_(axis 0, axis 1, ...)]`, under the same names.

        With `copy` the results are fresh and contiguous. Without, contiguous cuts (full
        and prefix maps) are views of `tensors`: cheaper, and not to be written to.
        Names absent from `tensors` stay absent; dtype and device are kept.
        """
        cuts = self._cuts_for(map)
        small = {}
        for name, tensor in tensors.items():
            cut = cuts[name]
            piece = tensor if cut.slices is None else tensor[cut.slices]
            for axis, index in cut.select:
                piece = piece.index_select(axis, _on(index, tensor))
            if copy and not cut.select:
                piece = piece.clone(memory_format=torch.contiguous_format)
            small[name] = piece
        return small

    def scatter(
        self, small: Mapping[str, Tensor], map: IndexMap, out: Tensors | None = None
    ) -> Tensors:
        """Full tensors that hold `small` where the map covers them.

        Elsewhere they are 0, or, when `out` is given, what `out` holds: it is written in
        place and returned. Names absent from `small` stay absent (or untouched).
        """
        if out is None:
            out = {n: t.new_zeros(self.full_shape(n, t)) for n, t in small.items()}
        cuts = self._cuts_for(map)
        for name, tensor in small.items():
            cut = self._checked(cuts, name, tensor, out)
            view = out[name] if cut.slices is None else out[name][cut.slices]
            if cut.grid is not None:
                view[tuple(_on(i, tensor) for i in cut.grid)] = tensor.to(view.dtype)
            elif cut.select:
                axis, index = cut.select[0]
                view.index_copy_(axis, _on(index, tensor), tensor.to(view.dtype))
            else:
                view.copy_(tensor)
        return out

    def scatter_add_(
        self, dense: Tensors, small: Mapping[str, Tensor], map: IndexMap, alpha: float = 1.0
    ) -> None:
        """`dense[covered] += alpha * small`, in place and in the dtype of `dense`."""
        cuts = self._cuts_for(map)
        for name, tensor in small.items():
            cut = self._checked(cuts, name, tensor, dense)
            view = dense[name] if cut.slices is None else dense[name][cut.slices]
            if cut.grid is not None:
                grid = tuple(_on(i, tensor) for i in cut.grid)
                view[grid] = view[grid].add_(tensor, alpha=alpha)
            elif cut.select:
                axis, index = cut.select[0]
                view.index_add_(axis, _on(index, tensor), tensor.to(view.dtype), alpha=alpha)
            else:
                view.add_(tensor, alpha=alpha)

    def add_constant_(self, dense: Tensors, map: IndexMap, value: float) -> None:
        """`dense[covered] += value` for every name in `dense`, in place."""
        cuts = self._cuts_for(map)
        for name, tensor in dense.items():
            cut = cuts[name]
            view = tensor if cut.slices is None else tensor[cut.slices]
            if cut.grid is not None:
                grid = tuple(_on(i, tensor) for i in cut.grid)
                view[grid] = view[grid].add_(value)
            elif cut.select:
                axis, at = cut.select[0][0], _on(cut.select[0][1], tensor)
                view.index_copy_(axis, at, view.index_select(axis, at).add_(value))
            else:
                view.add_(value)

    def coverage(self, map: IndexMap, dtype: torch.dtype = torch.float32) -> Tensors:
        """1 where the map keeps a coordinate of the network, 0 elsewhere; full shapes."""
        dense = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes.items()}
        self.add_constant_(dense, map, 1.0)
        return dense

    def check(self, small: Mapping[str, Tensor], map: IndexMap) -> None:
        """Raise `InputError` unless every tensor has the shape that the map cuts out.

        Free leaves have any shape.
        """
        cuts = self._cuts_for(map)
        for name, tensor in small.items():
            self._checked(cuts, name, tensor)

    def _checked(
        self, cuts: _Cuts, name: str, small: Tensor, full: Mapping[str, Tensor] | None = None
    ) -> _Cut:
        cut = cuts[name]
        if cut.shape is None:
            if full is not None and small.shape != full[name].shape:
                raise InputError(
                    f"tensor {name!r} has shape {tuple(small.shape)}, elsewhere "
                    f"{tuple(full[name].shape)}; no map cuts it: give it one shape"
                )
        elif small.shape != cut.shape:
            raise InputError(
                f"tensor {name!r} has shape {tuple(small.shape)}, the map cuts out "
                f"{tuple(cut.shape)}; use the map that the tensor was cut with"
            )
        return cut

    def _cuts_for(self, map: IndexMap) -> _Cuts:
        cuts = self._cuts.get(map.key)
        if cuts is None:
            self.validate(map)
            cuts = _Cuts((name, self._cut(name, map)) for name in self.axes)
            self._cuts[map.key] = cuts
            if len(self._cuts) > _MAX_CUTS:
                self._cuts.popitem(last=False)
        return cuts

    def _cut(self, name: str, map: IndexMap) -> _Cut:
        shape, slices, select = [], [], []
        for axis, (binding, size) in enumerate(
            zip(self.axes[name], self.shapes[name], strict=True)
        ):
            kept = self.indices(binding, map, size)
            shape.append(len(kept))
            first, last = int(kept[0]), int(kept[-1])
            if last - first + 1 == len(kept):
                slices.append(slice(first, last + 1))
            else:
                slices.append(slice(None))
                select.append((axis, torch.from_numpy(kept.copy())))
        whole = not select and tuple(shape) == tuple(self.shapes[name])
        return _Cut(
            torch.Size(shape), None if whole else tuple(slices), tuple(select), _grid(shape, select)
        )


def _grid(shape: list[int], select: list[tuple[int, Tensor]]) -> tuple[Tensor, ...] | None:
    """Broadcast indices over axes 0 to the last selected one; needed from two axes on.

    Every axis before the last selected one takes part, since torch moves the result's
    axes about when plain and indexed axes alternate.
    """
    if len(select) < 2:
        return None
    chosen, last = dict(select), select[-1][0]
    grid = []
    for axis in range(last + 1):
        index = chosen.get(axis, torch.arange(shape[axis]))
        grid.append(index.reshape([-1 if a == axis else 1 for a in range(last + 1)]))
    return tuple(grid)


def _on(index: Tensor, like: Tensor) -> Tensor:
    return index if like.device == index.device else index.to(like.device)
