"""What most algorithms share: the local loss, tasks from maps, the indexed mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from subfleet.core.aggregate import Update, finish
from subfleet.core.algorithm import (
    Algorithm,
    Cohort,
    Evaluation,
    Phase,
    Reduced,
    RoundPlan,
    State,
)
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.program import (
    Batch,
    ClientResult,
    ClientTask,
    LocalRule,
    LossProgram,
    Net,
    Noise,
    Params,
)
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

Statistics = Literal["local", "indexed_mean"]
"""Who holds BatchNorm's running statistics: each client its own, or the server their mean."""

CALIBRATION_BATCHES = 20


def cross_entropy(
    net: Net, params: Params, batch: Batch, noise: Noise, inputs: Params
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of a batch; the loss of plain local training."""
    del noise, inputs
    return mean_cross_entropy(net(params, batch.x), batch), {}


def mean_cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """The same from a batch's class scores, [B, classes]."""
    logs = F.log_softmax(scores, dim=1)
    # F.cross_entropy would be the same number; mapped over clients it becomes 25 kernels more.
    return batch.mean(-logs.gather(1, batch.y.unsqueeze(1)).squeeze(1))


def sgd(
    rule: LocalRule, params: Params, grads: Params, velocity: Params, left: Params | None = None
) -> tuple[Params, Params]:
    """One step of a `StepProgram`'s own optimiser, and the velocity after it.

    v <- m v + clip(g) + d w;  w <- w - lr v, only on the coordinates that `left` leaves: the
    dropped ones of a masked network have no gradient, but momentum and decay would move them.
    """
    grads = clipped(grads, rule.clip_norm)
    moved, after = {}, {}
    for name, w in params.items():
        v = grads[name]
        if rule.weight_decay:
            v = torch.add(v, w, alpha=rule.weight_decay)
        if rule.momentum:
            v = velocity[name] * rule.momentum + v
        after[name] = v
        step = v * left[name] if left is not None and name in left else v
        moved[name] = torch.add(w, step, alpha=-rule.lr)
    return moved, after


def clipped(grads: Params, bound: float | None) -> Params:
    """Gradients scaled so that their joint norm is at most `bound`; None leaves them."""
    if bound is None:
        return grads
    norms = [torch.linalg.vector_norm(grad) for grad in grads.values()]
    scale = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return {name: grad * scale for name, grad in grads.items()}


def split_statistics(
    net: SuperNetwork, start: Params, trained: Params, kept: Params | None, inputs: Params
) -> ClientResult:
    """Uploads the weights and keeps BatchNorm's running statistics on the client."""
    del start, kept, inputs
    return ClientResult(
        update={name: value for name, value in trained.items() if name not in net.statistics},
        # A client that skips a block has none of its statistics.
        kept={name: trained[name].clone() for name in sorted(net.statistics & trained.keys())},
    )


def tasks(net: SuperNetwork, cohort: Cohort, map_of: Callable[[int], IndexMap]) -> list[ClientTask]:
    """A task for each client of the cohort: the map of its tier, weighted by samples."""
    tiers = set(cohort.tier.tolist())
    maps = {int(tier): net.space.canonical(map_of(int(tier))) for tier in tiers}
    variants = {tier: net.space.counts(map) for tier, map in maps.items()}
    return [
        ClientTask(client, maps[tier], variants[tier], float(samples), samples, tier)
        for client, tier, samples in zip(
            cohort.id.tolist(), cohort.tier.tolist(), cohort.num_samples.tolist(), strict=True
        )
    ]


@dataclass(frozen=True)
class OneNetwork(Algorithm):
    """Every client trains the same network: by default the largest that the poorest tier can run.

    Options:
        width: In (0, 1]: fixes the network's width instead and ignores the budgets; 1.0 is a
            fleet that could afford everything.
    """

    width: float | None = None

    def __post_init__(self) -> None:
        if self.width is not None and not 0 < self.width <= 1:
            raise InputError(
                f"algorithm.width={self.width} is outside (0, 1]; "
                "give a share of the channels, such as 0.5, or leave it out to follow the budgets"
            )

    @cached_property
    def network(self) -> IndexMap:
        """The one map that every client trains."""
        if self.width is None:
            return self.setting.smallest.map
        return width_map(self.setting.net, self.width)

    def views(self, state: State) -> dict[str, IndexMap]:
        """There is one network: the global one, which every tier runs."""
        del state
        return {"global": self.network} | {tier.name: self.network for tier in self.setting.tiers}


@dataclass(frozen=True)
class IndexedAveraging(Algorithm):
    """Local SGD on slices of one super-network, merged coordinate by coordinate.

    A subclass says which map each client trains; everything else is this:

        w_j <- sum_{k covers j} n_k w_kj / sum_{k covers j} n_k,  kept where nobody covers j.

    The server's step is `Algorithm`'s own.

    Options:
        statistics: Who holds BatchNorm's running statistics: "local" each client its own,
            "indexed_mean" the server the mean of those that are sent.
    """

    statistics: Statistics = "indexed_mean"

    @abstractmethod
    def map_of(self, tier: int, round: int) -> IndexMap:
        """The part of the super-network that clients of `tier` train in `round`."""

    @property
    def local_statistics(self) -> bool:
        """Whether there are BatchNorm statistics and they stay on the clients."""
        return self.statistics == "local" and bool(self.setting.net.statistics)

    def init(self, params: Params) -> State:
        """The drawn parameters, without BatchNorm statistics where those stay local."""
        if self.local_statistics:
            params = {k: v for k, v in params.items() if k not in self.setting.net.statistics}
        return {"params": params}

    def phase(self, round: int) -> Phase:
        """One phase: local SGD, summed."""
        del round
        finish = None
        if self.local_statistics:
            finish = partial(split_statistics, self.setting.net)
        program = LossProgram(cross_entropy, self.setting.rule, self.setting.stream, finish)
        return Phase("train", program)

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Every client of the cohort trains the map of its tier."""
        work = tasks(self.setting.net, cohort, lambda tier: self.map_of(tier, round))
        return RoundPlan(work, {0: state["params"]})

    @property
    def evaluation(self) -> Evaluation:
        """Where the server holds no BatchNorm statistics: calibrates, and measures own networks."""
        if not self.local_statistics:
            return Evaluation()
        return Evaluation(calibrate=CALIBRATION_BATCHES, own=True)

    @property
    def keeps(self) -> bool:
        """Clients keep their own BatchNorm statistics, if any."""
        return self.local_statistics

    def initial_kept(self, task: ClientTask) -> Params:
        """Statistics before the first step."""
        return self.setting.net.fresh_statistics(task.map)


Normaliser = Literal["count", "all"]


@dataclass(frozen=True)
class PartialAveraging(IndexedAveraging):
    """FedPA's aggregation: BatchNorm's running statistics stay on the clients.

    normaliser "count":  w_j <- sum_{k covers j} n_k w_kj / sum_{k covers j} n_k
    normaliser "all":    w_j <- w_j + sum_{k covers j} (n_k / sum_i n_i) (w_kj - w_j)

    The statistics never travel by default, as the paper has it: they tell of the client's
    data, and the widths they belong to differ.

    Options:
        normaliser: "count" averages a coordinate over the clients that have it; "all" over all
            clients of the round, where those without it count with the server's value.
    """

    statistics: Statistics = "local"
    normaliser: Normaliser = "count"

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """Partial aggregation with the chosen normaliser."""
        del plan
        assert isinstance(reduced, Update)
        params = finish(
            reduced, self.setting.net.space, state["params"], normaliser=self.normaliser
        )
        return state | {"params": params}
