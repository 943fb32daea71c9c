"""Budgets of devices, and the widest sub-network that meets one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from subfleet.core.cost import Cost
from subfleet.core.errors import InputError
from subfleet.core.presence import centre
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

_SLACK = 1e-9  # 0.1 * 10 units are 1 unit, although 0.1 * 10 may round above 1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits on a sub-network: multiply-accumulates a sample, parameters, or both.

    >>> Budget(flops=100).feasible(Cost(params=7, macs=100))
    True
    """

    flops: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("flops", self.flops), ("params", self.params)):
            if limit is not None and not limit > 0:
                raise InputError(f"budget {name} is {limit}; give a limit above 0, or none")

    def feasible(self, cost: Cost) -> bool:
        """Whether every limited cost is at most its limit."""
        return (self.flops is None or cost.flops <= self.flops) and (
            self.params is None or cost.params <= self.params
        )

    def __str__(self) -> str:
        limits = (("flops", self.flops), ("params", self.params))
        return ", ".join(f"{name}={limit:,.0f}" for name, limit in limits if limit is not None)


def width_counts(net: SuperNetwork, width: float) -> dict[str, int]:
    """max(1, ceil(width * C)) units of every elastic group; the other groups are whole.

    `width` is in (0, 1], else `InputError`.
    """
    if not 0 < width <= 1:
        raise InputError(f"width {width} is out of range; give a number above 0 and at most 1")
    return {g: max(1, math.ceil(width * net.space.size(g) - _SLACK)) for g in net.elastic}


def width_map(
    net: SuperNetwork, width: float, *, depth: float = 1.0, kernel: int | None = None
) -> IndexMap:
    """The prefix map of a width; groups that it keeps whole are left out, so 1.0 is full.

    Of every stage it keeps the first ceil(depth * n) of the n blocks that may be skipped,
    and of every kernel that may be smaller the largest size up to `kernel`, or else its
    smallest. Both leave a network as it is that has no such blocks or kernels.
    """
    if not 0 <= depth <= 1:
        raise InputError(f"depth {depth} is out of range; give a number from 0 to 1")
    if kernel is not None and kernel < 1:
        raise InputError(f"kernel {kernel} is out of range; give a size of 1 or more")
    kept: dict[str, np.ndarray] = {g: np.arange(n) for g, n in width_counts(net, width).items()}
    for stage in net.stages:
        for block in stage[math.ceil(depth * len(stage) - _SLACK) :]:
            kept[block] = np.arange(0)
    if kernel is not None:
        for group, sizes in net.space.kernels.items():
            size = max((k for k in sizes if k <= kernel), default=min(sizes))
            kept[group] = centre(net.space.size(group), size)
    return net.space.canonical(IndexMap(kept))


def uniform_map(net: SuperNetwork, width: float) -> IndexMap:
    """The prefix map of the model of `width` times the width, rounded as its authors do.

    MobileNetV2 rounds to multiples of 8, say; a model that says nothing has `width_map`'s.
    """
    if net.thinned is None or not 0 < width < 1:
        return width_map(net, width)
    counts = net.thinned(width)
    return net.space.canonical(IndexMap.prefix({g: counts[g] for g in net.elastic}))


@lru_cache(maxsize=16)
def distinct_widths(net: SuperNetwork) -> tuple[float, ...]:
    """The widths, increasing, at which `width_map` changes: each gives another map.

    Between two of them the map is that of the upper one.
    """
    sizes = {net.space.size(group) for group in net.elastic}
    return tuple(sorted({count / size for size in sizes for count in range(1, size + 1)} | {1.0}))


