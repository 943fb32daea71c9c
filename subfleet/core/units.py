"""Cutting the tensors of sub-networks out of the super-network's, and putting them back.

A `UnitSpace` says which indices of each tensor axis belong to which units
(`subfleet.core.space`), and here it slices, scatters and adds by index map.

A tree may hold leaves beside the network's own tensors. A leaf whose name ends, after
its last "/", in the name of a tensor is cut like that tensor: "momentum/conv1.weight"
like "conv1.weight". Every other leaf is *free*: no map cuts it, it travels whole, and
whoever returns it covers all of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from subfleet.core.bindings import Binding as Binding
from subfleet.core.bindings import Block as Block
from subfleet.core.bindings import Concat as Concat
from subfleet.core.bindings import Free as Free
from subfleet.core.bindings import Gates as Gates
from subfleet.core.bindings import Unit as Unit
from subfleet.core.bindings import Window as Window
from subfleet.core.bindings import extent as extent
from subfleet.core.errors import InputError
from subfleet.core.maps import IndexMap as IndexMap
from subfleet.core.presence import When as When
from subfleet.core.space import Space

Tensors = dict[str, Tensor]
"""A flat parameter tree with module-style names, such as "conv1.weight"."""


class Shaped(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size:
        """Its size along each axis."""
        ...


class _Cut(NamedTuple):
    """How one tensor is sliced: contiguous axes as slices, the others by index."""

    shape: torch.Size | None  # None: a free leaf, of any shape
    slices: tuple[slice, ...] | None  # None: every axis whole
    select: tuple[tuple[int, Tensor], ...]  # (axis, int64 indices) of non-contiguous axes
    grid: tuple[Tensor, ...] | None  # broadcast indices when several axes are selected


_FREE = _Cut(None, None, (), None)
_ABSENT = _Cut(None, None, (), None)


class _Cuts(dict[str, _Cut]):
    """The cuts of one map; a name that is not a tensor's own is looked up by the rule above."""

    def __missing__(self, name: str) -> _Cut:
        return self.get(_last(name), _FREE)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


_STATED = ("groups", "axes", "shapes", "when", "kernels")  # what a space is; the rest follows
_MAX_CUTS = 256  # random maps differ for every client; keep a bundle's worth


@dataclass(frozen=True)
class UnitSpace(Space):
    """A `Space` that cuts trees of tensors.

    >>> space = UnitSpace({"h": 3}, {"w": (Unit("h"), Free())}, {"w": (3, 2)})
    >>> w = {"w": torch.arange(6.0).reshape(3, 2)}
    >>> space.extract(w, IndexMap.of({"h": [0, 2]}))["w"].tolist()
    [[0.0, 1.0], [4.0, 5.0]]
    """

    _cuts: OrderedDict[bytes, _Cuts] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cuts=OrderedDict())

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

    def cut_numel(self, tensors: Mapping[str, Tensor], map: IndexMap) -> int:
        """Entries of the sub-network's cut of a tree of full tensors, free leaves whole."""
        shapes = self.slice_shapes(map)
        bound = {name: self.bound(name) for name in tensors}
        return sum(
            leaf.numel() if (of := bound[name]) is None else math.prod(shapes.get(of, (0,)))
            for name, leaf in tensors.items()
        )

    # -- cutting out and putting back

    def extract(
        self, tensors: Mapping[str, Tensor], map: IndexMap, *, copy: bool = True
    ) -> Tensors:
        """The sub-network's tensors, `T[ix_(axis 0, axis 1, ...)]`, under the same names.

        With `copy` the results are fresh and contiguous. Without, contiguous cuts (full
        and prefix maps) are views of `tensors`: cheaper, and not to be written to.
        Names absent from `tensors` stay absent, and so do tensors of blocks that the map
        skips; dtype and device are kept.
        """
        cuts = self._cuts_for(map)
        small = {}
        for name, tensor in tensors.items():
            cut = cuts[name]
            if cut is _ABSENT:
                continue
            piece = tensor if cut.slices is None else tensor[cut.slices]
            for axis, index in cut.select:
                piece = piece.index_select(axis, _on(index, tensor))
            if copy and not cut.select:
                piece = piece.clone(memory_format=torch.contiguous_format)
            small[name] = piece
        return small

    def within(self, map: IndexMap) -> UnitSpace:
        """The space of the sub-network itself: maps of it count units among those that are kept."""
        shapes = self.slice_shapes(map)
        counts = self.counts_by_group(map)
        return UnitSpace(
            groups={group: count for group, count in counts.items() if count},
            axes={name: self.axes[name] for name in shapes},
            shapes=shapes,
            when={
                name: kept
                for name in shapes
                if (kept := tuple(w for w in self.when.get(name, ()) if counts[w.group]))
            },
            kernels={
                group: tuple(size for size in sizes if size <= counts[group])
                for group, sizes in self.kernels.items()
            },
        )

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
            if cut is _ABSENT:
                continue
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

    def check(self, small: Mapping[str, Shaped], map: IndexMap) -> None:
        """Raise `InputError` unless every tensor has the shape that the map cuts out.

        Free leaves have any shape.
        """
        cuts = self._cuts_for(map)
        for name, tensor in small.items():
            self._checked(cuts, name, tensor)

    def _checked(
        self, cuts: _Cuts, name: str, small: Shaped, full: Mapping[str, Tensor] | None = None
    ) -> _Cut:
        cut = cuts[name]
        if cut is _ABSENT:
            raise InputError(
                f"tensor {name!r} is not part of this map's sub-network; "
                "use the map that the tensor was cut with"
            )
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
            counts = self.counts_by_group(map)
            cuts = _Cuts(
                (name, self._cut(name, map) if self.has(name, counts) else _ABSENT)
                for name in self.axes
            )
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
