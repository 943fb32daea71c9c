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

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from subfleet.core.aggregate import Update, finish
from subfleet.core.budget import Budget, uniform_map
from subfleet.core.errors import InputError
from subfleet.core.program import (
    ClientProgram,
    ClientResult,
    ClientTask,
    LocalRule,
    LossProgram,
    Params,
    Stream,
)
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

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

    `flops` and `params` are the budget's limits, None where it has none: multiply-
    accumulates of one sample's forward pass, and parameters as papers count them,
    without biases and norms. `map` meets both. `width` is what a tier says that has neither.
    """

    name: str
    share: float
    map: IndexMap
    flops: int | None = None
    params: int | None = None
    width: float | None = None

    def budget(self, net: SuperNetwork) -> Budget:
        """The limits; a tier that says a width affords the operations of such a model."""
        if self.flops is self.params is None:
            map = self.map if self.width is None else uniform_map(net, self.width)
            return Budget(flops=max(net.cost(map).macs, net.cost(self.map).macs))
        return Budget(flops=self.flops, params=self.params)

    def over(self, net: SuperNetwork, map: IndexMap) -> list[tuple[str, int, int]]:
        """Where a sub-network costs more than the tier affords: (flops or params, cost, limit).

        A tier that states a width alone affords what its own sub-network costs.
        """
        cost = net.cost(map)
        limits = {"flops": self.flops, "params": self.params}
        if self.flops is self.params is None:
            own = net.cost(self.map)
            limits = {"flops": own.macs, "params": own.params}
        spent = {"flops": cost.macs, "params": cost.params}
        return [
            (name, spent[name], limit)
            for name, limit in limits.items()
            if limit is not None and spent[name] > limit
        ]


# --- what the server asks for, and what comes back ------------------------------------------


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
    many batches, for algorithms that keep no global statistics. `own` also measures
    every evaluated client's own network: `Algorithm.client_map` of its tier's view, with
    the weights of `Algorithm.client_params`. It is tested as it is, without `prepare`, and
    calibrates only where the client keeps no statistics.
    """

    prepare: LossProgram | None = None
    calibrate: int = 0
    batch: int = 256
    own: bool = False

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
class Algorithm(ABC):
    """Base of all algorithms: frozen, its fields after `setting` are its options.

    A subclass states at least `phase` and `plan`, and `server_step` where results are
    collected; what most share lives in `subfleet.algorithms.local`.
    """

    setting: Setting

    paper: ClassVar[str] = ""
    pools: ClassVar[bool] = False
    """Whether all training clients' data are to lie with one client, who trains alone."""

    def init(self, params: Params) -> State:
        """The server's state before round 1, from freshly drawn parameters or a former run's."""
        return {"params": params}

    def doubts(self) -> tuple[str, ...]:
        """Settings that are allowed and yet do not do what they seem to, in words.

        Each becomes a warning before round 1.
        """
        return ()

    @property
    def builds_on(self) -> str:
        """What it expects of a former run (`run.start_from`), in words; "" where nothing."""
        return ""

    @abstractmethod
    def phase(self, round: int) -> Phase:
        """The phase that round (1-based) belongs to, from configuration alone."""

    def enter(self, phase: Phase, state: State) -> State:
        """Called once when `phase` begins; may prune or re-shape the state."""
        del phase
        return state

    @abstractmethod
    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Which client trains which sub-network from which tree."""

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """The next state; by default the indexed mean, which keeps what nobody covered.

        `plan` holds the tasks of those who were trained: one that is too late for the round's
        deadline, or fails, is not among them.
        """
        del plan
        if not isinstance(reduced, Update):
            raise InputError(
                f"{type(self).__name__}.server_step is missing: where a phase's reduction is "
                '"collect" the mean is not made; define server_step(state, plan, reduced), of '
                'which `reduced` is a list of Collected, or let the phase say "sum"'
            )
        return state | {"params": finish(reduced, self.setting.net.space, state["params"])}

    def idle(self, state: State) -> State:
        """The next state where not one client arrived: by default it stays as it is."""
        return state

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

    def client_map(self, view: IndexMap, report: dict[str, Any] | None) -> IndexMap:
        """A client's own sub-network, to measure and export: by default its tier's view.

        `report` is what the client last reported, None where it never did.
        """
        del report
        return view

    def client_params(self, cut: Params, kept: Params | None) -> Params:
        """A client's own weights, to measure and export: the server's, cut, and what it keeps.

        `cut` is the server's model on the client's map. By default kept leaves that bear the
        network's own names replace the server's. `kept` is None where the client keeps
        nothing, or nothing is known of it.
        """
        names = self.setting.net.space.shapes
        return cut | {name: leaf for name, leaf in (kept or {}).items() if name in names}
