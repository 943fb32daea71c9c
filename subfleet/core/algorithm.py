"""The core types: what an algorithm is, what a client is asked, what it returns.

An algorithm is a frozen value made of pure functions. It says what the server
plans, what one client does, and how the server steps. The platform owns loops,
batching, devices, Ray, retries, stored state and metrics.

    round r:  phase = algorithm.phase(r)
              plan = algorithm.plan(state, cohort, r)          # who trains which sub-network
              results = one ClientProgram run per task          # on any host, in any order
              state = algorithm.server_step(state, plan, reduced)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from subfleet.core import seeds
from subfleet.core.aggregate import Update
from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

Params: TypeAlias = dict[str, Tensor]
"""A flat tree of tensors with module-style names, ``{"conv1.weight": ...}``."""

State: TypeAlias = dict[str, Any]
"""The server's whole state: a nested dict of tensors, arrays and JSON scalars."""

FULL = IndexMap.full()


# --- what a client is known by -------------------------------------------------------------


class Cohort(NamedTuple):
    """The clients of one round as arrays, one row a client (C rows), sorted by id."""

    id: np.ndarray  # int64 [C]
    num_samples: np.ndarray  # int64 [C], training samples
    tier: np.ndarray  # int16 [C], index into Setting.tiers
    label_counts: np.ndarray | None  # int64 [C, classes], only if Phase.wants_labels
    last_round: np.ndarray  # int32 [C], -1 when never trained
    report: list[dict[str, Any] | None]  # what the client last reported


@dataclass(frozen=True)
class TierSize:
    """A budget tier and the largest sub-network that its budget allows.

    `flops` are multiply-accumulates of one sample's forward pass; `params` are
    the parameters on the wire. None means unlimited.
    """

    name: str
    share: float
    map: IndexMap
    flops: int | None = None
    params: int | None = None


# --- what a client does ----------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A client's batches over one of its parts.

    `epochs` passes over the part, or exactly `steps` batches (cycling). `batch`
    None means the whole part at once. `redraw` says whether the order is drawn
    anew each round or fixed for the run; `spans_rounds` continues where the
    former round stopped. `take` and `skip` cut the drawn order by fractions:
    ADDS validates on the first tenth of each round's order and trains on the rest.
    """

    part: Literal["train", "test", "all"] = "train"
    batch: int | None = 20
    epochs: int = 1
    steps: int | None = None
    redraw: Literal["round", "run"] = "round"
    spans_rounds: bool = False
    skip: float = 0.0
    take: float = 1.0

    def num_steps(self, num_samples: int) -> int:
        """How many batches `num_samples` rows give.

        >>> Stream(batch=20, epochs=3).num_steps(50)
        9
        >>> Stream(batch=None, epochs=2).num_steps(50), Stream(steps=7).num_steps(50)
        (2, 7)
        """
        rows = self.rows(num_samples)
        if rows == 0:
            return 0
        if self.steps is not None:
            return self.steps
        return self.epochs * (1 if self.batch is None else -(-rows // self.batch))

    def rows(self, num_samples: int) -> int:
        """The rows left after `skip` and `take`; at least one where there are any."""
        first, last = self.bounds(num_samples)
        return last - first

    def bounds(self, num_samples: int) -> tuple[int, int]:
        """First and last place in the drawn order, the last exclusive.

        Streams that share an edge (one takes 0.1, the other skips 0.1) share no row;
        from two rows on, each side of an edge has at least one.

        >>> Stream(take=0.1).bounds(15), Stream(skip=0.1, take=0.9).bounds(15)
        ((0, 2), (2, 15))
        """
        if num_samples == 0:
            return 0, 0
        first = min(_edge(self.skip, num_samples), num_samples - 1)
        return first, max(first + 1, _edge(self.skip + self.take, num_samples))


def _edge(fraction: float, num_samples: int) -> int:
    """The row at which a fraction of the rows ends; strictly inside where the fraction is."""
    slack = 1e-9  # 0.1 + 0.2 is the same edge as 0.3
    if fraction <= slack:
        return 0
    if fraction >= 1 - slack:
        return num_samples
    return max(1, min(int(fraction * num_samples + 0.5 + slack), num_samples - 1))


@dataclass(frozen=True)
class LocalRule:
    """The optimiser step of a `LossProgram`, owned by the engine.

    w <- w - lr * v,  v <- momentum * v + (clip(g) + weight_decay * w + proximal * (w - w_start))
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay", "proximal"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name}={getattr(self, name)} is negative; use 0 or more")


