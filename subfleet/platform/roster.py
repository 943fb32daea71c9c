"""The roster: who trains in a round, who is evaluated, and what is known of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from subfleet.core import seeds
from subfleet.core.algorithm import Cohort, Phase
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap
from subfleet.platform.bundles import BundleResult, TrainBundle
from subfleet.platform.job import Job


class Roster:
    """Draws cohorts and remembers, in arrays, when a client last trained and what it reported."""

    def __init__(self, job: Job):
        self._job = job
        self._seed = job.work.seed
        self._train_ids, self._held_out = job.split
        self._last_round = np.full(job.federation.num_clients, -1, np.int32)
        self._reports = dict(job.start.reports) if job.start is not None else {}

    @cached_property
    def tier_names(self) -> list[str]:
        """Tier names by index."""
        return [tier.name for tier in self._job.fleet.tiers]

    def wanted(self, phase: Phase) -> int:
        """How many clients are to train in a round."""
        size = self._job.options.cohort
        if phase.fraction is not None:
            size = max(1, int(phase.fraction * len(self._pool(phase)) + 0.5))
        return size

    def drawn(self, phase: Phase, round: int) -> np.ndarray:
        """Who trains in a round, in order: a function of the seed, the round and who may.

        More are asked than wanted where devices may fail or be late (`run.over_select`).
        """
        pool = self._pool(phase)
        generator = seeds.generator(self._seed, "cohort", round=round)
        size = min(self._asked(phase), len(pool))
        return np.sort(pool[generator.choice(len(pool), size, replace=False)])

    def _asked(self, phase: Phase) -> int:
        return self._job.asked(self.wanted(phase))

    def present(self, phase: Phase, round: int, time: float) -> tuple[np.ndarray, float]:
        """Who is asked of those who are there at a simulated time, and how long was waited.

        Where nobody is there, until the first one comes.
        """
        devices = self._job.devices
        if devices is None or not devices.come_and_go:
            return self.drawn(phase, round), 0.0
        pool, size = self._pool(phase), self._asked(phase)
        # Few of many clients are looked at, and more only where too few of them are there.
        some = min(4 * size, len(pool))
        while True:
            generator = seeds.generator(self._seed, f"cohort of {some}", round=round)
            ids = pool[generator.choice(len(pool), some, replace=False)]
            opens, _ = devices.presence(ids, self._job.fleet.tier_of[ids], time)
            there = np.flatnonzero(opens == 0)
            if len(there) >= size or some == len(pool):
                break
            some = min(4 * some, len(pool))
        wait = 0.0 if len(there) else float(opens.min())
        if np.isinf(wait):
            raise InputError(
                f"round {round}: none of {len(pool)} training clients is ever available; give some "
                "a window in fleet.device.available or in the trace's column `available`"
            )
        return np.sort(ids[np.flatnonzero(opens <= wait)[:size]]), wait

    def cohort(self, phase: Phase, round: int, ids: np.ndarray | None = None) -> Cohort:
        """The clients of a round (`drawn`, or the ones given), and what is known of each."""
        ids = self.drawn(phase, round) if ids is None else ids
        federation = self._job.federation
        return Cohort(
            id=ids,
            num_samples=federation.sizes(ids, "train"),
            tier=self._job.fleet.tier_of[ids],
            label_counts=federation.label_counts(ids) if phase.wants_labels else None,
            last_round=self._last_round[ids],
            report=[self._reports.get(client) for client in ids.tolist()],
        )

    def _pool(self, phase: Phase) -> np.ndarray:
        eligible, name = phase.eligible, phase.name
        if eligible is None:
            return self._train_ids
        wanted = [i for i, name in enumerate(self.tier_names) if name in eligible]
        pool = self._train_ids[np.isin(self._job.fleet.tier_of[self._train_ids], wanted)]
        if not len(pool):
            raise InputError(
                f"no training client is in the tiers {', '.join(eligible)}, who alone take part "
                f"in the phase {name!r}; give them a larger share in [fleet], or use more clients"
            )
        return pool

    @cached_property
    def evaluated(self) -> tuple[np.ndarray, str]:
        """The evaluated clients, fixed by the seed, and the part of their data that counts."""
        held = len(self._held_out) > 0
        pool = self._held_out if held else self._train_ids
        wanted = self._job.options.eval_clients or len(pool)
        if wanted < len(pool):
            generator = seeds.generator(self._seed, "evaluation")
            pool = np.sort(generator.choice(pool, wanted, replace=False))
        # A held-out client that only calibrates is tested on all its rows: BatchNorm's
        # statistics are estimated from its train rows without their labels. One that adapts
        # has trained on those labels, and must not be tested on them.
        adapts = self._job.work.algorithm.evaluation.prepare is not None
        return pool, "all" if held and not adapts else "test"

    def tiers_of(self, ids: np.ndarray) -> np.ndarray:
        """The names of the clients' tiers."""
        return np.array(self.tier_names)[self._job.fleet.tier_of[ids]]

    def own_maps(
        self, ids: np.ndarray, views: Mapping[str, IndexMap], results: Sequence[BundleResult]
    ) -> list[IndexMap]:
        """The clients' own sub-networks; what `results` report is newer than what is known."""
        newest = {client: report for r in results for client, report in r.reports.items()}
        own = self._job.work.algorithm.client_map
        return [
            own(views[tier], newest.get(client, self._reports.get(client)))
            for client, tier in zip(ids.tolist(), self.tiers_of(ids).tolist(), strict=True)
        ]

    def remember(
        self, round: int, bundles: Sequence[TrainBundle], results: Sequence[BundleResult]
    ) -> None:
        """Notes who trained in `round` and what they reported."""
        for bundle, result in zip(bundles, results, strict=True):
            self._last_round[bundle.ids] = round
            self._reports.update(result.reports)

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: entries of clients that ever trained, and all reports."""
        seen = np.flatnonzero(self._last_round >= 0)
        return {
            "clients": seen,
            "last_round": self._last_round[seen],
            "reports": self._reports,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Becomes what `to_state` saw."""
        self._last_round[state["clients"]] = state["last_round"]
        self._reports = state["reports"]
