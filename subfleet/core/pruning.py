"""Greedy pruning of channels: shrink, step by step, the layer that misses its channels least.

FedCS ("Architecture Personalization in Resource-constrained Federated Learning",
Algorithm 1), after AutoSlim (Yu and Huang 2019). Nothing here knows how a sub-network is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from subfleet.core.budget import Budget
from subfleet.core.cost import Cost
from subfleet.core.errors import InputError

Criterion = Literal["accuracy", "accuracy_then_loss"]


class Score(NamedTuple):
    """What a sub-network is worth: the share of right answers, and the mean loss."""

    accuracy: float
    loss: float


class Step(NamedTuple):
    """One shrinking that was kept: the group, its units after it, and what is left then."""

    group: str
    units: int
    score: Score
    cost: Cost


@dataclass(frozen=True)
class Shrinking:
    """What one step takes from a group: the share `ratio` of its units, at least one.

    shrunk(c) = max(floor, the multiple of `multiple` nearest to c (1 - ratio), but below c)

    >>> rule = Shrinking(ratio=0.2, floors={"a": 6})
    >>> rule.shrunk("a", 10), rule.shrunk("a", 8), rule.shrunk("a", 7), rule.shrunk("a", 6)
    (8, 6, 6, None)
    """

    ratio: float
    floors: Mapping[str, int]
    multiple: int = 1

    def shrunk(self, group: str, units: int) -> int | None:
        """The units that a group of so many has after a step; None where it may not shrink."""
        if units <= self.floors[group]:
            return None
        nearest = int(units * (1 - self.ratio) / self.multiple + 0.5)
        below = (units - 1) // self.multiple
        return max(self.floors[group], min(below, nearest) * self.multiple)


def prune(
    units: Mapping[str, int],
    shrinking: Shrinking,
    budget: Budget,
    cost: Callable[[Mapping[str, int]], Cost],
    trial: Callable[[Mapping[str, int], str, int], Score],
    criterion: Criterion = "accuracy_then_loss",
    *,
    lazy: bool = False,
) -> tuple[dict[str, int], list[Step]]:
    """Shrinks one group after the other until the budget holds: the units left, and the steps.

    `trial(units, group, fewer)` scores the sub-network of `units` with `fewer` of one group.
    The step that keeps the most accuracy is taken; among equals ("accuracy_then_loss") that
    with the lowest loss; then that which saves the most operations, then parameters (these
    first where they alone are limited); then that of the first group. The last step may save
    more than is needed. Where the budget holds from the start nothing is tried. `InputError`
    when nothing can shrink any more.

    `lazy` scores a group anew only when by its last score it would be the next to shrink.
    That takes the same steps where a group's shrinking never costs less once others have
    shrunk, and is several times as fast.
    """
    left = dict(units)
    steps: list[Step] = []
    known: dict[str, _Ranked] = {}

    def ranked(group: str, fewer: int) -> _Ranked:
        score = trial(left, group, fewer)
        then = cost(left | {group: fewer})
        loss = score.loss if criterion == "accuracy_then_loss" else 0.0
        costs = (then.params, then.macs) if budget.flops is None else (then.macs, then.params)
        order = (-score.accuracy, loss, *costs, list(left).index(group))
        return _Ranked(order, Step(group, fewer, score, then))

    while not budget.feasible(cost(left)):
        options = {g: fewer for g, c in left.items() if (fewer := shrinking.shrunk(g, c))}
        if not options:
            raise _too_tight(budget, cost(left))
        fresh = {g: ranked(g, fewer) for g, fewer in options.items() if not lazy or g not in known}
        known |= fresh
        while (step := min(known.values()).step).group not in fresh:
            known[step.group] = fresh[step.group] = ranked(step.group, options[step.group])
        steps.append(step)
        left[step.group] = step.units
        del known[step.group]
    return left, steps


class _Ranked(NamedTuple):
    """A step and its place among the others: the least is taken."""

    order: tuple[float, ...]
    step: Step


def _too_tight(budget: Budget, least: Cost) -> InputError:
    return InputError(
        f"budget {budget} is below the smallest sub-network of the search, which takes "
        f"flops={least.macs:,} and params={least.params:,}; raise the budget, or lower "
        "algorithm.min_units or algorithm.min_share"
    )
