"""The round loop: plan, train, merge, step, evaluate, write down, checkpoint.

It runs over any executor and knows nothing of Ray. The result is a function of
(experiment, seed, engine record).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from subfleet.core import aggregate
from subfleet.core.aggregate import Update
from subfleet.core.algorithm import Phase, Reduced, RoundPlan, State
from subfleet.core.errors import InputError, RunFailed
from subfleet.core.program import ClientTask, Params, RunProgram
from subfleet.datasets.tables import Upcoming
from subfleet.platform import bundles as bundling
from subfleet.platform import checkpoint
from subfleet.platform.bundles import BundleResult, Own, TrainBundle
from subfleet.platform.clock import PhaseClock
from subfleet.platform.engine import SKIPPED, parts_needed
from subfleet.platform.executor import Executor
from subfleet.platform.files import last_checkpoint
from subfleet.platform.job import Job
from subfleet.platform.kept import KeptStore
from subfleet.platform.measure import (
    Evaluated,
    bytes_down,
    client_columns,
    coverage_counts,
    local_accuracy,
    mean_cost,
    round_record,
)
from subfleet.platform.memory import OutOfMemory
from subfleet.platform.metrics import (
    ClientsLog,
    MetricsLog,
    Observer,
    params_sha256,
    summarise,
    tell,
    tell_progress,
)
from subfleet.platform.notes import engine_notes
from subfleet.platform.record import EngineRecord
from subfleet.platform.reduce import ReductionTree
from subfleet.platform.roster import Roster
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.simulated import simulate
from subfleet.platform.stretches import stretches
from subfleet.platform.tracefiles import TraceFiles
from subfleet.platform.tuner import Tuner

FLUSH_ROUNDS = 100  # rows of clients wait in memory for so many rounds at most


class Rounds:
    """One run of a job in its folder."""

    def __init__(
        self, job: Job, executor: Executor, folder: RunFolder, observers: Sequence[Observer] = ()
    ):
        self.job = job
        self.executor = executor
        self.folder = folder
        self.observers = observers
        self.algorithm = job.work.algorithm
        self.net = job.work.net
        self.seed = job.work.seed
        self.options = job.options
        self.roster = Roster(job)
        self.clock = PhaseClock()
        self.kept: KeptStore  # of an algorithm that keeps something, while it runs
        self.traces: TraceFiles  # while it runs
        self.warnings: tuple[str, ...] = ()
        self.tuner = Tuner(job, executor, folder)
        self.done = 0
        self.phase_name = ""
        self.state: State = {}
        self.mean_cost = (float("nan"), float("nan"))  # of the last round's clients
        self.sim_time = 0.0  # seconds on the fleet's devices; 0 where they have no profile
        self._saved = 0  # the round of the newest checkpoint
        self._settled = False  # whether the state is that of `done` whole rounds
        self._stopping = False
        self._told = 0  # entries of the engine record that observers know of

    # --- the whole run -----------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs from the last checkpoint (or from scratch) to the end; returns the summary.

        After a KeyboardInterrupt the last finished round is saved first, unless a round is
        just then being written down: the newest checkpoint stays what it was.
        """
        started = perf_counter()
        with ExitStack() as stack:
            stack.callback(os.close, self.folder.lock())
            metrics = MetricsLog(self.folder.metrics)
            stack.callback(metrics.close)
            stack.callback(self.tuner.close)
            clients = ClientsLog(self.folder.clients)
            self.traces = TraceFiles(self.folder.traces)
            if self.algorithm.keeps:
                # It empties its folder: only under the lock.
                self.kept = KeptStore(self.folder.kept)
                stack.callback(self.kept.close)
            self._restore()
            metrics.truncate(self.done)
            clients.truncate(self.done)
            self.traces.truncate(self.done)
            self.folder.write_record(self.tuner.record)
            self._tell_start()
            self.executor.expect(self._upcoming, self.done + 1, self.options.rounds)
            reached = self._reached(metrics.read()[-1]) if self.done else False
            try:
                late = self._loop(metrics, clients, started, reached)
            except KeyboardInterrupt:
                if self._settled and self.done > self._saved:
                    clients.flush()
                    self._checkpoint()
                raise
            return self._finish(metrics, finished=not late)

    def stop(self) -> None:
        """Asks, from another thread, for an end as by Ctrl-C."""
        self._stopping = True

    def _heed_stop(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt

    def _loop(
        self, metrics: MetricsLog, clients: ClientsLog, started: float, reached: bool
    ) -> bool:
        """The rounds that are left; whether the time was over before they were."""
        late = False
        self._settled = True
        while self.done < self.options.rounds and not reached and not late:
            self._heed_stop()
            for text in self.tuner.settle(self.done + 1):
                tell(self.observers, text)
            record, rows, coverage = self._round(self.done + 1)
            clients.add(record["round"], rows)
            metrics.append(record)
            self.done, self._settled = record["round"], True
            for observer in self.observers:
                observer.on_round(record, coverage)
            reached, late = self._reached(record), self._out_of_time(started)
            if self._checkpoint_due(last=reached or late):
                clients.flush()
                self._checkpoint()
            elif self.done % FLUSH_ROUNDS == 0:
                clients.flush()
        return late and not reached

    def _out_of_time(self, started: float) -> bool:
        limit = self.options.max_seconds
        over = limit is not None and perf_counter() - started > limit
        return over and self.done < self.options.rounds

    def _reached(self, record: Mapping[str, Any]) -> bool:
        target = self.options.target_accuracy
        return target is not None and (record.get("acc_global") or 0.0) >= target

    def _tell_start(self) -> None:
        info = {
            "rounds": self.options.rounds,
            "start": self.done,
            "phases": stretches(lambda r: self.algorithm.phase(r).name, self.options.rounds),
            "config": self.job.config,
            "run_folder": str(self.folder.path),
            "algorithm": type(self.algorithm).__name__,
            "warnings": [*self.folder.warnings, *self.warnings],
        }
        for observer in self.observers:
            observer.on_start(info)
        self._told = len(self.tuner.record.choices)

    def _tell_choices(self) -> None:
        """Tells observers what has been added to the engine record."""
        choices = self.tuner.record.choices
        for text in engine_notes(choices[: self._told], choices[self._told :]):
            tell(self.observers, text)
        self._told = len(choices)

    def _finish(self, metrics: MetricsLog, *, finished: bool) -> dict[str, Any]:
        model = self.algorithm.model(self.state)
        params, macs = self.mean_cost
        summary = summarise(
            metrics.read(),
            seed=self.seed,
            finished=finished,
            params_mean=params,
            flops_mean=macs,
            params_sha256=params_sha256(model),
        )
        self.folder.write_final(model)
        self.folder.write_summary(summary)
        for observer in self.observers:
            observer.on_end(summary)
        return summary

    # --- one round ---------------------------------------------------------------------------

    def _round(self, round: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
        started = perf_counter()
        retries = self.executor.retries
        measured = self._evaluation_due(round)
        with self.clock.phase("plan"):
            phase = self.algorithm.phase(round)
            state = self.state
            if phase.name != self.phase_name:
                state = self.algorithm.enter(phase, state)
            asked, wait = self.roster.present(phase, round, self.sim_time)
            planned = self.algorithm.plan(state, self.roster.cohort(phase, round, asked), round)
            wanted = self.roster.wanted(phase)
            at = {"time": self.sim_time, "wait": wait, "wanted": wanted}
            outcome = simulate(self.job, phase, planned, round, **at)
            plan = outcome.arriving(planned) if outcome else planned
        bundles, results, reduced, narrowed = self._trained(phase, plan, round, measured)
        self._refuse_nan(round, results)
        with self.clock.phase("server"):
            if plan.tasks:
                state = self.algorithm.server_step(state, plan, reduced)
            else:
                state = self.algorithm.idle(state)
        trained_s = perf_counter() - started
        evaluated = self._evaluate(round, state, bundles, results) if measured else None
        with self.clock.phase("metrics"):
            down = bytes_down(self.net, planned)
            charged = outcome.charged(self.net) if outcome else None
            rows = client_columns(results, self.roster.tier_names, down, charged)
            coverage = coverage_counts(self.net, reduced)
            record = round_record(
                round,
                rows,
                phase=phase.name,
                local=local_accuracy(rows) if measured else None,
                evaluated=evaluated,
                coverage_min=min((int(c.min()) for c in coverage.values()), default=None),
                retries=self.executor.retries - retries,
                out_of_memory=narrowed,
                trained_s=trained_s,
            )
            if outcome:
                rows |= outcome.columns(rows)
                record |= outcome.record(rows)
            self.traces.write(round, [result.traces for result in results])
        # All that the next round follows from changes here, at once.
        self._settled = False
        with self.clock.phase("server"):
            self.state, self.phase_name = state, phase.name
            self._remember(round, bundles, results)
            self.sim_time = record.get("sim_time", self.sim_time)
            self.mean_cost = mean_cost(rows)
        record["seconds"] = self.clock.take() | {"total": perf_counter() - started}
        return record, rows, coverage

    def _upcoming(self, round: int) -> Upcoming:
        """What the clients of a round will read, those of a tier, and so of a bundle, together."""
        phase = self.algorithm.phase(round)
        if self.job.devices is not None and self.job.devices.come_and_go:
            # Who is there then depends on how long the rounds before will last.
            return Upcoming(np.empty(0, np.int64), ())
        ids = self.roster.drawn(phase, round)
        tier = self.job.fleet.tier_of[ids]
        parts = parts_needed(phase.program, self._evaluation_due(round))
        return Upcoming(ids[np.argsort(tier, kind="stable")], tuple(sorted(parts)))

    def _bundles(
        self, phase: Phase, plan: RoundPlan, round: int, *, local_test: bool
    ) -> list[TrainBundle]:
        choices = self.tuner.choices(phase, plan, round)
        per = self.options.bundle_clients
        if not per and isinstance(phase.program, RunProgram):
            per = 1  # a search takes seconds or minutes, and returns no sum
        number = -(-len(plan.tasks) // per) if per else None
        maps = {task.map.key: task.map for task in plan.tasks}
        macs = {key: self.net.cost(map).macs for key, map in maps.items()}

        def predicted(task: ClientTask) -> float:
            return bundling.predicted_seconds(phase.program, task, macs[task.map.key])

        cut = bundling.cut(
            plan.tasks, predicted, number, round=round, choices=choices, local_test=local_test
        )
        if self.algorithm.keeps:
            for bundle in cut:
                bundle.own.extend(self.kept.read(bundle.ids))
        return cut

    def _trained(
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

    def _train(
        self, bundles: list[TrainBundle], plan: RoundPlan, *, collect: bool
    ) -> tuple[list[BundleResult], Reduced]:
        results: list[BundleResult | None] = [None] * len(bundles)
        tree: ReductionTree[Update] = ReductionTree(len(bundles), self._merge)
        arrivals = self.executor.run(bundles, plan.shared)
        done = 0
        while True:
            tell_progress(self.observers, done, len(plan.tasks))
            with self.clock.phase("train"):
                result = next(arrivals, None)
            if result is None:
                break
            if result.update is not None:
                with self.clock.phase("reduce"):
                    tree.add(result.number, result.update)
            self._heed_stop()
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

    def _refuse_nan(self, round: int, results: Sequence[BundleResult]) -> None:
        if self.options.on_nan == "skip":
            return
        bad = [
            (int(client), self.roster.tier_names[int(tier)])
            for result in results
            for client, tier, status in zip(
                result.table["client"], result.table["tier"], result.table["status"], strict=True
            )
            if status == SKIPPED
        ]
        if not bad:
            return
        last = last_checkpoint(self.folder.checkpoints)
        held = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        named = ", ".join(f"{client} (tier {tier})" for client, tier in bad[:5])
        raise RunFailed(
            f"round {round}: training of {len(bad)} clients was not finite: {named}"
            f"{', …' if len(bad) > 5 else ''}; {held}. Lower train.lr, set train.clip_norm, "
            'or set run.on_nan = "skip" to leave such clients out'
        )

    def _remember(
        self, round: int, bundles: Sequence[TrainBundle], results: Sequence[BundleResult]
    ) -> None:
        self.roster.remember(round, bundles, results)
        if self.algorithm.keeps:
            for ids, trees in _kept(bundles, results):
                self.kept.write(ids, trees)

    # --- evaluation --------------------------------------------------------------------------

    def _evaluation_due(self, round: int) -> bool:
        every = self.options.eval_every
        return round == self.options.rounds or (every > 0 and round % every == 0)

    def _evaluate(
        self,
        round: int,
        state: State,
        trained: Sequence[TrainBundle],
        results: Sequence[BundleResult],
    ) -> Evaluated:
        with self.clock.phase("evaluate"):
            ids, part = self.roster.evaluated
            views = self.algorithm.views(state)
            own: list[Own] = []
            if self.algorithm.evaluation.own:
                # The round is not written down yet: what it changed comes from its results.
                kept = [None] * len(ids)
                if self.algorithm.keeps:
                    kept = self.kept.read_ahead(ids, _kept(trained, results))
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
            found = self.executor.run(bundles, shared)
            return Evaluated.merged(found, views, self.roster.tiers_of)

    # --- checkpoint and resume ---------------------------------------------------------------

    def _checkpoint_due(self, *, last: bool) -> bool:
        every = self.options.checkpoint_every
        return last or self.done == self.options.rounds or (every > 0 and self.done % every == 0)

    def _checkpoint(self) -> None:
        tree = {
            "state": self.state,
            "phase": self.phase_name,
            "roster": self.roster.to_state(),
            "mean_cost": self.mean_cost,
            "sim_time": self.sim_time,
            "engine": self.tuner.record.to_json(),
        }
        checkpoint.save(
            self.folder.checkpoints,
            self.done,
            tree,
            fingerprint=self.job.fingerprint,
            keep=self.options.keep_checkpoints,
            attach=(lambda to: self.kept.snapshot(to / "kept")) if self.algorithm.keeps else None,
        )
        self._saved = self.done

    def _restore(self) -> None:
        # The file, not the checkpoint: it also holds what was chosen since, or before the first.
        if (written := self.folder.read_engine()) is not None:
            self.tuner.record = EngineRecord.from_json(written, str(self.folder.engine))
            if not self.tuner.record.begins_with(self.job.record):
                raise InputError(
                    f"--engine-record differs from {self.folder.engine}, by which this run began; "
                    "leave it out to go on, or give another --out"
                )
        found = checkpoint.load_latest(self.folder.checkpoints, fingerprint=self.job.fingerprint)
        if found is None:
            start = self.job.start
            self.state = self.algorithm.init(start.params if start else self.net.init(self.seed))
            self.warnings = start.warnings if start else ()
            return
        self.warnings = found.warnings
        self.done = self._saved = found.round
        self.state = found.state["state"]
        self.phase_name = found.state["phase"]
        self.roster.restore(found.state["roster"])
        self.mean_cost = found.state["mean_cost"]
        self.sim_time = found.state.get("sim_time", 0.0)
        if self.algorithm.keeps:
            self.kept.restore(found.path / "kept")


def _kept(
    bundles: Sequence[TrainBundle], results: Sequence[BundleResult]
) -> Iterator[tuple[np.ndarray, list[Params]]]:
    """What clients are to keep, bundle by bundle: one that was left out keeps what it had."""
    for bundle, result in zip(bundles, results, strict=True):
        kept = [(i, tree) for i, tree in enumerate(result.kept) if tree is not None]
        yield bundle.ids[[i for i, _ in kept]], [tree for _, tree in kept]
