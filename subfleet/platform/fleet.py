"""The fleet: which tier each client belongs to, as one array."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from subfleet.core import seeds
from subfleet.core.algorithm import TierSize
from subfleet.core.budget import largest_remainder


@dataclass(frozen=True)
class Fleet:
    """Clients 0 .. num_clients-1 dealt to tiers: shuffled by the seed, sizes by largest remainder.

    >>> from subfleet.core.algorithm import FULL
    >>> tiers = (TierSize("high", 0.5, FULL), TierSize("low", 0.5, FULL))
    >>> np.bincount(Fleet(tiers, 5, seed=0).tier_of).tolist()
    [3, 2]
    """

    tiers: tuple[TierSize, ...]
    num_clients: int
    seed: int

    @property
    def counts(self) -> list[int]:
        """Clients of each tier."""
        return largest_remainder([tier.share for tier in self.tiers], self.num_clients)

    @cached_property
    def tier_of(self) -> np.ndarray:
        """Each client's tier as an index into `tiers`, int16 [num_clients]."""
        shuffled = seeds.generator(self.seed, "fleet").permutation(self.num_clients)
        tier = np.empty(self.num_clients, np.int16)
        tier[shuffled] = np.repeat(np.arange(len(self.tiers), dtype=np.int16), self.counts)
        return tier

    def __getstate__(self) -> dict:
        return {"tiers": self.tiers, "num_clients": self.num_clients, "seed": self.seed}
