"""FedUniform: the same width multiplier in every layer, the largest of a few that fits.

The baseline of "Architecture Personalization in Resource-constrained Federated Learning".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from subfleet.algorithms.local import PartialAveraging
from subfleet.core.algorithm import State, TierSize
from subfleet.core.budget import uniform_map
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedUniform(PartialAveraging):
    """Each client trains the super-network at the largest of `widths` that its budget allows.

    theta_k = max {m in widths: C(m) <= B_k}, rounded in every layer as the model's authors do

    Clients are merged by FedPA.

    Options:
        widths: The width multipliers to choose from, each in (0, 1].
    """

    widths: tuple[float, ...] = (1.0, 0.75, 0.5)

    paper: ClassVar[str] = "APFL (FedUniform)"

    def __post_init__(self) -> None:
        if not self.widths or not all(0 < width <= 1 for width in self.widths):
            raise InputError(
                f"algorithm.widths={list(self.widths)} is not a list of shares in (0, 1]; "
                "give such as [1.0, 0.75, 0.5]"
            )
        _ = self._maps  # a budget that no width meets is told at once

    @cached_property
    def _maps(self) -> tuple[IndexMap, ...]:
        return tuple(map(self._largest, self.setting.tiers))

    def _largest(self, tier: TierSize) -> IndexMap:
        net, budget = self.setting.net, tier.budget(self.setting.net)
        for width in sorted(self.widths, reverse=True):
            map = uniform_map(net, width)
            if budget.feasible(net.cost(map)):
                return map
        least = net.cost(uniform_map(net, min(self.widths)))
        raise InputError(
            f"tier {tier.name!r}: its budget {budget} is below width {min(self.widths)} of "
            f"{net.name!r}, which takes flops={least.macs:,} and params={least.params:,}; raise "
            "the budget, or add a smaller width to algorithm.widths"
        )

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The sub-network of the tier's width."""
        del round
        return self._maps[tier]

    def views(self, state: State) -> dict[str, IndexMap]:
        """The super-network, and the width of each tier."""
        names = (tier.name for tier in self.setting.tiers)
        return super().views(state) | dict(zip(names, self._maps, strict=True))