def largest_width(
    net: SuperNetwork, budget: Budget, *, depth: float = 1.0, kernel: int | None = None
) -> float:
    """The largest width whose sub-network meets the budget, by bisection over all widths.

    Costs are counted as papers do: no biases, no norms. `depth` and `kernel` as in
    `width_map`. Raises `InputError` when even the smallest sub-network is too large.
    """
    if net.uncounted:
        raise InputError(
            f"budget {budget}: the cost of {net.name!r} is not known, for "
            f"{', '.join(net.uncounted[:3])} is not counted; give a width instead, or write that "
            "layer with convolutions, linear and recurrent layers"
        )
    widths = distinct_widths(net)
    low, high = -1, len(widths) - 1  # widths[low] is feasible, those above high are not

    def cost(at: int) -> Cost:
        return net.cost(width_map(net, widths[at], depth=depth, kernel=kernel))

    while low < high:
        middle = (low + high + 1) // 2
        if budget.feasible(cost(middle)):
            low = middle
        else:
            high = middle - 1
    if low < 0:
        least = cost(0)
        elastic = bool(net.stages or net.space.kernels)
        raise InputError(
            f"budget {budget} is below the smallest sub-network of {net.name!r}"
            f"{_at(depth, kernel) if elastic else ''}, which takes "
            f"flops={least.flops:,} and params={least.params:,}; raise the budget or choose a "
            f"smaller {'depth, kernel or ' if elastic else ''}model"
        )
    return widths[low]


def _at(depth: float, kernel: int | None) -> str:
    return f" at depth {depth:g}" + (f" and kernel {kernel}" if kernel is not None else "")


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A kind of device: its share of the clients, and a width or a budget.

    `share` is a weight: shares need not sum to 1. Give either `width` in (0, 1], or
    `flops` (multiply-accumulates a sample), `params`, or both of these. `depth`, from 0
    to 1, is the share of the blocks that may be skipped which the device keeps, and
    `kernel` the largest kernel, where a network is elastic in these.
    """

    name: str
    share: float
    width: float | None = None
    flops: float | None = None
    params: float | None = None
    depth: float = 1.0
    kernel: int | None = None

    def __post_init__(self) -> None:
        if not (self.share >= 0 and math.isfinite(self.share)):
            raise InputError(f"tier {self.name!r} has share {self.share}; give 0 or more")
        budgeted = self.flops is not None or self.params is not None
        if budgeted == (self.width is not None):
            raise InputError(
                f"tier {self.name!r} has width={self.width}, flops={self.flops}, "
                f"params={self.params}; give a width, or else flops or params or both"
            )
        if self.width is not None and not 0 < self.width <= 1:
            raise InputError(
                f"tier {self.name!r} has width {self.width}; give a number above 0 and at most 1"
            )
        if not 0 <= self.depth <= 1:
            raise InputError(f"tier {self.name!r} has depth {self.depth}; give 0 to 1")
        if self.kernel is not None and self.kernel < 1:
            raise InputError(f"tier {self.name!r} has kernel {self.kernel}; give a size from 1 up")
        try:
            Budget(flops=self.flops, params=self.params)
        except InputError as error:
            raise InputError(f"tier {self.name!r}: {error}") from error

    @property
    def budget(self) -> Budget:
        """The limits; without any when the tier fixes its width."""
        return Budget(flops=self.flops, params=self.params)

    def largest_map(self, net: SuperNetwork) -> IndexMap:
        """The map of the tier's width, or of the largest that its budget allows."""
        try:
            width = self.width
            if width is None:
                width = largest_width(net, self.budget, depth=self.depth, kernel=self.kernel)
            return width_map(net, width, depth=self.depth, kernel=self.kernel)
        except InputError as error:
            raise InputError(f"tier {self.name!r}: {error}") from error


def largest_remainder(shares: Sequence[float], n: int) -> list[int]:
    """Whole numbers in proportion to the shares that sum to n; ties go to the earlier.

    >>> largest_remainder([50, 30, 20], 7)
    [4, 2, 1]
    """
    total = math.fsum(shares)
    if any(not share >= 0 for share in shares) or not (0 < total < math.inf):
        raise InputError(
            f"shares {list(shares)} cannot be dealt out; give numbers of 0 or more, one above 0"
        )
    exact = [share * n / total for share in shares]
    counts = [math.floor(quota + _SLACK) for quota in exact]
    # Remainders that differ by rounding alone are ties.
    remainders = [round(quota - count, 9) for quota, count in zip(exact, counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))
    for i in order[: n - sum(counts)]:
        counts[i] += 1
    return counts
