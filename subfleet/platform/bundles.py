"""Bundles: the one unit of scheduling, retry and reduction.

A bundle is a run of the cohort sorted by (variant, client id), cut at a
predicted cost. Which bundles there are follows from the plan alone, never from
the number of hosts or from measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.aggregate import Update
from subfleet.core.algorithm import Collected
from subfleet.core.program import (
    ClientProgram,
    ClientTask,
    LossProgram,
    Params,
    RunProgram,
    StepProgram,
)
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.platform.record import Choice, variant_name

# A nominal core, for predictions only: what a step costs beside its arithmetic, and
# multiply-accumulates per second. Measured figures would make the cut depend on the machine.
STEP_SECONDS = 4e-4
MACS_PER_SECOND = 1e10
BACKWARD = 3  # gradients cost about two passes more: forward and backward are three


@dataclass(frozen=True)
class TrainBundle:
    """Tasks for one host. `own` holds the clients' kept rows, in task order."""

    number: int
    round: int
    tasks: tuple[ClientTask, ...]
    choices: Mapping[str, Choice]
    predicted: float  # nominal seconds
    local_test: bool = False
    own: list[dict[str, np.ndarray] | None] = field(default_factory=list)

    @property
    def ids(self) -> np.ndarray:
        """Client ids in task order, int64."""
        return np.array([task.client for task in self.tasks], np.int64)

    def chunks(self) -> list[tuple[Hashable, list[int]]]:
        """Positions of the clients of each variant, in bundle order."""
        order = groupby(range(len(self.tasks)), key=lambda i: self.tasks[i].variant)
        return [(variant, list(positions)) for variant, positions in order]


class Own(NamedTuple):
    """A client's own network: its sub-network, and its kept row, None where it keeps nothing."""

    map: IndexMap
    kept: dict[str, np.ndarray] | None


