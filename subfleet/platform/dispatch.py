"""What a round has the hosts do: its clients' training, and its evaluation, in bundles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from subfleet.core import aggregate
from subfleet.core.aggregate import Update
from subfleet.core.algorithm import Phase, Reduced, RoundPlan, State
from subfleet.core.program import ClientTask, Params
from subfleet.platform import bundles as bundling
from subfleet.platform import merging
from subfleet.platform.bundles import BundleResult, EvalBundle, Own, TrainBundle
from subfleet.platform.clock import PhaseClock
from subfleet.platform.executor import Executor
from subfleet.platform.job import Job
from subfleet.platform.kept import KeptStore
from subfleet.platform.measure import Evaluated
from subfleet.platform.memory import OutOfMemory
from subfleet.platform.metrics import Observer, tell, tell_progress
from subfleet.platform.notes import engine_notes
from subfleet.platform.reduce import ReductionTree
from subfleet.platform.roster import Roster
from subfleet.platform.tuner import Tuner


class Dispatch:
    """Cuts the work of a round into bundles, hands them out and merges what comes back.

    It changes nothing that the next round follows from but the engine record. `heed_stop`
    is called between bundles, and raises where the run is to end.
    """

    def __init__(
        self,
        job: Job,
        executor: Executor,
        tuner: Tuner,
        roster: Roster,
        clock: PhaseClock,
        observers: Sequence[Observer],
        heed_stop: Callable[[], None],
    ):
        self.job, self.executor, self.tuner, self.roster = job, executor, tuner, roster
        self.algorithm, self.net, self.options = job.work.algorithm, job.work.net, job.options
        self.clock, self.observers, self._heed_stop = clock, observers, heed_stop
        self.kept: KeptStore  # of an algorithm that keeps something, while it runs
        self.told = 0  # entries of the engine record that observers know of

    def train(
        self, phase: Phase, plan: RoundPlan, round: int, measured: bool
    ) -> tuple[list[TrainBundle], list[BundleResult], Reduced, int]:
        """The round's work, begun anew with fewer clients side by side while memory runs out.

        Nothing of the state has changed until then. The last value: how often that was so.
        """
        for narrowed in count():
            with self.clock.phase("plan"):
                bundles = self._bundles(phase, plan, round, local_test=measured)
            self._tell_choices()
            try:
                results, reduced = self._train(bundles, plan, collect=phase.reduction == "collect")
            except OutOfMemory as error:
                self.tuner.narrow(error.variant, round)
            else:
                return bundles, results, reduced, narrowed
        raise AssertionError("unreachable")

    def evaluate(
        self,
        round: int,
        state: State,
        trained: Sequence[TrainBundle],
        results: Sequence[BundleResult],
    ) -> Evaluated:
        """Scores the views of a state, and clients' own networks, on the evaluated clients.

        `trained` and `results` are those of the round, which is not written down yet.
        """
        with self.clock.phase("evaluate"):
            ids, part = self.roster.evaluated
            views = self.algorithm.views(state)
            own: list[Own] = []
            if self.algorithm.evaluation.own:
                kept = [None] * len(ids)
                if self.algorithm.keeps:
                    kept = self.kept.read_ahead(ids, kept_rows(trained, results))
                own = [*map(Own, self.roster.own_maps(ids, views, results), kept)]
            distinct = {map.key: map for map in (*views.values(), *(o.map for o in own))}
            macs = {key: self.net.cost(map).macs for key, map in distinct.items()}
            each = np.full(len(ids), sum(macs[key] for key in {m.key for m in views.values()}))
            if own:
                each += np.array([macs[o.map.key] for o in own])
            bundles = bundling.cut_evaluation(
                ids,
                self.job.federation.sizes(ids, part),
                views,
                each / bundling.MACS_PER_SECOND,
                round=round,
                part=part,
                own=own,
            )
            shared = {0: self.algorithm.model(state)}
            return Evaluated.merged(self._evaluated(bundles, shared), views, self.roster.tiers_of)

    def _evaluated(
        self, bundles: Sequence[EvalBundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """The results of bundles, whose clients are told of as they come in."""
        clients = [len(bundle.ids) for bundle in bundles]
        done = 0
        tell_progress(self.observers, done, sum(clients), "evaluate")
        for result in self.executor.run(bundles, shared):
            done += clients[result.number]
            tell_progress(self.observers, done, sum(clients), "evaluate")
            yield result

    def _tell_tried(self, done: int, variants: int) -> None:
        tell_progress(self.observers, done, variants, "try")

    def _tell_choices(self) -> None:
        """Tells observers what has been added to the engine record."""
        choices = self.tuner.record.choices
        for text in engine_notes(choices[: self.told], choices[self.told :]):
            tell(self.observers, text)
        self.told = len(choices)

    def _bundles(
        self, phase: Phase, plan: RoundPlan, round: int, *, local_test: bool
    ) -> list[TrainBundle]:
        choices = self.tuner.choices(phase, plan, round, self._tell_tried)
        per = self.options.bundle_clients
        number = -(-len(plan.tasks) // per) if per else None
        maps = {task.map.key: task.map for task in plan.tasks}
        macs = {key: self.net.cost(map).macs for key, map in maps.items()}

        seconds: dict[Hashable, float] = {}

        def predicted(task: ClientTask) -> float:
            alike = task.map.key, task.num_samples, task.steps
            if alike not in seconds:
                cost = macs[task.map.key]
                seconds[alike] = bundling.predicted_seconds(phase.program, task, cost)
            return seconds[alike]

        cut = bundling.cut(
            plan.tasks,
            predicted,
            number,
            round=round,
            choices=choices,
            local_test=local_test,
            sums=phase.reduction == "sum",
        )
        if self.algorithm.keeps:
            for bundle in cut:
                bundle.own.extend(self.kept.read(bundle.ids))
        return cut

    def _train(
        self, bundles: list[TrainBundle], plan: RoundPlan, *, collect: bool
    ) -> tuple[list[BundleResult], Reduced]:
        results: list[BundleResult | None] = [None] * len(bundles)
        merges, left = [], list(range(len(bundles)))
        if self.executor.merges and not collect and merging.pays(plan.shared.values()):
            merges, left = merging.merges(len(bundles), bundles[0].round if bundles else 0)
        leaf = {number: i for i, number in enumerate(left)}
        tree: ReductionTree[Update] = ReductionTree(len(left), self._merge)
        arrivals = self.executor.run([*bundles, *merges], plan.shared)
        done = 0
        while True:
            tell_progress(self.observers, done, len(plan.tasks), "train")
            with self.clock.phase("train"):
                result = next(arrivals, None)
            while self.executor.notes:
                tell(self.observers, self.executor.notes.pop(0))
            if result is None:
                break
            if result.update is not None:
                with self.clock.phase("reduce"):
                    tree.add(leaf[result.number], result.update)
            self._heed_stop()
            if result.number >= len(bundles):
                continue  # a merge: no client of its own
            done += len(bundles[result.number].tasks)
            # The partial sum lives on in the tree alone.
            results[result.number] = replace(result, update=None)
        whole = [result for result in results if result is not None]
        if not collect:
            return whole, tree.result() if bundles else Update()
        position = {task.client: i for i, task in enumerate(plan.tasks)}
        collected = [item for result in whole for item in result.collected or ()]
        return whole, sorted(collected, key=lambda item: position[item.task.client])

    def _merge(self, a: Update, b: Update) -> Update:
        return aggregate.merge(a, b, self.net.space, reuse=True)


def kept_rows(
    bundles: Sequence[TrainBundle], results: Sequence[BundleResult]
) -> Iterator[tuple[np.ndarray, list[Params]]]:
    """What clients are to keep, bundle by bundle: one that was left out keeps what it had."""
    for bundle, result in zip(bundles, results, strict=True):
        kept = [(i, tree) for i, tree in enumerate(result.kept) if tree is not None]
        yield bundle.ids[[i for i, _ in kept]], [tree for _, tree in kept]
