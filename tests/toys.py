"""Tiny networks, federations and algorithms that several test files share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from subfleet.algorithms.local import cross_entropy
from subfleet.core.algorithm import (
    Algorithm,
    Cohort,
    Evaluation,
    Phase,
    RoundPlan,
    Setting,
    State,
    TierSize,
)
from subfleet.core.budget import width_map
from subfleet.core.program import ClientProgram, ClientTask, LocalRule, LossProgram, Params, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.datasets.federation import offsets_of
from subfleet.datasets.memory import InMemory
from subfleet.models import chain, small_cnn
from subfleet.platform import loop, mapped
from subfleet.platform.bundles import BundleResult, TrainBundle
from subfleet.platform.chunks import Chunk
from subfleet.platform.devices import Devices
from subfleet.platform.engine import Work
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.fleet import Fleet
from subfleet.platform.job import Job, RunOptions
from subfleet.platform.record import Choice, Dtype, EngineRecord, Way, variant_name
from subfleet.platform.resident import Resident
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.worker import Worker

FULL = IndexMap.full()


# --- networks ----------------------------------------------------------------------------------


def linear(dim: int, classes: int, *, bias: bool = True) -> SuperNetwork:
    """One linear layer "fc"; it has no units that could be dropped."""
    return chain(
        "linear", nn.Sequential(OrderedDict(fc=nn.Linear(dim, classes, bias=bias))), (dim,)
    )


def mlp(
    dim: int = 6, hidden: tuple[int, ...] = (8, 4), classes: int = 3, norm: bool = False
) -> SuperNetwork:
    """Linear layers "fc0", "fc1", ... with ReLU between, and BatchNorm after each on request."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, wide in enumerate(hidden):
        layers[f"fc{i}"] = nn.Linear(dim, wide)
        if norm:
            layers[f"norm{i}"] = nn.BatchNorm1d(wide)
        layers[f"act{i}"] = nn.ReLU()
        dim = wide
    layers["head"] = nn.Linear(dim, classes)
    return chain("mlp", nn.Sequential(layers), (layers["fc0"].in_features,))  # type: ignore


def cnn(norm: Literal["none", "batch", "group"] = "none") -> SuperNetwork:
    """conv 4, conv 6, FC 10 on 1 x 8 x 8 images of 4 classes."""
    return small_cnn(input_shape=(1, 8, 8), num_classes=4, channels=(4, 6), hidden=10, norm=norm)


# --- data --------------------------------------------------------------------------------------


def federation(
    sizes: list[int], shape: tuple[int, ...], classes: int, seed: int = 0, **options: Any
) -> InMemory:
    """Clients of the given sizes: a class's centre plus noise, so that it can be learned."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, sum(sizes))
    centres = draw.standard_normal((classes, *shape))
    x = (centres[y] + 0.5 * draw.standard_normal((len(y), *shape))).astype(np.float32)
    return InMemory(x, y, offsets_of(np.array(sizes)), num_classes=classes, **options)


def all_train(sizes: list[int], shape: tuple[int, ...], classes: int, seed: int = 0) -> InMemory:
    """The same, with every row in the train part."""
    return federation(sizes, shape, classes, seed, train=np.ones(sum(sizes), bool))


def loss_program(rule: LocalRule | None = None, stream: Stream | None = None) -> LossProgram:
    """Plain local training, by SGD in batches of 4 unless said otherwise."""
    return LossProgram(cross_entropy, rule or LocalRule(), stream or Stream(batch=4))


# --- algorithms and bundles ----------------------------------------------------------------------


def setting(
    net: SuperNetwork,
    widths: tuple[float, ...] = (1.0,),
    rule: LocalRule | None = None,
    stream: Stream | None = None,
    seed: int = 0,
    rounds: int = 4,
) -> Setting:
    """A setting with a tier for each width, equal shares."""
    tiers = tuple(TierSize(f"w{w}", 1 / len(widths), width_map(net, w)) for w in widths)
    return Setting(net, tiers, rule or LocalRule(), stream or Stream(batch=4), seed, rounds)


@dataclass(frozen=True)
class OneProgram(Algorithm):
    """An algorithm that is one program, for bundles that a test makes itself."""

    program: ClientProgram | None = None
    reduction: Literal["sum", "collect"] = "sum"
    own: Params = field(default_factory=dict)
    evaluates: Evaluation = field(default_factory=Evaluation)

    def phase(self, round: int) -> Phase:
        assert self.program is not None
        return Phase("only", self.program, self.reduction)

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        raise AssertionError("its bundles are a test's own")

    @property
    def keeps(self) -> bool:
        return bool(self.own)

    def initial_kept(self, task: ClientTask) -> Params:
        return self.own

    @property
    def evaluation(self) -> Evaluation:
        return self.evaluates


def task(
    net: SuperNetwork,
    client: int,
    map: IndexMap = FULL,
    *,
    weight: float = 1.0,
    samples: int = 0,
    inputs: Params | None = None,
) -> ClientTask:
    """A client's task; its variant is the unit counts of its map, as algorithms have it."""
    return ClientTask(client, map, net.space.counts(map), weight, samples, 0, inputs or {})


def choices(
    tasks: list[ClientTask], way: Way, width: int = 16, **options: Any
) -> dict[str, Choice]:
    """One entry for each variant."""
    names = {variant_name(t.variant) for t in tasks}
    return {n: Choice(n, "cpu", way, width if way == "vmap" else 1, **options) for n in names}


