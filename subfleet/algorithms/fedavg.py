"""FedAvg: every client trains the same network; the server averages by samples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from subfleet.algorithms.local import IndexedAveraging
from subfleet.core.algorithm import State
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedAvg(IndexedAveraging):
    """One network for all: by default the largest that the poorest tier can run.

    w <- sum_k (n_k / sum n) w_k

    `width` in (0, 1] fixes the network's width instead and ignores the budgets:
    ``width = 1.0`` is FedAvg with a fleet that could afford everything.
    """

    width: float | None = None

    paper: ClassVar[str] = "McMahan et al. 2017"

    def __post_init__(self) -> None:
        if self.width is not None and not 0 < self.width <= 1:
            raise InputError(
                f"algorithm.width={self.width} is outside (0, 1]; "
                "give a fraction of the channels, or leave it out to follow the budgets"
            )

    @cached_property
    def network(self) -> IndexMap:
        """The one map that every client trains."""
        if self.width is None:
            return self.setting.smallest.map
        return width_map(self.setting.net, self.width)

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The same for every tier and round."""
        del tier, round
        return self.network

    def views(self, state: State) -> dict[str, IndexMap]:
        """There is one network: the global one, which every tier runs."""
        del state
        return {"global": self.network} | {tier.name: self.network for tier in self.setting.tiers}
