"""Indexed aggregation: one addable value for everything that sub-networks return.

With m_k[j] in {0, 1} the coverage of client k at coordinate j and a_k its weight,

    num[j] = sum_k a_k m_k[j] theta_k[j]        den[j] = sum_k a_k m_k[j]
    w_new[j] = num[j] / den[j] if den[j] > 0 else w[j]

a_k = 1 gives ADDS (Eq. 19), a_k = n_k gives APFL's FedPA and, with full maps, FedAvg.
Sums are float64 and clients are added one by one, in the order of the calls. A leaf
that no map cuts (see `subfleet.core.units`) is covered as a whole by whoever returns it.
What clients return as factors (`subfleet.core.lowrank`) is multiplied out for several at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from subfleet.core import wide
from subfleet.core.errors import InputError
from subfleet.core.lowrank import LowRank, Owed, dense
from subfleet.core.units import IndexMap, Shaped, Tensors, UnitSpace

DENSE_LIMIT = 8
"""With more distinct maps than this an update keeps full-size sums instead of one per map."""

Normaliser = Literal["count", "all"]
PartKey = tuple[bytes, frozenset[str]]


@dataclass
class Part:
    """The sum over all clients with one map and one set of tensor names."""

    map: IndexMap
    sums: Tensors  # float64, in the small space, without what is owed
    weight: float  # sum_k a_k
    clients: int
    owed: dict[str, Owed] = field(default_factory=dict)

    @property
    def total(self) -> Tensors:
        """sum_k a_k theta_k in the small space, float64."""
        for name, owed in self.owed.items():
            self.sums[name] = owed.settled(self.sums.get(name))
        self.owed = {}
        return self.sums


@dataclass
class Dense:
    """Full-size sums, float64, for the tensors that any client returned."""

    num: Tensors = field(default_factory=dict)
    den: Tensors = field(default_factory=dict)
    units: dict[str, np.ndarray] = field(default_factory=dict)  # clients a unit, int64 (C_g,)


@dataclass
class Update:
    """A sum over clients: (num, den) of the formulas above, in the cheapest form.

    Clients with equal maps are summed in their small space and scattered once, by
    `finish`. An update that meets more than `DENSE_LIMIT` maps becomes dense, once and
    for all; either `parts` or `dense` holds everything. A tensor that a client did not
    return has coverage 0 for it.

    An update that was unpickled may rest on read-only memory (Ray's object store):
    it is copied before anything is added to it.
    """

    parts: dict[PartKey, Part] = field(default_factory=dict)
    dense: Dense | None = None
    weight: float = 0.0  # sum of a_k over all clients
    clients: int = 0
    owned: bool = field(default=True, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # NumPy arrays, since Ray hands those out without copying them.
        parts = [(p.map, _arrays(p.total), p.weight, p.clients) for p in self.parts.values()]
        dense = self.dense and (
            _arrays(self.dense.num),
            _arrays(self.dense.den),
            self.dense.units,
        )
        return {"parts": parts, "dense": dense, "weight": self.weight, "clients": self.clients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = [Part(m, _tensors(total), w, n) for m, total, w, n in state["parts"]]
        self.parts = {_key(part.map, part.total): part for part in parts}
        self.dense = None
        if state["dense"] is not None:
            num, den, units = state["dense"]
            self.dense = Dense(_tensors(num), _tensors(den), dict(units))
        self.weight, self.clients, self.owned = state["weight"], state["clients"], False


def accumulate(
    update: Update,
    space: UnitSpace,
    map: IndexMap,
    tensors: Mapping[str, Tensor | LowRank],
    weight: float = 1.0,
) -> None:
    """Add one client, in place: `tensors` are its small tensors, `weight` its a_k >= 0.

    The tensors are on the CPU, of any floating type, and are not kept; factors may be on any
    device, and are kept for a while. Raises `InputError` for a weight that is negative or not
    finite and for wrong shapes.

    >>> from subfleet.core.units import Unit
    >>> space = UnitSpace({"h": 4}, {"b": (Unit("h"),)}, {"b": (4,)})
    >>> update = Update()
    >>> accumulate(update, space, IndexMap.full(), {"b": torch.ones(4)}, 1)
    >>> accumulate(update, space, IndexMap.prefix({"h": 2}), {"b": torch.full((2,), 3.0)}, 3)
    >>> finish(update, space, {"b": torch.zeros(4)})["b"].tolist()
    [2.5, 2.5, 1.0, 1.0]
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise InputError(f"a client has aggregation weight {weight}; weights are finite and >= 0")
    _own(update)
    weight = float(weight)
    if update.dense is not None:
        written = {name: tensor.cpu() for name, tensor in dense(tensors).items()}
        _add_dense(update.dense, space, map, written, weight, clients=1, scale=weight)
    else:
        key = _key(map, tensors)
        part = update.parts.get(key)
        if part is None:
            update.parts[key] = _first(space, map, tensors, weight)
            if len(update.parts) > DENSE_LIMIT:
                _densify(update, space)
        else:
            _add_to_part(part, tensors, weight)
    update.weight += weight
    update.clients += 1


def settle(update: Update) -> None:
    """Multiply out, in place, what clients returned as factors."""
    for part in update.parts.values():
        _ = part.total


def merge(a: Update, b: Update, space: UnitSpace, *, reuse: bool = False) -> Update:
    """The sum of two updates; neither is written to.

    With `reuse` the first may be used up to hold the result, which saves a copy: give
    it only for an update that nobody reads again. The bits are the same either way.
    """
    if not a.owned and a.dense is b.dense is None and a.parts.keys() == b.parts.keys():
        return _summed(a, b)
    result = a if reuse else _shallow(a)
    _own(result)
    for key, part in b.parts.items():
        if result.dense is not None:
            _add_part_dense(result.dense, space, part)
        elif (mine := result.parts.get(key)) is not None:
            _add_sums(mine.total, part.total)
            mine.weight += part.weight
            mine.clients += part.clients
        else:
            result.parts[key] = _copy_part(part)
            if len(result.parts) > DENSE_LIMIT:
                _densify(result, space)
    if b.dense is not None:
        if result.dense is None:
            _densify(result, space)
        assert result.dense is not None
        _add_sums(result.dense.num, b.dense.num)
        _add_sums(result.dense.den, b.dense.den)
        for group, counts in b.dense.units.items():
            result.dense.units[group] = result.dense.units.get(group, 0) + counts
    result.weight += b.weight
    result.clients += b.clients
    return result


def finish(
    update: Update,
    space: UnitSpace,
    current: Mapping[str, Tensor],
    normaliser: Normaliser = "count",
) -> Tensors:
    """The new tensors, in the dtypes of `current`.

    "count" divides by the weight that covers a coordinate and keeps the current value
    where nobody does. "all" divides by the weight of all clients, so that those who do
    not cover a coordinate pull it towards its current value:
    w + sum_k p_k pad(w_k - w[I_k]) with p_k = a_k / sum a.
    Tensors that nobody returned come back as they are (the same objects). Raises
    `InputError` when clients returned a tensor that `current` does not hold in that shape.
    """
    if normaliser not in ("count", "all"):
        raise InputError(f"unknown normaliser {normaliser!r}; choose count or all")
    if normaliser == "count" and (only := _only_full_part(update, space)) is not None:
        _refuse_misfits(only.total, current)
        mean = {n: wide.mean(t, only.weight, current[n].dtype) for n, t in only.total.items()}
        return {name: mean.get(name, tensor) for name, tensor in current.items()}
    num, den = sums(update, space)
    _refuse_misfits(num, current)
    new = dict(current)
    for name in num:
        now = current[name]
        if normaliser == "count":
            covered = den[name] > 0
            mean = num[name].div_(den[name].masked_fill_(~covered, 1.0))
            new[name] = torch.where(covered, mean.to(now.dtype), now)
        elif update.weight > 0:
            before = now.to(torch.float64)
            step = num[name].sub_(den[name].mul_(before)).div_(update.weight)
            new[name] = step.add_(before).to(now.dtype)
    return new


def sums(update: Update, space: UnitSpace) -> tuple[Tensors, Tensors]:
    """(num, den) at full size, float64, fresh: for rules other than `finish`'s."""
    result = Dense()
    for part in update.parts.values():
        _add_part_dense(result, space, part)
    if update.dense is not None:
        _add_sums(result.num, update.dense.num)
        _add_sums(result.den, update.dense.den)
    return result.num, result.den


def coverage_counts(update: Update, space: UnitSpace) -> dict[str, np.ndarray]:
    """For each group, how many clients trained each unit: int64, shape (C_g,)."""
    counts = {group: np.zeros(size, dtype=np.int64) for group, size in space.groups.items()}
    for part in update.parts.values():
        _count(counts, space, part.map, part.clients)
    if update.dense is not None:
        for group, more in update.dense.units.items():
            counts[group] += more
    return counts


# -- parts and dense sums


def _key(map: IndexMap, tensors: Mapping[str, Tensor | LowRank]) -> PartKey:
    return map.key, frozenset(tensors)


def _first(
    space: UnitSpace, map: IndexMap, tensors: Mapping[str, Tensor | LowRank], weight: float
) -> Part:
    space.check(tensors, map)
    part = Part(map, {}, weight, 1)
    for name, tensor in tensors.items():
        _add(part, name, tensor, weight)
    return part


def _add_to_part(part: Part, tensors: Mapping[str, Tensor | LowRank], weight: float) -> None:
    for name, tensor in tensors.items():
        _add(part, name, tensor, weight)
    part.weight += weight
    part.clients += 1


def _add(part: Part, name: str, tensor: Tensor | LowRank, weight: float) -> None:
    """Num += a_k theta_k, of one tensor."""
    total, owed = part.sums.get(name), part.owed.get(name)
    known = total if owed is None else owed
    if known is not None and tensor.shape != known.shape:
        raise _shapes_differ(name, tensor, known)
    if isinstance(tensor, LowRank):
        owed = part.owed.setdefault(name, Owed(tensor.shape))
        if owed.is_much(tensor):
            part.sums[name] = owed.multiplied(total)
        owed.add(tensor, weight)
    elif total is not None:
        wide.add_(total, tensor, weight)
    else:
        part.sums[name] = wide.widened(tensor, weight)


def _summed(a: Update, b: Update) -> Update:
    """The sum of two updates of the same parts, made anew: no copy of one before the other."""
    parts = {}
    for key, mine in a.parts.items():
        other = b.parts[key]
        total = {name: _plus(name, t, other.total[name]) for name, t in mine.total.items()}
        parts[key] = Part(mine.map, total, mine.weight + other.weight, mine.clients + other.clients)
    return Update(parts, None, a.weight + b.weight, a.clients + b.clients)


def _plus(name: str, a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise _shapes_differ(name, b, a)
    return a + b


def _add_dense(
    dense: Dense,
    space: UnitSpace,
    map: IndexMap,
    tensors: Mapping[str, Tensor],
    weight: float,
    *,
    clients: int,
    scale: float,
) -> None:
    """Add where the map covers: num += scale * tensors, den += weight."""
    space.check(tensors, map)
    for name, tensor in tensors.items():
        if name not in dense.num:
            shape = space.full_shape(name, tensor)
            dense.num[name] = torch.zeros(shape, dtype=torch.float64)
            dense.den[name] = torch.zeros(shape, dtype=torch.float64)
    space.scatter_add_(dense.num, tensors, map, alpha=scale)
    space.add_constant_({name: dense.den[name] for name in tensors}, map, weight)
    if not dense.units:
        dense.units = {g: np.zeros(size, dtype=np.int64) for g, size in space.groups.items()}
    _count(dense.units, space, map, clients)


def _add_part_dense(dense: Dense, space: UnitSpace, part: Part) -> None:
    _add_dense(dense, space, part.map, part.total, part.weight, clients=part.clients, scale=1.0)


def _densify(update: Update, space: UnitSpace) -> None:
    update.dense = Dense()
    for part in update.parts.values():
        _add_part_dense(update.dense, space, part)
    update.parts = {}


def _count(counts: dict[str, np.ndarray], space: UnitSpace, map: IndexMap, clients: int) -> None:
    for group, units in space.used(map).items():
        counts[group][units] += clients


def _add_sums(into: Tensors, other: Tensors) -> None:
    for name, tensor in other.items():
        if name not in into:
            into[name] = tensor.clone()
        elif tensor.shape == into[name].shape:
            into[name].add_(tensor)
        else:
            raise _shapes_differ(name, tensor, into[name])


def _shapes_differ(name: str, tensor: Shaped, total: Shaped) -> InputError:
    return InputError(
        f"tensor {name!r} has shape {tuple(tensor.shape)}, other clients with its map "
        f"{tuple(total.shape)}; use the map that the tensor was cut with"
    )


def _refuse_misfits(returned: Tensors, current: Mapping[str, Tensor]) -> None:
    if extra := sorted(returned.keys() - current.keys()):
        raise InputError(
            f"clients returned tensors {extra} that the server does not hold; "
            "leave them out of the update or keep them on the server"
        )
    for name, tensor in returned.items():
        if tensor.shape != current[name].shape:
            raise InputError(
                f"clients returned tensor {name!r} with full shape {tuple(tensor.shape)}, the "
                f"server holds {tuple(current[name].shape)}; give both one shape"
            )


def _only_full_part(update: Update, space: UnitSpace) -> Part | None:
    if len(update.parts) != 1:
        return None
    (part,) = update.parts.values()
    return part if part.weight > 0 and part.map.is_full(space) else None


# -- ownership and transport


def _shallow(update: Update) -> Update:
    return Update(dict(update.parts), update.dense, update.weight, update.clients, owned=False)


def _own(update: Update) -> None:
    """Copy what the update only borrows, so that it may be added to in place."""
    if update.owned:
        return
    update.parts = {key: _copy_part(part) for key, part in update.parts.items()}
    if update.dense is not None:
        num, den, units = update.dense.num, update.dense.den, update.dense.units
        update.dense = Dense(
            {name: tensor.clone() for name, tensor in num.items()},
            {name: tensor.clone() for name, tensor in den.items()},
            {group: counts.copy() for group, counts in units.items()},
        )
    update.owned = True


def _copy_part(part: Part) -> Part:
    total = {name: tensor.clone() for name, tensor in part.total.items()}
    return Part(part.map, total, part.weight, part.clients)


def _arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.numpy(force=True) for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> Tensors:
    with warnings.catch_warnings():
        # torch warns that read-only memory must not be written to; `_own` sees to that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
