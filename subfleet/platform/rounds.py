"""The round loop: plan, train, merge, step, evaluate, write down, checkpoint.

It runs over any executor and knows nothing of Ray. The result is a function of
(experiment, seed, engine record).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from subfleet.core import aggregate, seeds
from subfleet.core.aggregate import Update
from subfleet.core.algorithm import (
    ClientTask,
    Cohort,
    LossProgram,
    Phase,
    Reduced,
    RoundPlan,
    RunProgram,
    State,
    StepProgram,
)
from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets.federation import split_clients
from subfleet.platform import bundles as bundling
from subfleet.platform import checkpoint
from subfleet.platform.bundles import BundleResult, TrainBundle
from subfleet.platform.clock import PhaseClock
from subfleet.platform.engine import BACKWARD, SKIPPED
from subfleet.platform.executor import Executor
from subfleet.platform.job import Job
from subfleet.platform.kept import KeptStore
from subfleet.platform.measure import Evaluated, client_columns, local_accuracy, round_record
from subfleet.platform.metrics import ClientsLog, MetricsLog, Observer, params_sha256, summarise
from subfleet.platform.record import EngineRecord, choose, variant_name
from subfleet.platform.reduce import ReductionTree
from subfleet.platform.runfolder import RunFolder


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
        self.train_ids, self.held_out = split_clients(self.seed, job.federation.num_clients)
        self.clock = PhaseClock()
        self.kept: KeptStore
        self.record = job.record
        self.last_round = np.full(job.federation.num_clients, -1, np.int32)
        self.reports: dict[int, dict[str, Any]] = {}
        self.done = 0
        self.phase_name = ""
        self.state: State = {}
        self.last_tasks: Sequence[ClientTask] = ()

    # --- the whole run -----------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs from the last checkpoint (or from scratch) to the end; returns the summary."""
        handle = self.folder.lock()
        metrics = MetricsLog(self.folder.metrics)
        clients = ClientsLog(self.folder.clients)
        started = perf_counter()
        try:
            self.kept = KeptStore(self.folder.kept)  # empties its folder: only under the lock
            self._restore()
            metrics.truncate(self.done)
            clients.truncate(self.done)
            self._write_record()
            self._tell_start()
            reached = self._reached(metrics.read()[-1]) if self.done else False
            late = False
            while self.done < self.options.rounds and not reached and not late:
                record, rows, coverage = self._round(self.done + 1)
                clients.add(record["round"], rows)
                metrics.append(record)
                self.done = record["round"]
                for observer in self.observers:
                    observer.on_round(record, coverage)
                reached, late = self._reached(record), self._out_of_time(started)
                if self._checkpoint_due(last=reached or late):
                    clients.flush()
                    self._checkpoint()
            return self._finish(metrics, finished=reached or not late)
        finally:
            metrics.close()
            os.close(handle)

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
            "config": self.job.config,
            "run_folder": str(self.folder.path),
            "algorithm": type(self.algorithm).__name__,
        }
        for observer in self.observers:
            observer.on_start(info)

    def _finish(self, metrics: MetricsLog, *, finished: bool) -> dict[str, Any]:
        model = self.algorithm.model(self.state)
        params, macs = self._mean_cost()
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

    def _mean_cost(self) -> tuple[float, float]:
        """Mean parameters and MACs of the sub-networks of the last round's clients."""
        if not self.last_tasks:
            return float("nan"), float("nan")
        costs = {task.map.key: self.net.cost(task.map).macs for task in self.last_tasks}
        sizes = {
            task.map.key: self.net.stored_params(task.map, "local") for task in self.last_tasks
        }
        keys = [task.map.key for task in self.last_tasks]
        return float(np.mean([sizes[k] for k in keys])), float(np.mean([costs[k] for k in keys]))

    # --- one round ---------------------------------------------------------------------------

    def _round(self, round: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
        started = perf_counter()
        retries = self.executor.retries
        measured = self._evaluation_due(round)
        with self.clock.phase("plan"):
            phase = self.algorithm.phase(round)
            if phase.name != self.phase_name:
                self.state = self.algorithm.enter(phase, self.state)
                self.phase_name = phase.name
            cohort = self._cohort(phase, round)
            plan = self.algorithm.plan(self.state, cohort, round)
            bundles = self._bundles(phase, plan, round, local_test=measured)
        results, reduced = self._train(bundles, plan, collect=phase.reduction == "collect")
        self._refuse_nan(round, results)
        with self.clock.phase("server"):
            self.state = self.algorithm.server_step(self.state, plan, reduced)
            self._remember(round, bundles, results)
        trained_s = perf_counter() - started
        evaluated = self._evaluate(round) if measured else None
        with self.clock.phase("metrics"):
            rows = client_columns(results, self.fleet_names, self._bytes_down(plan))
            coverage = self._coverage(reduced)
            record = round_record(
                round,
                rows,
                local=local_accuracy(rows) if measured else None,
                evaluated=evaluated,
                coverage_min=min((int(c.min()) for c in coverage.values()), default=None),
                retries=self.executor.retries - retries,
                trained_s=trained_s,
            )
        record["seconds"] = self.clock.take() | {"total": perf_counter() - started}
        return record, rows, coverage

    @cached_property
    def fleet_names(self) -> list[str]:
        """Tier names by index."""
        return [tier.name for tier in self.job.fleet.tiers]

    def _cohort(self, phase: Phase, round: int) -> Cohort:
        pool = self._pool(phase.eligible)
        size = self.options.cohort
        if phase.fraction is not None:
            size = max(1, int(phase.fraction * len(pool) + 0.5))
        generator = seeds.generator(self.seed, "cohort", round=round)
        ids = np.sort(pool[generator.choice(len(pool), min(size, len(pool)), replace=False)])
        federation = self.job.federation
        return Cohort(
            id=ids,
            num_samples=federation.sizes(ids, "train"),
            tier=self.job.fleet.tier_of[ids],
            label_counts=federation.label_counts(ids) if phase.wants_labels else None,
            last_round=self.last_round[ids],
            report=[self.reports.get(client) for client in ids.tolist()],
        )

    def _pool(self, eligible: tuple[str, ...] | None) -> np.ndarray:
        if eligible is None:
            return self.train_ids
        wanted = [i for i, name in enumerate(self.fleet_names) if name in eligible]
        pool = self.train_ids[np.isin(self.job.fleet.tier_of[self.train_ids], wanted)]
        if not len(pool):
            raise InputError(
                f"no training client is in the tiers {', '.join(eligible)}; "
                "give them a larger share in [fleet], or use more clients"
            )
        return pool

    def _bundles(
        self, phase: Phase, plan: RoundPlan, round: int, *, local_test: bool
    ) -> list[TrainBundle]:
        self._record_new(phase, plan, round)
        choices = {
            name: self.record.at(name, round)
            for name in {variant_name(task.variant) for task in plan.tasks}
        }
        per = self.options.bundle_clients
        count = -(-len(plan.tasks) // per) if per else bundling.auto_count(len(plan.tasks))
        macs = {task.map.key: task.map for task in plan.tasks}
        cost = {key: self.net.cost(map).macs for key, map in macs.items()}

        def predicted(task: ClientTask) -> float:
            steps, rows = work_of(phase, task)
            return steps * bundling.STEP_SECONDS + (
                BACKWARD * cost[task.map.key] * rows / bundling.MACS_PER_SECOND
            )

        cut = bundling.cut(
            plan.tasks, predicted, count, round=round, choices=choices, local_test=local_test
        )
        if self.algorithm.keeps:
            for bundle in cut:
                bundle.own.extend(self.kept.read(bundle.ids))
        return cut

    def _record_new(self, phase: Phase, plan: RoundPlan, round: int) -> None:
        """Chooses how to compute variants seen for the first time, before they are sent out."""
        new = {variant_name(t.variant): t.variant for t in plan.tasks}
        missing = sorted(name for name in new if not self.record.knows(name))
        if missing:
            forced = "loop" if isinstance(phase.program, RunProgram) else None
            device, engine = self.executor.device, self.options.engine
            self.record = self.record.extended(
                choose(self.net, new[name], device, engine, forced, round) for name in missing
            )
            self._write_record()

    def _train(
        self, bundles: list[TrainBundle], plan: RoundPlan, *, collect: bool
    ) -> tuple[list[BundleResult], Reduced]:
        results: list[BundleResult | None] = [None] * len(bundles)
        tree: ReductionTree[Update] = ReductionTree(len(bundles), self._merge)
        arrivals = self.executor.run(bundles, plan.shared)
        while True:
            with self.clock.phase("train"):
                result = next(arrivals, None)
            if result is None:
                break
            if result.update is not None:
                with self.clock.phase("reduce"):
                    tree.add(result.number, result.update)
            # The partial sum lives on in the tree alone.
            results[result.number] = replace(result, update=None)
        whole = [result for result in results if result is not None]
        if not collect:
            return whole, tree.result()
        position = {task.client: i for i, task in enumerate(plan.tasks)}
        collected = [item for result in whole for item in result.collected or ()]
        return whole, sorted(collected, key=lambda item: position[item.task.client])

    def _merge(self, a: Update, b: Update) -> Update:
        return aggregate.merge(a, b, self.net.space, reuse=True)

    def _refuse_nan(self, round: int, results: Sequence[BundleResult]) -> None:
        if self.options.on_nan == "skip":
            return
        bad = [
            (int(client), self.fleet_names[int(tier)])
            for result in results
            for client, tier, status in zip(
                result.table["client"], result.table["tier"], result.table["status"], strict=True
            )
            if status == SKIPPED
        ]
        if not bad:
            return
        last = sorted(self.folder.checkpoints.glob("round-*"))
        named = ", ".join(f"{client} (tier {tier})" for client, tier in bad[:5])
        raise RunFailed(
            f"round {round}: training of {len(bad)} clients was not finite: {named}"
            f"{', …' if len(bad) > 5 else ''}; the last good checkpoint is "
            f"{last[-1] if last else 'none yet'}. Lower train.lr, set train.clip_norm, "
            'or set run.on_nan = "skip" to leave such clients out'
        )

    def _remember(
        self, round: int, bundles: Sequence[TrainBundle], results: Sequence[BundleResult]
    ) -> None:
        for bundle, result in zip(bundles, results, strict=True):
            self.last_round[bundle.ids] = round
            self.reports.update(result.reports)
            if self.algorithm.keeps:
                rows = [
                    (c, k) for c, k in zip(bundle.ids, result.kept, strict=True) if k is not None
                ]
                if rows:
                    ids, trees = zip(*rows, strict=True)
                    self.kept.write(np.array(ids), trees)
        self.last_tasks = [task for bundle in bundles for task in bundle.tasks]

    def _bytes_down(self, plan: RoundPlan) -> dict[int, tuple[int, int]]:
        """What each client downloads: (all bytes, the map's part)."""
        cache: dict[tuple[int, bytes], tuple[int, int]] = {}
        out = {}
        for task in plan.tasks:
            key = (task.shared, task.map.key)
            if key not in cache:
                shapes = self.net.space.slice_shapes(task.map)
                sent = sum(int(np.prod(shapes[name])) for name in plan.shared[task.shared])
                map_bytes = task.map.wire_bytes(self.net.space)
                cache[key] = (4 * sent + map_bytes, map_bytes)
            out[task.client] = cache[key]
        return out

    def _coverage(self, reduced: Reduced) -> dict[str, np.ndarray]:
        if isinstance(reduced, list):
            return {}
        return aggregate.coverage_counts(reduced, self.net.space)

    # --- evaluation --------------------------------------------------------------------------

    def _evaluation_due(self, round: int) -> bool:
        every = self.options.eval_every
        return round == self.options.rounds or (every > 0 and round % every == 0)

    @cached_property
    def _eval_clients(self) -> tuple[np.ndarray, str]:
        """The evaluated clients, fixed by the seed, and the part of their data that counts."""
        held = len(self.held_out) > 0
        pool = self.held_out if held else self.train_ids
        wanted = self.options.eval_clients or len(pool)
        if wanted < len(pool):
            generator = seeds.generator(self.seed, "evaluation")
            pool = np.sort(generator.choice(pool, wanted, replace=False))
        # A client that trains before it tests must not be tested on what it trained on.
        adapts = self.algorithm.evaluation.prepare is not None
        return pool, "all" if held and not adapts else "test"

    def _evaluate(self, round: int) -> Evaluated:
        with self.clock.phase("evaluate"):
            ids, part = self._eval_clients
            views = self.algorithm.views(self.state)
            distinct = {map.key: map for map in views.values()}
            macs = sum(self.net.cost(map).macs for map in distinct.values())
            bundles = bundling.cut_evaluation(
                ids,
                self.job.federation.sizes(ids, part),
                views,
                macs / bundling.MACS_PER_SECOND,
                bundling.auto_count(len(ids)),
                round=round,
                part=part,
            )
            shared = {0: self.algorithm.model(self.state)}
            return Evaluated.merged(self.executor.run(bundles, shared), views)

    # --- checkpoint and resume ---------------------------------------------------------------

    def _checkpoint_due(self, *, last: bool) -> bool:
        every = self.options.checkpoint_every
        return last or self.done == self.options.rounds or (every > 0 and self.done % every == 0)

    def _checkpoint(self) -> None:
        seen = np.flatnonzero(self.last_round >= 0)
        tree = {
            "state": self.state,
            "phase": self.phase_name,
            "clients": seen,
            "last_round": self.last_round[seen],
            "reports": self.reports,
            "engine": self.record.to_json(),
        }
        checkpoint.save(
            self.folder.checkpoints,
            self.done,
            tree,
            fingerprint=self.job.fingerprint,
            keep=self.options.keep_checkpoints,
            attach=(lambda to: self.kept.snapshot(to / "kept")) if self.algorithm.keeps else None,
        )

    def _restore(self) -> None:
        found = checkpoint.load_latest(self.folder.checkpoints, fingerprint=self.job.fingerprint)
        if found is None:
            self.state = self.algorithm.init(self.net.init(self.seed))
            return
        self.done = found.round
        self.state = found.state["state"]
        self.phase_name = found.state["phase"]
        self.last_round[found.state["clients"]] = found.state["last_round"]
        self.reports = found.state["reports"]
        written = self.folder.read_engine() or found.state["engine"]
        self.record = EngineRecord.from_json(written, str(self.folder.engine))
        if self.algorithm.keeps:
            self.kept.restore(found.path / "kept")

    def _write_record(self) -> None:
        self.folder.write_engine(self.record.to_json())


def work_of(phase: Phase, task: ClientTask) -> tuple[int, int]:
    """(steps, rows) that a task is planned to take."""
    program = phase.program
    if isinstance(program, LossProgram):
        stream = program.stream
    elif isinstance(program, StepProgram):
        stream = next(iter(program.streams.values()))
    else:
        return 1, task.num_samples
    steps = stream.num_steps(task.num_samples)
    rows = stream.rows(task.num_samples)
    return steps, steps * (rows if stream.batch is None else min(stream.batch, rows))
