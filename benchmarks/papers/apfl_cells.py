"""What APFL's page needs of a finished cell, computed from its run folder."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from common import reports
from measured import Finished


@dataclass(frozen=True)
class Cell:
    """What the page needs of a finished cell."""

    one: Finished

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The records of training rounds with an evaluation, in order."""
        return [r for r in self.training if r.get("acc_global") is not None]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The records of training rounds."""
        return [r for r in self.one.metrics if r["phase"] == "train"]

    def final(self, key: str) -> float:
        """The last value of a metric, in percent; NaN where there is none."""
        value = self.evaluated[-1].get(key)
        return float("nan") if value is None else 100 * value

    @cached_property
    def megabytes(self) -> np.ndarray:
        """Megabytes sent, both ways, up to each evaluated round of the training."""
        sent = np.cumsum([r["bytes_up"] + r["bytes_down"] for r in self.training]) / 1e6
        first = self.training[0]["round"]
        return np.array([sent[r["round"] - first] for r in self.evaluated])

    @property
    def before(self) -> float:
        """Megabytes sent before the training: in warm-up and search."""
        rest = [r for r in self.one.metrics if r["phase"] != "train"]
        return sum(r["bytes_up"] + r["bytes_down"] for r in rest) / 1e6

    @cached_property
    def accuracy(self) -> np.ndarray:
        """acc_global of each evaluated round of the training, percent."""
        return 100 * np.array([r["acc_global"] for r in self.evaluated])

    def megabytes_to(self, target: float) -> float:
        """Megabytes until the accuracy first reaches the target; NaN if it never does.

        On the straight line between two evaluations; rows are evaluated in different rounds.
        """
        reached = np.flatnonzero(self.accuracy >= target)
        if not len(reached):
            return float("nan")
        at = int(reached[0])
        span = slice(max(0, at - 1), at + 1)
        return float(np.interp(target, self.accuracy[span], self.megabytes[span]))

    @cached_property
    def sizes(self) -> dict[int, tuple[str, float, float]]:
        """Of each client its tier, parameters and operations in the last round."""
        table = self.one.run.clients()
        last = max(table.column("round").to_pylist())
        rows = zip(
            *(table.column(n).to_pylist() for n in ("round", "client", "tier", "params", "macs")),
            strict=True,
        )
        return {c: (tier, params, macs) for r, c, tier, params, macs in rows if r == last}

    def mean_size(self, at: int) -> float:
        """The mean over clients of the parameters (1) or the operations (2)."""
        return statistics.fmean(float(size[at]) for size in self.sizes.values())

    @cached_property
    def found(self) -> dict[int, np.ndarray]:
        """The units of each group that a client found; clients that keep the whole have none."""
        return {
            client: np.array(report["units"])
            for client, report in reports(self.one.run.path).items()
            if "units" in report and self.sizes[client][0] != "high"
        }

    def distances(self) -> list[float]:
        """L2 distances between the networks of clients of one budget, in units."""
        pairs = combinations(sorted(self.found), 2)
        return [
            float(np.linalg.norm(self.found[a] - self.found[b]))
            for a, b in pairs
            if self.sizes[a][0] == self.sizes[b][0]
        ]

    def seconds(self, phase: str) -> np.ndarray:
        """Seconds that each client of a phase's rounds took on one core, one entry a round."""
        table = self.one.run.clients()
        rounds = {r["round"] for r in self.one.metrics if r["phase"] == phase}
        rows = zip(*(table.column(n).to_pylist() for n in ("round", "seconds")), strict=True)
        return np.array([seconds for round, seconds in rows if round in rounds])

    @property
    def warm(self) -> float:
        """Loss of the whole network in the last round of warm-up; NaN where there is none."""
        losses = [r["loss_train"] for r in self.one.metrics if r["phase"] == "warm-up"]
        return losses[-1] if losses else float("nan")

    def to_json(self) -> dict[str, Any]:
        """All figures, NaN as None."""
        slowest = self.seconds("search")
        found = {
            "seed": self.one.seed,
            "acc_global": self.final("acc_global"),
            "acc_own": self.final("acc_own"),
            "acc_own_worst10": self.final("acc_own_worst10"),
            "params": self.mean_size(1),
            "macs": self.mean_size(2),
            "mb_training": float(self.megabytes[-1]),
            "mb_before": self.before,
            "warm_up_loss": self.warm,
            "warm_up_s": float(self.seconds("warm-up").sum()),
            "search_s": float(slowest.sum()),
            "search_slowest_s": float(slowest.max()) if len(slowest) else float("nan"),
            "accuracy": self.accuracy.tolist(),
            "megabytes": self.megabytes.tolist(),
            "distances": self.distances(),
        }
        return {name: None if value != value else value for name, value in found.items()}
