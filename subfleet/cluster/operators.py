"""Metrics for operators: how a run on Ray goes, through Ray's own Prometheus endpoint.

Ray serves them on each node's metrics port, with `ray_` before the names and `_total` after
those of counters. They are of the process that runs the rounds, and go with it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RUN = "run"  # the tag that all have: the name of the run's folder
PREFIX = "ray_"  # Ray's, before the names of all metrics of its users
AGAIN_S = 2.0  # after which gauges are set again; each costs a tenth of a millisecond
BOUNDS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_ENDINGS = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


class Metric(NamedTuple):
    """One metric as Ray is told of it."""

    name: str
    kind: str  # "gauge", "counter" or "histogram"
    meaning: str
    tag: str = ""  # a tag beside `run`, of which there are a few values

    @property
    def exported(self) -> tuple[str, ...]:
        """Names of its series as Prometheus sees them.

        >>> Metric("subfleet_retries", "counter", "Bundles that had to be run again.").exported
        ('ray_subfleet_retries_total',)
        """
        return tuple(f"{PREFIX}{self.name}{ending}" for ending in _ENDINGS[self.kind])

    @property
    def tags(self) -> tuple[str, ...]:
        """Keys of its tags."""
        return (RUN, self.tag) if self.tag else (RUN,)


METRICS: tuple[Metric, ...] = (
    Metric("subfleet_round", "gauge", "Last round done."),
    Metric("subfleet_rounds", "gauge", "Rounds that the run has in all."),
    Metric("subfleet_clients_per_second", "gauge", "Clients trained a second, in the last round."),
    Metric("subfleet_accuracy", "gauge", "Newest accuracy: global, local or own.", "of"),
    Metric("subfleet_loss", "gauge", "Newest loss: train or global.", "of"),
    Metric("subfleet_hosts_alive", "gauge", "Hosts that answer."),
    Metric("subfleet_bundles_in_flight", "gauge", "Bundles that hosts have at hand."),
    Metric("subfleet_rounds_done", "counter", "Rounds done by this process."),
    Metric("subfleet_clients_trained", "counter", "Clients whose updates were merged."),
    Metric("subfleet_retries", "counter", "Bundles that had to be run again."),
    Metric("subfleet_out_of_memory", "counter", "Rounds begun anew since memory ran out."),
    Metric(
        "subfleet_simulated_bytes",
        "counter",
        "Sent by (up) and to (down) simulated clients.",
        "way",
    ),
    Metric("subfleet_phase_seconds", "counter", "Seconds of rounds, by part.", "phase"),
    Metric("subfleet_round_seconds", "histogram", "Seconds of whole rounds."),
)
_BY_NAME = {metric.name: metric for metric in METRICS}
# A metric, the key of `metrics.jsonl` that it follows, and the value of its own tag.
_FROM_RECORDS = (
    ("subfleet_round", "round", ""),
    ("subfleet_clients_per_second", "clients_per_s", ""),
    ("subfleet_accuracy", "acc_global", "global"),
    ("subfleet_accuracy", "acc_local", "local"),
    ("subfleet_accuracy", "acc_own", "own"),
    ("subfleet_loss", "loss_train", "train"),
    ("subfleet_loss", "loss_global", "global"),
    ("subfleet_clients_trained", "clients", ""),
    ("subfleet_retries", "retries", ""),
    ("subfleet_out_of_memory", "out_of_memory", ""),
    ("subfleet_simulated_bytes", "bytes_up", "up"),
    ("subfleet_simulated_bytes", "bytes_down", "down"),
)


class OperatorMetrics:
    """An `Observer` that keeps Ray's metrics up to date: a millisecond a round.

    It may be pickled until the run begins: metrics belong to the process that makes them. What
    counts has no series before it first happens, for Ray counts no zeros. Gauges Ray forgets
    twenty seconds after they were set: they are set every two seconds, if it hears anything.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[tuple[str, str], float] = {}
        self._again_at = 0.0

    def on_start(self, info: dict[str, Any]) -> None:
        """Make the metrics, and say how far the run has come."""
        from ray.util.metrics import Counter, Gauge, Histogram

        for metric in METRICS:
            told: dict[str, Any] = {"description": metric.meaning, "tag_keys": metric.tags}
            if metric.kind == "histogram":
                made = Histogram(metric.name, boundaries=list(BOUNDS_S), **told)
            else:
                made = {"gauge": Gauge, "counter": Counter}[metric.kind](metric.name, **told)
            made.set_default_tags({RUN: Path(info["run_folder"]).name})
            self._metrics[metric.name] = made
        self._note("subfleet_rounds", info["rounds"])
        self._note("subfleet_round", info["start"])
        self._set_gauges()

    def on_hosts(self, alive: int, in_flight: int) -> None:
        """How many hosts there are, and what they have at hand; comes with every bundle."""
        rare = not in_flight or alive != self._gauges.get(("subfleet_hosts_alive", ""))
        self._note("subfleet_hosts_alive", alive)
        self._note("subfleet_bundles_in_flight", in_flight)
        if rare:  # nobody may ask for a while, and then it must not say that hosts are at work
            self._set("subfleet_hosts_alive")
            self._set("subfleet_bundles_in_flight")
        self._set_when_due()

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Take over what the round has to say."""
        del coverage
        for name, key, tag in _FROM_RECORDS:
            self._note(name, record.get(key), tag)
        self._note("subfleet_rounds_done", 1)
        for phase, seconds in record["seconds"].items():
            if phase == "total":
                self._note("subfleet_round_seconds", seconds)
            else:
                self._note("subfleet_phase_seconds", seconds, phase)
        self._set_when_due()

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing is at hand any more."""
        self.on_hosts(0, 0)
        self._set_gauges()

    def _set_when_due(self) -> None:
        if time.monotonic() > self._again_at:
            self._set_gauges()

    def _set_gauges(self) -> None:
        self._again_at = time.monotonic() + AGAIN_S
        for name, tag in self._gauges:
            self._set(name, tag)

    def _set(self, name: str, tag: str = "") -> None:
        tags = {_BY_NAME[name].tag: tag} if tag else None
        self._metrics[name].set(self._gauges[name, tag], tags)

    def _note(self, name: str, value: float | None, tag: str = "") -> None:
        """Count or observe a value, or keep it for its gauge; nothing unknown or not finite."""
        if value is None or not math.isfinite(value):
            return
        metric = _BY_NAME[name]
        tags = {metric.tag: tag} if tag else None
        if metric.kind == "gauge":
            self._gauges[name, tag] = float(value)
        elif metric.kind == "histogram":
            self._metrics[name].observe(float(value), tags)
        elif value > 0:
            self._metrics[name].inc(float(value), tags)
