"""A client's search for the sub-network that fits it: FedCS's local channel pruning.

"Architecture Personalization in Resource-constrained Federated Learning", Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from subfleet.core.algorithm import TierSize
from subfleet.core.errors import InputError
from subfleet.core.maps import IndexMap
from subfleet.core.program import ClientResult, RunContext
from subfleet.core.pruning import Criterion, Score, Shrinking, Step, prune
from subfleet.core.supernet import SuperNetwork
from subfleet.core.trials import Statistics, Trials

BLIND = Score(0.0, 0.0)  # of a client that cannot measure: all are equal, the savings decide


@dataclass(frozen=True)
class ChannelSearch:
    """Shrinks one group of channels after the other until the client's budget holds.

    Candidates are scored on up to `samples` of the client's training rows, the same for the
    whole search, by a forward pass each. A client of a single row, of which BatchNorm has no
    statistics, goes by the costs alone. Its report is {"units": units of each elastic group},
    its trace has a row for each step.
    """

    net: SuperNetwork
    tiers: tuple[TierSize, ...]
    shrink: float
    multiple: int
    min_units: int
    min_share: float
    samples: int
    statistics: Statistics
    criterion: Criterion
    lazy: bool

    @cached_property
    def shrinking(self) -> Shrinking:
        """The rule of a step, and how far each group may shrink."""
        floors = {
            group: min(size, -(-least // self.multiple) * self.multiple)
            for group in self.net.elastic
            if (size := self.net.space.size(group))
            and (least := max(self.min_units, math.ceil(self.min_share * size)))
        }
        return Shrinking(self.shrink, floors, self.multiple)

    def check(self) -> None:
        """`InputError` for a tier whose budget no search can reach, naming tier, budget, cost."""
        least = self.net.cost(IndexMap.prefix(self.shrinking.floors))
        for tier in self.tiers:
            budget = tier.budget(self.net)
            if not budget.feasible(least):
                raise InputError(
                    f"clients of tier {tier.name!r}: their budget {budget} is below the smallest "
                    f"sub-network that the search may reach, which takes flops={least.macs:,} and "
                    f"params={least.params:,}; raise the budget, or lower algorithm.min_units="
                    f"{self.min_units} or algorithm.min_share={self.min_share}"
                )

    @property
    def passes(self) -> float:
        """About how many passes over all rows a client takes, a forward pass being a third.

        Groups shrink to some 0.7 of their channels, and at each step all of them are tried;
        lazily about a fifth.
        """
        steps = len(self.net.elastic) * math.log(0.7) / math.log(1 - self.shrink)
        return steps * len(self.net.elastic) * (0.2 if self.lazy else 1.0) / 3

    def run(self, context: RunContext) -> ClientResult:
        """One client's search, from the whole network on."""
        net, tier = self.net, self.tiers[context.task.tier]
        scorer = _Scorer(self, context)
        units, steps = prune(
            {group: net.space.size(group) for group in net.elastic},
            self.shrinking,
            tier.budget(net),
            lambda kept: net.cost(IndexMap.prefix(kept)),
            scorer,
            self.criterion,
            lazy=self.lazy,
        )
        return ClientResult(
            update={},
            report={"units": list(units.values())},
            wire_bytes=2 * len(units),  # a uint16 for each group
            trace=_trace(steps, measured=scorer.sees),
            flops=scorer.flops,
        )


class _Scorer:
    """Scores candidates on a client's rows, which are read at the first one."""

    def __init__(self, search: ChannelSearch, context: RunContext):
        self._search, self._context = search, context

    def __call__(self, units: Mapping[str, int], group: str, fewer: int) -> Score:
        return BLIND if self._trials is None else self._trials(units, group, fewer)

    @property
    def sees(self) -> bool:
        """Whether candidates are measured; also where none was needed."""
        return "_trials" not in self.__dict__ or self._trials is not None

    @property
    def flops(self) -> float:
        """Forward passes of the candidates; none where none was scored."""
        trials = self.__dict__.get("_trials")
        return 0.0 if trials is None else trials.flops

    @cached_property
    def _trials(self) -> Trials | None:
        x, y = self._context.data("train")
        if len(y) < (2 if self._search.net.statistics else 1):
            return None
        draw = self._context.generator("rows of the search")
        rows = np.sort(draw.permutation(len(y))[: self._search.samples])
        return Trials(
            self._search.net, self._context.params, x[rows], y[rows], self._search.statistics
        )


def _trace(steps: Sequence[Step], *, measured: bool) -> dict[str, list[Any]]:
    unknown = float("nan")
    return {
        "step": list(range(1, len(steps) + 1)),
        "group": [step.group for step in steps],
        "units": [step.units for step in steps],
        "accuracy": [step.score.accuracy if measured else unknown for step in steps],
        "loss": [step.score.loss if measured else unknown for step in steps],
        "flops": [step.cost.macs for step in steps],
        "params": [step.cost.params for step in steps],
    }
