"""FedPA: federated partial aggregation of width sub-networks, HeteroFL-like.

"Architecture Personalization in Resource-constrained Federated Learning"
(aggregation), with HeteroFL's prefix sub-networks (Diao et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from subfleet.algorithms.local import IndexedAveraging, Statistics
from subfleet.core import aggregate
from subfleet.core.aggregate import Update
from subfleet.core.algorithm import Reduced, RoundPlan, State
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedPA(IndexedAveraging):
    """Each client trains the first units of every layer, as many as its budget allows.

    normaliser "count":  w_j <- sum_{k covers j} n_k w_kj / sum_{k covers j} n_k
    normaliser "all":    w_j <- w_j + sum_{k covers j} (n_k / sum_i n_i) (w_kj - w_j)

    BatchNorm's running statistics stay on the clients by default, as the paper
    has it: they never travel, and the widths they belong to differ.

    Options:
        normaliser: "count" averages a coordinate over the clients that have it; "all" lets
            those who have it not vote for the server's value.
    """

    statistics: Statistics = "local"
    normaliser: Literal["count", "all"] = "count"

    paper: ClassVar[str] = "APFL (FedPA); HeteroFL, Diao et al. 2021"

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The largest prefix sub-network of the tier."""
        del round
        return self.setting.tiers[tier].map

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """Partial aggregation with the chosen normaliser."""
        del plan
        assert isinstance(reduced, Update)
        params = aggregate.finish(
            reduced, self.setting.net.space, state["params"], normaliser=self.normaliser
        )
        return state | {"params": params}
