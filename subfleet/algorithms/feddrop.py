"""FedDrop: federated dropout, by which clients train random sub-networks.

Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client
Resource Requirements", 2018. The settings are those of its use as a baseline in
"ADDS: Adaptive Differentiable Sampling for Robust Multi-Party Learning".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from subfleet.algorithms.local import IndexedAveraging
from subfleet.core import seeds
from subfleet.core.algorithm import Cohort, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedDrop(IndexedAveraging):
    """Each round keeps a random share `keep` of the units of every hidden layer.

    of group g:  n_g = max(1, round(keep C_g)) units, all sets of so many equally likely
    server:      w_j <- sum_{k covers j} n_k w_kj / sum_{k covers j} n_k

    A round's clients share one sub-network, or have one each (`per_client`). It is
    trained as the small network that it is, without rescaling of what units give. The
    share kept is 0.75: what its users call "drop rate 0.75" only fits the costs that they
    print if three quarters stay.

    A tier whose budget allows fewer units takes as many as it may, out of the same draw:
    the units that poor clients train are among those of the rich.

    Options:
        keep: In (0, 1]: the share of the units of each hidden layer that stay, or as many as
            the tier's budget allows where that is fewer.
        per_client: Whether each client has a sub-network of its own; else a round's clients
            share one.
    """

    keep: float = 0.75
    per_client: bool = False

    paper: ClassVar[str] = "Caldas et al. 2018"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(
                f"algorithm.keep={self.keep} is outside (0, 1]; "
                "give the share of the units that stay, such as 0.75"
            )
        if self.keep < 1 and not self.setting.net.space.widths:
            raise InputError(
                f"algorithm.keep={self.keep}: {self.setting.net.name} has no hidden units that "
                "could be dropped; set keep = 1.0, or take a model with hidden layers"
            )
        if self.local_statistics:
            raise InputError(
                'algorithm.statistics = "local": FedDrop draws every round\'s units anew, so that '
                "statistics kept on a client would belong to other channels; "
                'use "indexed_mean", or a model without BatchNorm'
            )

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The tier's sub-network of a round: its blocks and kernels, and units drawn for all."""
        return self._drawn(tier, round, client=-1)

    def _drawn(self, tier: int, round: int, client: int) -> IndexMap:
        space, own = self.setting.net.space, self.setting.tiers[tier].map
        allowed = space.counts_by_group(own)
        draw = seeds.generator(self.setting.seed, "kept units", round=round, client=client)
        kept = {}
        for group in space.widths:
            size = space.size(group)
            order = draw.permutation(size)  # one for all tiers, whatever they take of it
            kept[group] = np.sort(order[: min(kept_units(self.keep, size), allowed[group])])
        return space.canonical(IndexMap(dict(own.kept) | kept))

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Everybody trains the map of its tier, or one of its own."""
        plan = super().plan(state, cohort, round)
        if not self.per_client:
            return plan
        tasks = [replace(t, map=self._drawn(t.tier, round, t.client)) for t in plan.tasks]
        return replace(plan, tasks=tasks)


def kept_units(keep: float, size: int) -> int:
    """How many of `size` units stay: round(keep * size), halves up, and at least one.

    >>> kept_units(0.75, 64), kept_units(0.5, 5), kept_units(0.01, 5)
    (48, 3, 1)
    """
    return max(1, int(keep * size + 0.5))
