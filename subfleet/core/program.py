"""What one client does: its batches, its step, and the three forms of a program.

Everything here is pure and knows neither where a client runs nor how many run
beside it. The engine owns loops, buffers, mapping and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from subfleet.core import seeds
from subfleet.core.errors import InputError
from subfleet.core.schedule import Schedule
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.core.watching import Passed

Params: TypeAlias = dict[str, Tensor]
"""A flat tree of tensors with module-style names, ``{"conv1.weight": ...}``."""


@dataclass(frozen=True)
class Stream:
    """A client's batches over one of its parts.

    `epochs` passes over the part, or exactly `steps` batches (cycling). `batch`
    None means the whole part at once. `redraw` says whether the order is drawn
    anew each round or fixed for the run; `spans_rounds` continues where the
    former round stopped. `take` and `skip` cut the drawn order by fractions:
    ADDS validates on the first tenth of each round's order and trains on the rest.
    """

    part: Literal["train", "val", "test", "all"] = "train"
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

    `lr` is multiplied by the `schedule`'s factor of the round; None leaves it as it is.
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    clip_norm: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay", "proximal"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name}={getattr(self, name)} is negative; use 0 or more")

    def at(self, round: int) -> LocalRule:
        """The rule of one round, with that round's rate.

        >>> LocalRule(lr=0.4, schedule=Schedule("step", milestones=(5,), decay=0.5)).at(6).lr
        0.2
        """
        if self.schedule is None:
            return self
        return replace(self, lr=self.lr * self.schedule.factor(round), schedule=None)


class Batch(NamedTuple):
    """One batch. `weight` is None, or 1 for real rows and 0 for padding.

    Padded are the part batches of clients side by side, and of those whose weights are held as
    factors: a loss takes its mean by `mean`.
    """

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

    def watched(self, params: Params, x: Tensor) -> tuple[Tensor, list[Passed]]:
        """The same, and what went through each layer, in the order in which they ran."""
        ...

    def at(self, units: Mapping[str, int]) -> Callable[[Params, Tensor], Tensor]:
        """The sub-network of the first `units[g]` units of each group: `at(units)(params, x)`.

        It takes the whole `params` and cuts what it reads, so that gradients come back whole.
        BatchNorm goes by the batch alone and leaves running statistics as they are.
        """
        ...

    def gradient(
        self, of: Callable[[Params], tuple[Tensor, Any]], at: Params
    ) -> tuple[Params, Tensor, Any]:
        """The gradient at `at` of the scalar in `of(at) -> (scalar, other)`, and these two.

        The one to use in a `StepProgram`: of a looped client's recurrent layers it is many
        times as fast as `torch.func.grad`. Of the first order: nothing comes back with a graph.
        """
        ...


class Loss(Protocol):
    """`loss(net, params, batch, noise, inputs) -> (scalar, metrics)`, pure."""

    def __call__(
        self, net: Net, params: Params, batch: Batch, noise: Noise, inputs: Params
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, a scalar, and metrics to log."""
        ...


@dataclass(frozen=True, slots=True)
class ClientTask:
    """One client's work: which sub-network, with which weight, from which shared tree.

    `bytes_down` is given by an algorithm that sends something else than the slice: all of
    its bytes. `bytes_up` likewise: the most that the client sends back, by which its time is
    planned. `steps` stands in for its stream's number of them: of a client that has time
    for fewer, say.
    """

    client: int
    map: IndexMap
    variant: Hashable  # static: clients of one variant have the same shapes
    weight: float  # a_k of the indexed aggregation
    num_samples: int
    tier: int
    inputs: Params = field(default_factory=dict)
    shared: int = 0  # which tree of RoundPlan.shared it starts from
    bytes_down: int | None = None
    steps: int | None = None
    bytes_up: int | None = None

    def __reduce__(self) -> tuple[type[ClientTask], tuple[Any, ...]]:
        # What a dataclass with slots does by itself takes twice as long, a thousand times a round.
        return ClientTask, _FIELDS(self)


_FIELDS = attrgetter(*(field.name for field in fields(ClientTask)))


@dataclass(frozen=True)
class ClientResult:
    """What one client hands back.

    `update` holds small tensors, in the shape of the client's sub-network, and may
    hold others beside them (`subfleet.core.units` says how those are cut). `units`
    says which units they cover where the client itself chose them (bool [C_g] per
    group, relative to the super-network), None where the task's map already says
    it. `kept` replaces the client's own state, `report` its
    entry in the next `Cohort`. `wire_bytes` is given by an algorithm that
    encodes; None means the formula of a dense sub-network. `local` is the client's
    own network for its local test, in the shape of its task, where that is not what
    it trained (a personal model; what is left of a network that it cut itself).
    `trace` is what the client writes about its own work, for people: named columns of one
    length, of numbers or of strings, such as `{"step": [0, 1], "accuracy": [0.3, 0.4]}`.
    The run folder keeps it; nothing that the run computes depends on it. `flops` are given
    where the work was not steps of training: what it is charged for.
    """

    update: Params
    units: dict[str, Tensor] | None = None
    kept: Params | None = None
    report: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    wire_bytes: int | None = None
    local: Params | None = None
    trace: Mapping[str, Sequence[Any] | np.ndarray] | None = None
    flops: float | None = None


@dataclass(frozen=True)
class LossProgram:
    """Form (a): a loss and a local rule; the engine takes gradients and owns the buffers.

    After the last step `finish(start, trained, kept, inputs)` may turn the
    trained tensors into a result (compress them, keep a residual). It runs
    outside vmap, once a client; None uploads the trained tensors.
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
    `step` as `kind` where steps alternate. `passes` says how often a step goes forward
    and backward through the task's network, with as many rows as the first stream's
    batch: what a client's training is charged.
    """

    init: Callable[..., Params]
    step: Callable[..., tuple[Params, dict[str, Tensor]]]
    final: Callable[..., ClientResult]
    streams: Mapping[str, Stream]
    kind: Callable[[int], Hashable] | None = None
    passes: float = 1.0


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
    """Form (c): plain Python over one client's data, such as a search.

    `passes` says about how often it goes forward and backward through the task's network
    with all of the client's rows, a forward pass being a third: for planning alone.
    """

    run: Callable[[RunContext], ClientResult]
    passes: float = 1.0


ClientProgram: TypeAlias = LossProgram | StepProgram | RunProgram