@dataclass(frozen=True)
class EvalBundle:
    """Clients on which one host evaluates some sub-networks ("views").

    `own` holds each client's own network, in order of `ids`; it is empty where they are
    not measured.
    """

    number: int
    round: int
    ids: np.ndarray
    views: Mapping[str, IndexMap]
    part: str
    predicted: float
    own: tuple[Own, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Clients of one variant on which one host tries some choices, for their speed alone."""

    number: int
    round: int
    tasks: tuple[ClientTask, ...]
    choices: tuple[Choice, ...]
    predicted: float = 0.0

    @property
    def ids(self) -> np.ndarray:
        """Client ids in task order, int64."""
        return np.array([task.client for task in self.tasks], np.int64)


@dataclass(frozen=True)
class Merge:
    """Sums of other bundles, by number and in order, that one host adds up (see `merging`)."""

    number: int
    round: int
    of: tuple[int, ...]
    predicted: float = 0.0


Bundle = TrainBundle | EvalBundle | Trial | Merge


@dataclass(frozen=True)
class BundleResult:
    """What a host returns for a bundle: one partial sum, kept rows, a row per client.

    `table` holds arrays of one row per client, in task order (see `metrics`);
    `seconds` are the host's own, by phase.
    """

    number: int
    table: dict[str, np.ndarray]
    seconds: dict[str, float]
    update: Update | None = None
    collected: list[Collected] | None = None
    kept: list[Params | None] = field(default_factory=list)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    traces: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)  # by client


def passes(program: ClientProgram) -> float:
    """How often a step goes forward and backward through the client's network."""
    return 1.0 if isinstance(program, LossProgram) else program.passes


def flops(program: ClientProgram, macs: int, rows: int) -> float:
    """What training on so many rows costs a client; `macs` are those of one forward pass."""
    return float(BACKWARD * macs * rows * passes(program))


def kept_units(net: SuperNetwork, map: IndexMap) -> str:
    """How many units a sub-network keeps of each group, in order, as the column `units` has it."""
    return " ".join(str(count) for count in net.space.counts(map))


def predicted_seconds(program: ClientProgram, task: ClientTask, macs: int) -> float:
    """Nominal seconds of a client's training; `macs` are those of one forward pass."""
    if isinstance(program, RunProgram):
        steps, rows = 1, task.num_samples
    else:
        streams = program.streams.values() if isinstance(program, StepProgram) else [program.stream]
        stream = next(iter(streams))  # the first sets the number of steps
        steps = stream.num_steps(task.num_samples) if task.steps is None else task.steps
        size = stream.rows(task.num_samples)
        rows = steps * (size if stream.batch is None else min(stream.batch, size))
    once = steps * STEP_SECONDS + BACKWARD * macs * rows / MACS_PER_SECOND
    return passes(program) * once


BUNDLE_SECONDS = 0.7  # nominal; what a bundle should last to outweigh 20 ms of Ray's by far


def auto_count(clients: int, seconds: float, *, sums: bool = True) -> int:
    """How many bundles to cut clients of `seconds` nominal seconds in all into, by default.

    As many as last `BUNDLE_SECONDS` each, but at least 4, to keep hosts evenly busy, and
    at most about the square root of the clients, since each returns a sum of its own,
    unless there are no `sums`. A power of two.

    >>> [auto_count(n, 0.0022 * n) for n in (1, 20, 100, 1000, 10_000)]
    [1, 4, 4, 4, 32]
    """
    most = min(clients, max(4, _power_of_two(isqrt(clients)))) if sums else clients
    return min(most, max(4, _power_of_two(round(seconds / BUNDLE_SECONDS))))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cut(
    tasks: Sequence[ClientTask],
    cost: Callable[[ClientTask], float],
    count: int | None,
    *,
    round: int,
    choices: Mapping[str, Choice],
    local_test: bool = False,
    sums: bool = True,
) -> list[TrainBundle]:
    """Sorts tasks by (variant, client id) and cuts them into about `count` equal-cost bundles.

    `cost` is in nominal seconds; None leaves the count to `auto_count`, which `sums` is for.
    """
    ordered = sorted(tasks, key=lambda task: (variant_name(task.variant), task.client))
    costs = np.array([cost(task) for task in ordered])
    if not len(ordered):
        return []
    count = count or auto_count(len(ordered), float(costs.sum()), sums=sums)
    # A client goes to the bundle in which the middle of its cost falls.
    middle = np.cumsum(costs) - costs / 2
    place = np.minimum((middle / (costs.sum() or 1.0) * count).astype(int), count - 1)
    bundles = []
    for _, members in groupby(range(len(ordered)), key=lambda i: place[i]):
        at = list(members)
        mine = tuple(ordered[i] for i in at)
        names = {variant_name(task.variant) for task in mine}
        bundles.append(
            TrainBundle(
                number=len(bundles),
                round=round,
                tasks=mine,
                choices={name: choices[name] for name in sorted(names)},
                predicted=float(costs[at].sum()),
                local_test=local_test,
            )
        )
    return bundles


def cut_evaluation(
    ids: np.ndarray,
    sizes: np.ndarray,
    views: Mapping[str, IndexMap],
    seconds_per_sample: float | np.ndarray,
    count: int | None = None,
    *,
    round: int,
    part: str,
    own: Sequence[Own] = (),
) -> list[EvalBundle]:
    """Cuts the evaluated clients into about `count` bundles of equal cost.

    `seconds_per_sample` are nominal, one number or one a client; `own` is empty or one a client.
    """
    if len(ids) == 0:
        return []
    costs = np.maximum(sizes, 1) * np.broadcast_to(seconds_per_sample, len(ids))
    count = count or auto_count(len(ids), float(costs.sum()))
    place = ((np.cumsum(costs) - costs / 2) / costs.sum() * count).astype(int)
    members = [np.flatnonzero(place == p) for p in np.unique(place)]
    return [
        EvalBundle(
            number=n,
            round=round,
            ids=ids[at],
            views=views,
            part=part,
            predicted=float(costs[at].sum()),
            own=tuple(own[i] for i in at.tolist()) if own else (),
        )
        for n, at in enumerate(members)
    ]