class Batch(NamedTuple):
    """One batch. `weight` is None, or 1 for real rows and 0 for padding (mapped clients)."""

    x: Tensor  # [B, *input_shape]
    y: Tensor  # [B]
    weight: Tensor | None  # [B] or None

    def mean(self, per_example: Tensor) -> Tensor:
        """The mean of [B] values over the real rows."""
        if self.weight is None:
            return per_example.mean()
        return (per_example * self.weight).sum() / self.weight.sum().clamp(min=1.0)


class Noise(NamedTuple):
    """Counter-based randomness of one step: equal under loop, vmap, compile and CUDA."""

    key: Tensor | int  # an int64 scalar tensor where clients are mapped
    device: torch.device | None = None

    def uniform(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        """Numbers in (0, 1) of the given shape."""
        return seeds.uniform(torch.as_tensor(self.key, device=self.device), shape, salt=salt)


class Net(Protocol):
    """The physically small network of a variant: `net(params, x) -> logits`."""

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Logits of a batch, [B, classes]."""
        ...


class Loss(Protocol):
    """`loss(net, params, batch, noise, inputs) -> (scalar, metrics)`, pure."""

    def __call__(
        self, net: Net, params: Params, batch: Batch, noise: Noise, inputs: Params
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, a scalar, and metrics to log."""
        ...


@dataclass(frozen=True)
class ClientResult:
    """What one client hands back.

    `update` holds small tensors, in the shape of the client's sub-network;
    `units` says which units they cover where the client itself chose them
    (bool [C_g] per group, relative to the super-network), None where the task's
    map already says it. `kept` replaces the client's own state, `report` its
    entry in the next `Cohort`. `wire_bytes` is given by an algorithm that
    encodes; None means the formula of a dense sub-network.
    """

    update: Params
    units: dict[str, Tensor] | None = None
    kept: Params | None = None
    report: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    wire_bytes: int | None = None


@dataclass(frozen=True)
class LossProgram:
    """Form (a): a loss and a local rule; the engine takes gradients and owns the buffers.

    After the last step `finish(start, trained, kept, inputs)` may turn the
    trained tensors into a result (compress them, keep a residual). It runs
    outside vmap, once a client; None uploads the trained tensors.
    `kind(i)` names the i-th step where kinds of step alternate.
    """

    loss: Loss
    rule: LocalRule
    stream: Stream
    finish: Callable[[Params, Params, Params | None, Params], ClientResult] | None = None


@dataclass(frozen=True)
class StepProgram:
    """Form (b): pure functions over trees, gradients inside.

    `init(net, params, kept, inputs) -> local state`,
    `step(net, local, {stream: Batch}, noise, inputs) -> (local, metrics)`,
    `final(net, local, inputs) -> ClientResult`. The first stream sets the
    number of steps; the others cycle. `kind(i)` is a static label handed to
    `step` as `kind` where steps alternate.
    """

    init: Callable[..., Params]
    step: Callable[..., tuple[Params, dict[str, Tensor]]]
    final: Callable[..., ClientResult]
    streams: Mapping[str, Stream]
    kind: Callable[[int], Hashable] | None = None


class RunContext(NamedTuple):
    """What a form-(c) program sees of its client."""

    supernet: SuperNetwork
    params: Params  # the task's slice
    kept: Params | None
    inputs: Params
    task: ClientTask
    data: Callable[[str], tuple[Tensor, Tensor]]  # part -> (x, y) on the device
    generator: Callable[[str], np.random.Generator]  # purpose -> this client's generator


@dataclass(frozen=True)
class RunProgram:
    """Form (c): plain Python over one client's data, such as a search."""

    run: Callable[[RunContext], ClientResult]


ClientProgram: TypeAlias = LossProgram | StepProgram | RunProgram


# --- what the server asks for, and what comes back ------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientTask:
    """One client's work: which sub-network, with which weight, from which shared tree."""

    client: int
    map: IndexMap
    variant: Hashable  # static: clients of one variant have the same shapes
    weight: float  # a_k of the indexed aggregation
    num_samples: int
    tier: int
    inputs: Params = field(default_factory=dict)
    shared: int = 0  # which tree of RoundPlan.shared it starts from


@dataclass(frozen=True)
class RoundPlan:
    """The tasks of a round and the trees they start from, by version."""

    tasks: list[ClientTask]
    shared: Mapping[int, Params]


@dataclass(frozen=True)
class Phase:
    """What holds for a stretch of rounds, from configuration alone.

    `eligible` names the tiers that take part (None: all). `reduction` is "sum"
    (indexed sums, made on the hosts) or "collect" (every result as it is, for
    searches and distillation). `fraction` of the eligible clients, or None for
    the experiment's cohort.
    """

    name: str
    program: ClientProgram
    reduction: Literal["sum", "collect"] = "sum"
    eligible: tuple[str, ...] | None = None
    fraction: float | None = None
    wants_labels: bool = False


@dataclass(frozen=True)
class Collected:
    """One client's whole result under the "collect" reduction, in task order."""

    task: ClientTask
    result: ClientResult


Reduced: TypeAlias = Update | list[Collected]


@dataclass(frozen=True)
class Evaluation:
    """How a client measures a model, perhaps after training it a little.

    `prepare` is a program run on the client's training part first (a one-step
    adaptation); `calibrate` re-estimates BatchNorm statistics there over that
    many batches, for algorithms that keep no global statistics.
    """

    prepare: LossProgram | None = None
    calibrate: int = 0
    batch: int = 256

    @property
    def adapts(self) -> bool:
        """Whether clients use their training part before they test."""
        return self.prepare is not None or self.calibrate > 0


# --- the algorithm ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What an algorithm knows of the experiment before round 1."""

    net: SuperNetwork
    tiers: tuple[TierSize, ...]
    rule: LocalRule
    stream: Stream
    seed: int
    rounds: int

    @property
    def smallest(self) -> TierSize:
        """The tier whose sub-network has the fewest multiply-accumulates (then parameters)."""

        def size(tier: TierSize) -> tuple[int, int]:
            cost = self.net.cost(tier.map)
            return cost.macs, cost.params

        return min(self.tiers, key=size)


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms: frozen, its fields after `setting` are its options.

    A subclass states at least `phase` and `plan`; what most share lives in
    `subfleet.algorithms.local`.
    """

    setting: Setting

    paper: ClassVar[str] = ""

    def init(self, params: Params) -> State:
        """The server's state before round 1, from freshly drawn parameters."""
        return {"params": params}

    def phase(self, round: int) -> Phase:
        """The phase that round (1-based) belongs to, from configuration alone."""
        raise TypeError(f"{type(self).__name__} must define phase()")

    def enter(self, phase: Phase, state: State) -> State:
        """Called once when `phase` begins; may prune or re-shape the state."""
        del phase
        return state

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Which client trains which sub-network from which tree."""
        raise TypeError(f"{type(self).__name__} must define plan()")

    def server_step(
        self, state: State, plan: RoundPlan, reduced: Reduced, server_data: Any = None
    ) -> State:
        """The next state; by default indexed aggregation keeps what nobody covered."""
        raise TypeError(f"{type(self).__name__} must define server_step()")

    def model(self, state: State) -> Params:
        """The super-network to evaluate, publish and export."""
        return state["params"]

    def views(self, state: State) -> dict[str, IndexMap]:
        """The sub-networks to evaluate: "global" and one for every tier."""
        del state
        return {"global": FULL} | {tier.name: tier.map for tier in self.setting.tiers}

    @property
    def evaluation(self) -> Evaluation:
        """How clients evaluate."""
        return Evaluation()

    @property
    def keeps(self) -> bool:
        """Whether clients keep a state of their own between rounds."""
        return False

    def initial_kept(self, task: ClientTask) -> Params:
        """A client's own state before it first trains, shaped for its task."""
        del task
        return {}
