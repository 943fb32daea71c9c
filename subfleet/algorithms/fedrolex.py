"""FedRolex: sub-networks cut by a window that rolls over the channels.

Alam et al., "FedRolex: Model-Heterogeneous Federated Learning with Rolling
Sub-Model Extraction", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from subfleet.algorithms.local import IndexedAveraging, Statistics
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedRolex(IndexedAveraging):
    """In round r a tier of n_g units trains units r, r+1, ..., r+n_g-1 (mod C_g) of group g.

    Over C_g rounds every unit of a group is trained equally often, so that no
    part of the super-network is left to the richest clients.
    """

    statistics: Statistics = "indexed_mean"

    paper: ClassVar[str] = "Alam et al. 2022"

    def __post_init__(self) -> None:
        if self.local_statistics:
            raise InputError(
                'algorithm.statistics = "local": FedRolex moves every client\'s window each round, '
                "so that statistics kept on a client would belong to other channels; "
                'use "indexed_mean", or a model without BatchNorm'
            )

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The tier's window in this round (rounds count from 1, windows start at 0).

        Blocks that the tier skips, and its kernels, stay as they are.
        """
        space, own = self.setting.net.space, self.setting.tiers[tier].map
        counts = space.counts_by_group(own)
        rolled = IndexMap.rolling(space, {g: counts[g] for g in space.widths}, start=round - 1)
        return space.canonical(IndexMap(dict(own.kept) | dict(rolled.kept)))
