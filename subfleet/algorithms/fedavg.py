"""FedAvg: every client trains the same network; the server averages by samples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from subfleet.algorithms.local import IndexedAveraging, OneNetwork
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedAvg(OneNetwork, IndexedAveraging):
    """One network for all, by default the largest that the poorest tier can run (`OneNetwork`).

    w <- sum_k (n_k / sum n) w_k
    """

    paper: ClassVar[str] = "McMahan et al. 2017"

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The same for every tier and round."""
        del tier, round
        return self.network
