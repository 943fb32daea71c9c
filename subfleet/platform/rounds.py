"""The round loop: plan, train, merge, step, evaluate, write down, checkpoint.

It runs over any executor and knows nothing of Ray. The result is a function of
(experiment, seed, engine record).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from subfleet.core.algorithm import State
from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets.tables import Upcoming
from subfleet.platform import checkpoint
from subfleet.platform.bundles import BundleResult, TrainBundle
from subfleet.platform.clock import PhaseClock
from subfleet.platform.dispatch import Dispatch, kept_rows
from subfleet.platform.engine import SKIPPED, parts_needed
from subfleet.platform.executor import Executor
from subfleet.platform.files import last_checkpoint
from subfleet.platform.job import Job
from subfleet.platform.kept import KeptStore
from subfleet.platform.measure import (
    bytes_down,
    client_columns,
    coverage_counts,
    local_accuracy,
    mean_cost,
    round_record,
)
from subfleet.platform.memory import resident
from subfleet.platform.metrics import (
    ClientsLog,
    MetricsLog,
    Observer,
    params_sha256,
    summarise,
    tell,
    tell_clients,
)
from subfleet.platform.record import EngineRecord
from subfleet.platform.roster import Roster
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.simulated import Outcome, simulate
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
        self.traces: TraceFiles  # while it runs
        self.warnings: tuple[str, ...] = ()
        self.tuner = Tuner(job, executor, folder)
        self.hosts = Dispatch(
            job, executor, self.tuner, self.roster, self.clock, observers, self._heed_stop
        )
        self.done = 0
        self.phase_name = ""
        self.state: State = {}
        self.mean_cost = (float("nan"), float("nan"))  # of the last round's clients
        self.sim_time = 0.0  # seconds on the fleet's devices; 0 where they have no profile
        self._saved = 0  # the round of the newest checkpoint
        self._settled = False  # whether the state is that of `done` whole rounds
        self._stopping = False
        self._warned = False  # that nobody arrived

    @property
    def kept(self) -> KeptStore:
        """What clients keep, of an algorithm that keeps something, while the run goes on."""
        return self.hosts.kept

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
                self.hosts.kept = KeptStore(self.folder.kept)
                stack.callback(self.kept.close)
            self._restore()
            metrics.truncate(self.done)
            clients.truncate(self.done)
            self.traces.truncate(self.done)
            self.folder.write_config(self.job.config)
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
            tell_clients(self.observers, record["round"], rows)
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
        self.hosts.told = len(self.tuner.record.choices)

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
            if outcome and not plan.tasks:
                self._warn_of_nobody(round, outcome)
        bundles, results, reduced, narrowed = self.hosts.train(phase, plan, round, measured)
        self._refuse_nan(round, results)
        with self.clock.phase("server"):
            if plan.tasks:
                state = self.algorithm.server_step(state, plan, reduced)
            else:
                state = self.algorithm.idle(state)
        trained_s = perf_counter() - started
        evaluated = self.hosts.evaluate(round, state, bundles, results) if measured else None
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
                coverage=coverage,
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
        record["memory"] = resident()
        record["seconds"] = self.clock.take() | {"total": perf_counter() - started}
        return record, rows, coverage

    def _warn_of_nobody(self, round: int, outcome: Outcome) -> None:
        """Once: it may be the same in every round."""
        if not self._warned:
            self._warned = True
            tell(self.observers, f"warning: round {round}: {outcome.nobody(self.options.deadline)}")

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

    def _refuse_nan(self, round: int, results: Sequence[BundleResult]) -> None:
        if self.options.on_nan == "skip":
            return
        bad = [
            (int(result.table["client"][i]), self.roster.tier_names[int(result.table["tier"][i])])
            for result in results
            for i in np.flatnonzero(result.table["status"] == SKIPPED)
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
            for ids, trees in kept_rows(bundles, results):
                self.kept.write(ids, trees)

    # --- evaluation --------------------------------------------------------------------------

    def _evaluation_due(self, round: int) -> bool:
        every = self.options.eval_every
        return round == self.options.rounds or (every > 0 and round % every == 0)

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
            attach=self._snapshot if self.algorithm.keeps else None,
        )
        self._saved = self.done

    def _snapshot(self, to: Path) -> None:
        self.kept.snapshot(to / "kept")

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
