"""FedCS: federated channel search, by which each client finds the network that fits it.

"Architecture Personalization in Resource-constrained Federated Learning", Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from subfleet.algorithms.local import PartialAveraging, tasks
from subfleet.algorithms.sandwich import Sandwich
from subfleet.algorithms.search import ChannelSearch
from subfleet.core.algorithm import (
    FULL,
    Cohort,
    Phase,
    Reduced,
    RoundPlan,
    State,
    TierSize,
)
from subfleet.core.errors import InputError
from subfleet.core.masks import refuse_joint_norms
from subfleet.core.program import ClientTask, LocalRule, RunProgram
from subfleet.core.pruning import Criterion
from subfleet.core.trials import Statistics
from subfleet.core.units import IndexMap

PhaseName = Literal["warm-up", "search", "train"]
PHASES: tuple[PhaseName, ...] = ("warm-up", "search", "train")


@dataclass(frozen=True)
class FedCS(PartialAveraging):
    """Warms up a super-network, lets each client prune it to its budget, trains the results.

    warm-up  clients that can run the whole network train all its widths (`Sandwich`):
             w <- sum_k (n_k / sum n) w_k
    search   one round, in which each client shrinks the group that costs it the least
             accuracy, step by step, until C(theta_k) <= B_k; nothing is trained
    train    each client trains its first theta_k channels; merged by FedPA

    The phases share `run.rounds`, and `train.schedule` begins anew in each. Clients whose
    budget holds the whole network keep it. A tier's budget is its operations, its parameters,
    or both, as [fleet] gives them; a tier of a width affords the operations of that width.
    Training starts from scratch, as in the paper's comparison, unless `inherit`.

    Options:
        phases: Some of "warm-up", "search" and "train", in this order. What a phase that is left
            out would give is taken from the run that `run.start_from` names.
        warm_up: Rounds of warm-up before the search; the paper takes 30 % of the training's.
        shrink: The share of its channels that a group loses in a step of the search, in (0, 1);
            a step takes one channel at least.
        multiple: A step leaves a multiple of so many channels.
        min_units: The search leaves each group so many channels at least.
        min_share: The search leaves each group this share of its channels at least, in (0, 1].
        samples: The most training samples that a client scores sub-networks on, 2 or more.
        search_statistics: BatchNorm's statistics while searching: those of the scored samples
            ("batch"), or estimated anew for each sub-network ("calibrated"), which takes three
            times as long.
        criterion: What decides between two steps: "accuracy" alone, or "accuracy_then_loss", the
            loss where accuracies are equal, as they often are on few samples.
        lazy: Whether a group is scored anew only when it would be the next to shrink. That is
            several times as fast, and finds nearly the same network.
        searchers: The share of the clients that search, in (0, 1]; the others train the
            sub-network of their tier.
        narrowest: The narrowest width that the warm-up trains, in (0, 1).
        widths: How many widths a step of the warm-up trains, the whole network and the narrowest
            among them; 2 or more.
        mixed: Whether half of the drawn widths differ from group to group.
        inherit: Whether training starts from the weights of the warm-up.
    """

    phases: tuple[PhaseName, ...] = PHASES
    warm_up: int = 30
    shrink: float = 0.1
    multiple: int = 1
    min_units: int = 8
    min_share: float = 0.25
    samples: int = 512
    search_statistics: Statistics = "batch"
    criterion: Criterion = "accuracy_then_loss"
    lazy: bool = False
    searchers: float = 1.0
    narrowest: float = 0.35
    widths: int = 4
    mixed: bool = True
    inherit: bool = False

    paper: ClassVar[str] = "APFL (FedCS)"

    def __post_init__(self) -> None:
        self._check_options()
        if not self.phases or list(self.phases) != [p for p in PHASES if p in self.phases]:
            raise InputError(
                f"algorithm.phases={list(self.phases)} is not in order; give some of "
                f"{list(PHASES)}, each once"
            )
        if "warm-up" in self.phases and not self._rich:
            raise InputError(
                f"no tier of [fleet] can run the whole of {self.setting.net.name!r}, which takes "
                f"{self.setting.net.cost().macs:,} operations, to warm it up; give a tier the "
                "width 1.0, or start from a run that did (run.start_from)"
            )
        for name in sorted({"warm-up", "train"}.intersection(map(self._phase_of, self._rounds))):
            self._check_schedule(name)
        if "search" in self.phases:
            refuse_joint_norms(self.setting.net, "the search")
            self._search.check()

    def _check_options(self) -> None:
        open_shares = {"shrink": self.shrink, "narrowest": self.narrowest}
        for name, value in open_shares.items():
            if not 0 < value < 1:
                raise InputError(
                    f"algorithm.{name}={value} is outside (0, 1); "
                    f"give {getattr(type(self), name)}, say"
                )
        for name in ("min_share", "searchers"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"algorithm.{name}={getattr(self, name)} is outside (0, 1]; "
                    f"give {getattr(type(self), name)}, say"
                )
        for name, least in (
            ("warm_up", 1),
            ("multiple", 1),
            ("min_units", 1),
            ("samples", 2),
            ("widths", 2),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"algorithm.{name}={getattr(self, name)} is below {least}; "
                    f"give {getattr(type(self), name)}, say"
                )

    def _check_schedule(self, name: str) -> None:
        schedule = self.setting.rule.schedule
        length = sum(self._phase_of(round) == name for round in self._rounds)
        if schedule is not None and schedule.name == "cosine" and schedule.warmup >= length:
            raise InputError(
                f"train.warmup={schedule.warmup} leaves no round of the {name}'s {length} to the "
                "cosine, which begins anew in each phase; give fewer rounds of train.warmup"
            )

    # --- phases --------------------------------------------------------------------------

    @cached_property
    def _ends(self) -> dict[PhaseName, int]:
        """The last round of each phase but the last, which ends with the run, in order."""
        lengths = {"warm-up": self.warm_up, "search": 1}
        found: dict[PhaseName, int] = {}
        done = 0
        for name in self.phases[:-1]:
            done += lengths[name]
            found[name] = done
        return found

    def _phase_of(self, round: int) -> PhaseName:
        for name, last in self._ends.items():
            if round <= last:
                return name
        return self.phases[-1]

    def doubts(self) -> tuple[str, ...]:
        """Phases that the run ends before, and a search that is made again and again."""
        before, rounds = max(self._ends.values(), default=0), self.setting.rounds
        if rounds <= before:
            return (
                f"run.rounds = {rounds} ends before the {self.phases[-1]}, which begins after "
                f"round {before}; lower algorithm.warm_up={self.warm_up} or take more rounds",
            )
        if self.phases[-1] == "search" and rounds > before + 1:
            return (
                f"run.rounds = {rounds} searches {rounds - before} times, and the last search "
                f"counts: run.rounds = {before + 1} is enough",
            )
        return ()

    @property
    def builds_on(self) -> str:
        """A warm super-network, where none is made here and one is read."""
        reads = "search" in self.phases or self.inherit
        return (
            "weights that a warm-up has trained" if reads and "warm-up" not in self.phases else ""
        )

    @property
    def _rounds(self) -> range:
        return range(1, self.setting.rounds + 1)

    def phase(self, round: int) -> Phase:
        """The phase that a round belongs to; the last goes on beyond `run.rounds`."""
        name = self._phase_of(round)
        if name == "search":
            return Phase(
                name,
                RunProgram(self._search.run, passes=self._search.passes),
                reduction="collect",
                fraction=self.searchers,
            )
        rule = self._rule(name, round)
        if name == "train":
            program = super().phase(round).program
            return Phase(name, replace(program, rule=rule))
        sandwich = Sandwich(
            net=self.setting.net,
            rule=rule,
            seed=self.setting.seed,
            round=round,
            narrowest=self.narrowest,
            count=self.widths,
            mixed=self.mixed,
        )
        return Phase(name, sandwich.program(self.setting.stream), eligible=self._rich)

    @cached_property
    def _search(self) -> ChannelSearch:
        return ChannelSearch(
            net=self.setting.net,
            tiers=self.setting.tiers,
            shrink=self.shrink,
            multiple=self.multiple,
            min_units=self.min_units,
            min_share=self.min_share,
            samples=self.samples,
            statistics=self.search_statistics,
            criterion=self.criterion,
            lazy=self.lazy,
        )

    def _rule(self, name: PhaseName, round: int) -> LocalRule:
        """The local rule of a round, by the schedule of its own phase."""
        rule = self.setting.rule
        if rule.schedule is None:
            return rule
        before = max((end for end in self._ends.values() if end < round), default=0)
        length = max(1, self._ends.get(name, self.setting.rounds) - before)
        return replace(rule, schedule=replace(rule.schedule, rounds=length)).at(round - before)

    def enter(self, phase: Phase, state: State) -> State:
        """Before training, fresh weights: those that any other algorithm starts from."""
        if phase.name != "train" or self.inherit:
            return state
        return state | self.init(self.setting.net.init(self.setting.seed))

    @cached_property
    def _rich(self) -> tuple[str, ...]:
        """The tiers that can run the whole super-network."""
        return tuple(tier.name for tier in self.setting.tiers if self._holds_all(tier))

    def _holds_all(self, tier: TierSize) -> bool:
        return tier.budget(self.setting.net).feasible(self.setting.net.cost())

    # --- rounds --------------------------------------------------------------------------

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """The whole network for all, or in training what each client found."""
        work = tasks(self.setting.net, cohort, lambda tier: self.map_of(tier, round))
        if self._phase_of(round) == "train":
            self._check_found(cohort, round)
            work = list(map(self._personal, work, cohort.report))
        return RoundPlan(work, {0: state["params"]})

    def _personal(self, task: ClientTask, report: dict[str, Any] | None) -> ClientTask:
        map = self.client_map(self.setting.tiers[task.tier].map, report)
        return replace(task, map=map, variant=self.setting.net.space.counts(map))

    def _check_found(self, cohort: Cohort, round: int) -> None:
        """`InputError` where training begins a run and nobody has searched who should have."""
        if round > 1 or any(map(_found, cohort.report)):
            return
        for client, tier in zip(cohort.id, cohort.tier, strict=True):
            if not self._holds_all(self.setting.tiers[tier]):
                raise InputError(
                    f"client {client} of tier {self.setting.tiers[tier].name!r} has searched no "
                    "network, and nobody else has; name a run that did in run.start_from, or put "
                    '"search" into algorithm.phases'
                )

    def map_of(self, tier: int, round: int) -> IndexMap:
        """The whole network until training; then that of the tier, for who did not search."""
        return self.setting.tiers[tier].map if self._phase_of(round) == "train" else FULL

    def client_map(self, view: IndexMap, report: dict[str, Any] | None) -> IndexMap:
        """The sub-network that a client found, or its tier's."""
        if not _found(report):
            return view
        assert report is not None
        units = dict(zip(self.setting.net.elastic, report["units"], strict=True))
        return self.setting.net.space.canonical(IndexMap.prefix(units))

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """FedPA; a search leaves the super-network as it is."""
        return state if isinstance(reduced, list) else super().server_step(state, plan, reduced)


def _found(report: dict[str, Any] | None) -> bool:
    return report is not None and "units" in report
