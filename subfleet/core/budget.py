"""Budgets of devices, and the widest prefix sub-network that meets one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from subfleet.core.cost import Cost
from subfleet.core.errors import InputError
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


def width_map(net: SuperNetwork, width: float) -> IndexMap:
    """The prefix map of a width; groups that it keeps whole are left out, so 1.0 is full."""
    return net.space.canonical(IndexMap.prefix(width_counts(net, width)))


@lru_cache(maxsize=16)
def distinct_widths(net: SuperNetwork) -> tuple[float, ...]:
    """The widths, increasing, at which `width_map` changes: each gives another map.

    Between two of them the map is that of the upper one.
    """
    sizes = {net.space.size(group) for group in net.elastic}
    return tuple(sorted({count / size for size in sizes for count in range(1, size + 1)} | {1.0}))


def largest_width(net: SuperNetwork, budget: Budget) -> float:
    """The largest width whose sub-network meets the budget, by bisection over all widths.

    Costs are counted as papers do: no biases, no norms. Raises `InputError` when even
    the smallest sub-network is too large.
    """
    widths = distinct_widths(net)
    low, high = -1, len(widths) - 1  # widths[low] is feasible, those above high are not
    while low < high:
        middle = (low + high + 1) // 2
        if budget.feasible(net.cost(width_map(net, widths[middle]))):
            low = middle
        else:
            high = middle - 1
    if low < 0:
        least = net.cost(width_map(net, widths[0]))
        raise InputError(
            f"budget {budget} is below the smallest sub-network of {net.name!r}, which takes "
            f"flops={least.flops:,} and params={least.params:,}; "
            "raise the budget or choose a smaller model"
        )
    return widths[low]


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A kind of device: its share of the clients, and a width or a budget.

    `share` is a weight: shares need not sum to 1. Give either `width` in (0, 1], or
    `flops` (multiply-accumulates a sample), `params`, or both of these.
    """

    name: str
    share: float
    width: float | None = None
    flops: float | None = None
    params: float | None = None

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
        try:
            Budget(flops=self.flops, params=self.params)
        except InputError as error:
            raise InputError(f"tier {self.name!r}: {error}") from error

    @property
    def budget(self) -> Budget:
        """The limits; without any when the tier fixes its width."""
        return Budget(flops=self.flops, params=self.params)

    def largest_width(self, net: SuperNetwork) -> float:
        """The tier's width, or the largest that its budget allows; see `largest_width`."""
        if self.width is not None:
            return self.width
        try:
            return largest_width(net, self.budget)
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
