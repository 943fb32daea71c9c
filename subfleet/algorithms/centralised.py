"""Centralised training: what could be reached if all clients' data lay in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from subfleet.algorithms.local import cross_entropy, tasks
from subfleet.core.algorithm import FULL, Algorithm, Cohort, Phase, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult, ClientTask, LossProgram, Params
from subfleet.core.units import IndexMap


def uncharged(start: Params, trained: Params, kept: Params | None, inputs: Params) -> ClientResult:
    """The trained tensors, which go nowhere: no bytes."""
    del start, kept, inputs
    return ClientResult(trained, wire_bytes=0)


@dataclass(frozen=True)
class Centralised(Algorithm):
    """Mini-batch SGD on the pooled data of all training clients, at the whole network.

    A round is as much work as one of FedAvg's in which a share `fraction` of the clients
    take part, so that curves share an axis:

        steps = round(fraction * epochs * n / batch),  n = sum_k n_k;  at least 1

    or `train.steps`, where these are given. Passes over the data go on from round to
    round, so that in the long run every row is seen equally often. No bytes are charged,
    and the fleet's budgets do not count. `run.cohort` has no effect: the pool is one client,
    of a tier that the fleet's shares give it.

    The data are pooled when a run is assembled (`subfleet.launch`), for `pools` asks for
    it. Given clients that are none's pool, it is local SGD on each, averaged by samples.

    Options:
        fraction: In (0, 1]: the share of the clients whose work a round stands for; of no
            effect where train.steps is given.
    """

    fraction: float = 0.3

    paper: ClassVar[str] = "none: the upper reference"
    pools: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"algorithm.fraction={self.fraction} is outside (0, 1]; "
                "give the share of the clients whose work a round stands for, such as 0.3"
            )

    def phase(self, round: int) -> Phase:
        """One phase: SGD that goes on where the round before stopped."""
        del round
        stream = replace(self.setting.stream, spans_rounds=True)
        return Phase("train", LossProgram(cross_entropy, self.setting.rule, stream, uncharged))

    def steps(self, num_samples: int) -> int:
        """The batches of a round over so many rows."""
        stream = self.setting.stream
        if stream.steps is not None:
            return stream.steps
        batch = num_samples if stream.batch is None else min(stream.batch, num_samples)
        # round(fraction * epochs * n / batch)
        return max(1, int(self.fraction * stream.epochs * num_samples / max(1, batch) + 0.5))

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """The pool trains the whole network."""
        del round
        work = tasks(self.setting.net, cohort, lambda tier: FULL)
        return RoundPlan([self._task(task) for task in work], {0: state["params"]})

    def _task(self, task: ClientTask) -> ClientTask:
        return replace(task, bytes_down=0, steps=self.steps(task.num_samples))

    def views(self, state: State) -> dict[str, IndexMap]:
        """The whole network, for every tier."""
        return dict.fromkeys(super().views(state), FULL)
