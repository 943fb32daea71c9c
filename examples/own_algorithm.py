"""An algorithm of your own, in forty lines: FedProx with the smallest sub-network first.

    cd examples && subfleet run own_algorithm.toml

Devices train their largest sub-network, but in the first rounds everybody trains the
smallest one, and a proximal term keeps clients near the model that they were sent.
"""

from dataclasses import dataclass, replace

from subfleet.algorithms.local import IndexedAveraging
from subfleet.core.algorithm import Phase
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class GrowingFedProx(IndexedAveraging):
    """w_k <- w_k - lr (grad L_k(w_k) + mu (w_k - w)); everybody small for `small_rounds`.

    The fields are the options of `[algorithm]`, checked like every other key.

    Options:
        mu: How strongly clients are held near the model they were sent, 0 (FedPA) or more.
        small_rounds: In how many first rounds everybody trains the smallest network.
    """

    mu: float = 0.01
    small_rounds: int = 5

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise InputError(f"algorithm.mu={self.mu} is negative; use 0 (FedPA) or more")

    def map_of(self, tier: int, round: int) -> IndexMap:
        """Which part of the super-network a tier trains in a round (from 1)."""
        if round <= self.small_rounds:
            return self.setting.smallest.map
        return self.setting.tiers[tier].map

    def phase(self, round: int) -> Phase:
        """Plain local training with a proximal term; the engine does the rest."""
        plain = super().phase(round)
        rule = replace(plain.program.rule, proximal=self.mu)
        return replace(plain, program=replace(plain.program, rule=rule))
