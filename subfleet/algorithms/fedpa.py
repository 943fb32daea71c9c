"""FedPA: federated partial aggregation of width sub-networks, HeteroFL-like.

"Architecture Personalization in Resource-constrained Federated Learning"
(aggregation), with HeteroFL's prefix sub-networks (Diao et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from subfleet.algorithms.local import PartialAveraging
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedPA(PartialAveraging):
    """Each client trains the first units of every layer, as many as its budget allows."""

    paper: ClassVar[str] = "APFL (FedPA); HeteroFL, Diao et al. 2021"

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The largest prefix sub-network of the tier."""
        del round
        return self.setting.tiers[tier].map