def run_bundle(
    algorithm: OneProgram,
    tasks: list[ClientTask],
    data: InMemory,
    shared: Params,
    way: Way = "loop",
    *,
    width: int = 16,
    round: int = 1,
    local_test: bool = False,
    own: list | None = None,
    worker: Worker | None = None,
    factored: bool = False,
) -> BundleResult:
    """A bundle run as a host would."""
    net, seed = algorithm.setting.net, algorithm.setting.seed
    worker = worker or Worker(Work(net, algorithm, Scaling(), seed), data, "cpu")
    chosen = choices(tasks, way, width, factored=factored)
    bundle = TrainBundle(0, round, tuple(tasks), chosen, 1.0, local_test, own or [])
    return worker.run(bundle, {0: shared})


def each(
    net: SuperNetwork,
    program: ClientProgram,
    tasks: list[ClientTask],
    data: InMemory,
    shared: Params,
    way: Way = "loop",
    *,
    width: int = 16,
    round: int = 1,
    seed: int = 0,
    own: list[Params | None] | None = None,
    dtype: Dtype = "float32",
    compiled: bool = False,
) -> list[tuple[Params, float, int]]:
    """Every client of one variant on its own: (what it uploads, mean loss, steps)."""
    (choice,) = choices(tasks, way, width, dtype=dtype).values()
    choice = replace(choice, compiled=compiled)
    ids = np.array([t.client for t in tasks])
    chunk = Chunk(
        net=net,
        program=program,
        choice=choice,
        tasks=tasks,
        positions=range(len(tasks)),
        blocks={part: data.block(ids, part) for part in ("train", "test", "all")},
        own=own or [None] * len(tasks),
        shared={0: shared},
        seed=seed,
        round=round,
        scale=Scaling(),
    )
    engine = mapped if way == "vmap" else loop
    out = []
    for trained in engine.run(chunk, Resident(net, tasks[0].map, choice)):
        update = {n: v.detach().clone() for n, v in trained.result.update.items()}
        out.append((update, trained.loss, trained.steps))
    return out


def same_bits(a: Params, b: Params) -> bool:
    """Whether two trees have equal names and equal values."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def distance(a: Params, b: Params) -> float:
    """The largest difference of any entry, relative to the largest entry (at least 1)."""
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    scale = max(1.0, *(float(v.abs().max()) for v in b.values()))
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a) / scale


def one_round(
    algorithm: Algorithm,
    data: InMemory,
    state: State,
    ids: list[int],
    tiers: list[int] | None = None,
    *,
    round: int = 1,
    way: Way = "loop",
) -> tuple[State, BundleResult]:
    """Plan, one bundle with everybody, server step: the next state and what the bundle returned."""
    clients = np.array(ids)
    cohort = Cohort(
        id=clients,
        num_samples=data.sizes(clients, "train"),
        tier=np.array(tiers or [0] * len(ids), np.int16),
        label_counts=data.label_counts(clients),
        last_round=np.full(len(ids), -1, np.int32),
        report=[None] * len(ids),
    )
    plan = algorithm.plan(state, cohort, round)
    worker = Worker(
        Work(algorithm.setting.net, algorithm, Scaling(), algorithm.setting.seed), data, "cpu"
    )
    tasks = sorted(plan.tasks, key=lambda t: variant_name(t.variant))
    bundle = TrainBundle(0, round, tuple(tasks), choices(tasks, way), 1.0)
    result = worker.run(bundle, plan.shared)
    reduced = result.update if result.update is not None else result.collected
    assert reduced is not None
    return algorithm.server_step(state, plan, reduced), result


# --- whole runs ----------------------------------------------------------------------------------


def job(algorithm: Algorithm, data: InMemory, **options: Any) -> Job:
    """A run of an algorithm in its own setting; `options` are those of `RunOptions`.

    Besides `record`, an engine record, and `devices`, a table for each tier.
    """
    given = algorithm.setting
    # The loop, where a test does not ask otherwise: tracing mapped steps takes seconds.
    options = {"rounds": given.rounds, "cohort": 4, "eval_every": 0, "engine": "loop"} | options
    record, tables = options.pop("record", EngineRecord()), options.pop("devices", [])
    fleet = Fleet(given.tiers, data.num_clients, given.seed)
    names = [tier.name for tier in given.tiers]
    return Job(
        work=Work(given.net, algorithm, data.scale, given.seed),
        federation=data,
        fleet=fleet,
        options=RunOptions(**options),
        config={},
        fingerprint="toy",
        record=record,
        devices=Devices.of(tables, names, fleet.tier_of, given.seed),
    )


def run(
    job: Job, path: Path, *, workers: int = 1, resume: bool = False, observers: tuple = ()
) -> dict[str, Any]:
    """Runs a job in its folder and returns the summary."""
    folder = RunFolder.open(path, "toy") if resume else RunFolder.create(path, "", "toy")
    executor = InlineExecutor(job.work, job.federation, "cpu", workers)
    try:
        return Rounds(job, executor, folder, observers).run()
    finally:
        executor.close()


class Crash(Exception):
    """What `StopAfter` raises."""


class StopAfter:
    """An observer that ends the run abruptly after a round, as a crash would."""

    def __init__(self, round: int):
        self.round = round

    def on_start(self, info: dict[str, Any]) -> None:
        """Nothing to do."""

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Raises after its round."""
        if record["round"] == self.round:
            raise Crash

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to do."""
