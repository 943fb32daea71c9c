"""FedProx: FedAvg whose clients are held near the server's model, and may do less.

Li et al., "Federated Optimization in Heterogeneous Networks", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from subfleet.algorithms.local import IndexedAveraging, OneNetwork
from subfleet.core import seeds
from subfleet.core.algorithm import Cohort, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.program import ClientTask
from subfleet.core.units import IndexMap


@dataclass(frozen=True)
class FedProx(OneNetwork, IndexedAveraging):
    """Every client trains the same network, and is held near where it began.

    client:  min_w L_k(w) + (mu / 2) |w - w^t|^2,  so  w <- w - lr (g + mu (w - w^t))
    server:  w <- sum_k (n_k / sum n) w_k

    With probability `stragglers` a client has time in a round for a random number of epochs
    only, each of 1 to E equally likely; what it returns counts like the others'. In the client
    table it has fewer `steps`, and its status is ok. mu = 0 without stragglers is FedAvg.

    Options:
        mu: How strongly clients are held where they began, 0 (not at all) or more, with
            lr mu < 2 (1 + momentum); the authors try 0.001, 0.01, 0.1 and 1.
        stragglers: In [0, 1]: the share of a round's clients that do fewer epochs; of use from
            train.epochs = 2 on.
    """

    mu: float = 0.01
    stragglers: float = 0.0

    paper: ClassVar[str] = "Li et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0:
            raise InputError(
                f"algorithm.mu={self.mu} is negative; give 0 (FedAvg) or more, such as 0.01"
            )
        if not 0 <= self.stragglers <= 1:
            raise InputError(
                f"algorithm.stragglers={self.stragglers} is outside [0, 1]; give the share of a "
                "round's clients that do fewer epochs, such as 0.5"
            )
        if self.stragglers > 0 and self.setting.stream.steps is not None:
            raise InputError(
                f"algorithm.stragglers={self.stragglers}: stragglers do fewer epochs, but "
                "train.steps counts steps; set train.epochs instead, or stragglers to 0"
            )
        self._check_stable()
        # The engine's rule takes w <- w - lr (g + proximal (w - w_start)) for every client.
        rule = replace(self.setting.rule, proximal=float(self.mu))
        object.__setattr__(self, "setting", replace(self.setting, rule=rule))

    def _check_stable(self) -> None:
        """Beyond the bound the pull alone makes w swing ever farther around w^t.

        w <- w - lr v,  v <- m v + mu (w - w^t)  converges for  lr mu < 2 (1 + m).
        """
        rule = self.setting.rule
        bound = 2 * (1 + rule.momentum)
        if rule.lr * self.mu >= bound:
            raise InputError(
                f"algorithm.mu={self.mu:g} times train.lr={rule.lr:g} is {rule.lr * self.mu:g}, "
                f"not below {bound:g} = 2 (1 + train.momentum): clients would diverge; "
                f"set mu below {bound / rule.lr:g}, such as 0.01"
            )

    def doubts(self) -> tuple[str, ...]:
        """Of one epoch, nobody can do fewer."""
        if self.stragglers > 0 and self.setting.stream.epochs == 1:
            return (
                f"algorithm.stragglers = {self.stragglers:g} has no effect where train.epochs = 1: "
                "a straggler does 1 to E whole epochs; set train.epochs to 2 or more",
            )
        return ()

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The same for every tier and round."""
        del tier, round
        return self.network

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """As for FedAvg, but that some clients stop early."""
        plan = super().plan(state, cohort, round)
        if self.stragglers == 0:
            return plan
        return replace(plan, tasks=[self._hurried(task, round) for task in plan.tasks])

    def _hurried(self, task: ClientTask, round: int) -> ClientTask:
        """The task with fewer epochs, if its client is one of the round's stragglers."""
        stream = self.setting.stream
        draw = seeds.generator(self.setting.seed, "straggler", round=round, client=task.client)
        if draw.random() >= self.stragglers:
            return task
        # 1 .. E, each with probability 1 / E
        epochs = int(draw.integers(1, stream.epochs + 1))
        return replace(task, steps=replace(stream, epochs=epochs).num_steps(task.num_samples))
