"""The engine without the platform around it: bundles of rows in memory, each summed up.

Needs torch and NumPy, and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from sides.pool import Prepare, Train
from sides.workloads import LR, WORKLOADS, Workload

from subfleet.algorithms.fedavg import FedAvg
from subfleet.algorithms.local import cross_entropy
from subfleet.core.algorithm import FULL, Cohort, Setting, TierSize
from subfleet.core.program import LocalRule, LossProgram, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.models import ZOO
from subfleet.platform import bundles
from subfleet.platform.engine import Engine, Work
from subfleet.platform.record import (
    Choice,
    EngineRecord,
    candidates,
    fastest,
    possible,
    variant_name,
)


@dataclass(frozen=True)
class How:
    """What the user says of the engine; the rest is its own choice.

    `record` is the path of an `engine.json`, whose choices then hold.
    """

    engine: str = "auto"
    dtype: str = "float32"
    compiled: bool = False
    record: str | None = None


class Block(NamedTuple):
    """Rows of some clients, client after client."""

    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray


def network(workload: Workload) -> SuperNetwork:
    """The product's own network of a workload."""
    return ZOO[workload.model](input_shape=workload.shape, num_classes=workload.classes)


def choice_for(workload: Workload, device: str, how: How) -> Choice:
    """How the whole network is computed; `InputError` for what this release cannot do."""
    net = network(workload)
    variant = net.space.counts(FULL)
    if how.record is not None:
        held = EngineRecord.load(how.record).at(variant_name(variant), device, round=1)
        if held is None:
            raise SystemExit(f"{how.record} has no choice for {net.name} on {device}")
        return held
    ways = possible(net, LossProgram(cross_entropy, LocalRule(lr=LR), Stream()))
    worth = candidates(net, variant, device, how.engine, how.dtype, ways=ways, round=1)
    best = (
        worth[0] if len(worth) == 1 or how.engine != "auto" else _fastest(workload, device, worth)
    )
    return replace(best, compiled=how.compiled and best.way != "loop")


def _fastest(workload: Workload, device: str, worth: Sequence[Choice]) -> Choice:
    """What a run would choose: the fastest in a trial."""
    threads, algorithm = torch.get_num_threads(), _algorithm(workload)
    cohort = _cohort(workload, workload.cohort_of(0)[: max(c.side_by_side for c in worth)])
    plan = algorithm.plan(algorithm.init(algorithm.setting.net.init(0)), cohort, 1)
    trial = bundles.Trial(0, 1, tuple(plan.tasks), tuple(worth))
    found = _engine(algorithm, device).trial(
        trial, {"train": _block(workload, trial.ids)}, plan.shared
    )
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.empty_cache()
    return worth[fastest(found.table["seconds"])]


def _algorithm(workload: Workload) -> FedAvg:
    tier, stream = TierSize("all", 1.0, FULL), Stream(batch=workload.batch)
    net = network(workload)
    setting = Setting(net, (tier,), LocalRule(lr=LR), stream, seed=0, rounds=1_000_000)
    return FedAvg(setting, width=1.0)


def _engine(algorithm: FedAvg, device: str) -> Engine:
    return Engine(Work(algorithm.setting.net, algorithm, Scaling(), seed=0), device)


def start(name: str, device: str, processes: int, choice: Choice) -> Prepare:
    """One process of the engine. It gets its share of each round as a host does, in bundles."""
    workload = WORKLOADS[name]
    algorithm = _algorithm(workload)
    engine, net = _engine(algorithm, device), algorithm.setting.net
    state = algorithm.init(net.init(0))
    macs = net.cost(FULL).macs
    program = algorithm.phase(1).program
    rounds = 0

    def prepare(clients: list[int]) -> Train:
        nonlocal rounds
        rounds += 1
        plan = algorithm.plan(state, _cohort(workload, clients), rounds)
        seconds = bundles.predicted_seconds(program, plan.tasks[0], macs)
        count = bundles.auto_count(workload.cohort, seconds * workload.cohort) // processes
        cut = bundles.cut(
            plan.tasks,
            lambda task: seconds,
            max(1, count),
            round=rounds,
            choices={choice.variant: choice},
        )
        blocks = [_block(workload, bundle.ids) for bundle in cut]

        def run() -> None:
            for bundle, block in zip(cut, blocks, strict=True):
                engine.train(bundle, {"train": block}, plan.shared)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return prepare


def _cohort(workload: Workload, clients: list[int]) -> Cohort:
    count = len(clients)
    return Cohort(
        id=np.sort(np.array(clients, np.int64)),
        num_samples=np.full(count, workload.samples, np.int64),
        tier=np.zeros(count, np.int16),
        label_counts=None,
        last_round=np.full(count, -1, np.int32),
        report=[None] * count,
    )


def _block(workload: Workload, clients: np.ndarray) -> Block:
    drawn = [workload.rows(client) for client in clients.tolist()]
    x, y = (torch.cat(parts).numpy() for parts in zip(*drawn, strict=True))
    return Block(x, y, np.arange(len(clients) + 1) * workload.samples)
