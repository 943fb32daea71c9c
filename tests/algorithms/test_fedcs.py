"""FedCS: its phases, each client's search, and what passes from one phase to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from subfleet.algorithms import FedCS, FedPA
from subfleet.config import Experiment
from subfleet.core.algorithm import Cohort, TierSize
from subfleet.core.budget import Budget
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.pruning import Score, prune
from subfleet.core.schedule import Schedule
from subfleet.core.units import IndexMap
from subfleet.doubts import doubts
from subfleet.launch import Run, assemble, launch
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.record import EngineRecord
from subfleet.platform.roster import Roster
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]
NET = toys.mlp(hidden=(12, 8), norm=True)
WIDTHS = (1.0, 0.6, 0.4)
TOY = {"warm_up": 2, "min_units": 2, "min_share": 0.2}


def fedcs(net=NET, rounds=5, rule=None, **options) -> FedCS:
    rule = rule or LocalRule(lr=0.05, momentum=0.5)
    setting = toys.setting(net, WIDTHS, rule, Stream(batch=4), seed=3, rounds=rounds)
    return FedCS(setting, **TOY | options)


def data(sizes=SIZES):
    return toys.all_train(sizes, (6,), 3, seed=1)


def finished(path: Path, algorithm: FedCS, sizes=SIZES, *, workers=1, **options) -> Rounds:
    """A run in which no client is held out, after its last round."""
    options = {"cohort": 5, "held_out": 0.0, "bundle_clients": 2} | options
    job = toys.job(algorithm, data(sizes), **options)
    folder = RunFolder.create(path, "", "toy")
    rounds = Rounds(job, InlineExecutor(job.work, job.federation, "cpu", workers), folder)
    rounds.run()
    return rounds


def reports(rounds: Rounds) -> dict[int, list[int]]:
    """The units that each client found."""
    return {c: report["units"] for c, report in rounds.roster.to_state()["reports"].items()}


def found(algorithm: FedCS, report: list[int]) -> dict[str, int]:
    return dict(zip(algorithm.setting.net.elastic, report, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Rounds:
    """All three phases: two rounds of warm-up, the search, two of training."""
    return finished(tmp_path_factory.mktemp("whole") / "run", fedcs())


def rows(rounds: Rounds) -> list[dict[str, Any]]:
    return ClientsLog(rounds.folder.clients).read().to_pylist()


def traces(rounds: Rounds) -> dict[int, list[dict[str, Any]]]:
    """The rows of each client's search, in order; what was not measured is None."""
    out: dict[int, list[dict[str, Any]]] = {}
    for row in Run(rounds.folder.path, {}).traces().to_pylist():
        known = {name: value if value == value else None for name, value in row.items()}
        out.setdefault(row["client"], []).append(known)
    return out


# --- phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "rounds", "expected"),
    [
        (("warm-up", "search", "train"), 27, {"warm-up": 6, "search": 1, "train": 20}),
        (("warm-up", "search"), 7, {"warm-up": 6, "search": 1}),
        (("warm-up", "train"), 9, {"warm-up": 6, "train": 3}),
        (("search", "train"), 4, {"search": 1, "train": 3}),
        (("warm-up",), 9, {"warm-up": 9}),
        (("search",), 1, {"search": 1}),
        (("train",), 3, {"train": 3}),
    ],
)
def test_phases_by_round(phases, rounds, expected):
    made = fedcs(rounds=rounds, phases=phases, warm_up=6)
    names = [made.phase(r).name for r in range(1, rounds + 1)]
    assert names == [name for name, length in expected.items() for _ in range(length)]
    assert made.doubts() == ()


@pytest.mark.parametrize("phases", [(), ("search", "warm-up"), ("train", "train")])
def test_phases_out_of_order_are_refused(phases):
    with pytest.raises(InputError, match=r"algorithm.phases=\[.*\] is not in order; give some of"):
        fedcs(phases=phases)


def test_a_run_that_ends_too_early_is_doubted():
    (doubt,) = fedcs(rounds=5, warm_up=30).doubts()
    assert "run.rounds = 5 ends before the train, which begins after round 31" in doubt
    assert "algorithm.warm_up=30" in doubt
    (doubt,) = fedcs(rounds=3, warm_up=2).doubts()
    assert "begins after round 3" in doubt
    assert fedcs(rounds=4, warm_up=2).doubts() == ()


def test_the_schedule_begins_anew_in_each_phase():
    rule = LocalRule(lr=0.4, schedule=Schedule("cosine", rounds=27))
    made = fedcs(rounds=27, warm_up=6, rule=rule)
    warm = Schedule("cosine", rounds=6)
    train = Schedule("cosine", rounds=20)
    for round in range(1, 7):
        rate = made.phase(round).program.step.__self__.rule.lr  # type: ignore[union-attr]
        assert rate == pytest.approx(0.4 * warm.factor(round))
    for round in range(8, 28):
        rule = made.phase(round).program.rule  # type: ignore[union-attr]
        assert rule.at(round).lr == pytest.approx(0.4 * train.factor(round - 7))


def test_who_warms_up_and_who_searches(whole):
    tiers = {}
    for row in rows(whole):
        tiers.setdefault(row["round"], []).append(row["tier"])
    assert {*tiers[1], *tiers[2]} == {"w1.0"}
    assert len(tiers[3]) == len(SIZES) and set(tiers[3]) == {f"w{w}" for w in WIDTHS}
    assert [len(tiers[r]) for r in (4, 5)] == [5, 5]
    records = list(read_metrics(whole.folder.metrics))
    assert [r["phase"] for r in records] == ["warm-up"] * 2 + ["search"] + ["train"] * 2


# --- the search ------------------------------------------------------------------------------


def test_every_client_finds_a_network_within_its_budget(whole):
    made, found_by = whole.algorithm, reports(whole)
    assert sorted(found_by) == list(range(len(SIZES)))
    tier_of = whole.job.fleet.tier_of
    for client, units in found_by.items():
        tier = made.setting.tiers[tier_of[client]]
        cost = NET.cost(IndexMap.prefix(found(made, units)))
        assert tier.budget(NET).feasible(cost), client
        assert units[0] >= 3 and units[1] >= 2  # max(2, 0.2 of 12 or 8)
        assert (units == [12, 8]) == (tier.name == "w1.0")


def test_the_trace_tells_each_step(whole):
    made, told = whole.algorithm, traces(whole)
    tier_of = whole.job.fleet.tier_of
    assert sorted(told) == [c for c in range(len(SIZES)) if tier_of[c] > 0]
    for client, steps in told.items():
        units, budget = {"fc0": 12, "fc1": 8}, made.setting.tiers[tier_of[client]].budget(NET)
        assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
        for step in steps:
            assert not budget.feasible(NET.cost(IndexMap.prefix(units)))
            assert step["round"] == 3 and step["units"] < units[step["group"]]
            units[step["group"]] = step["units"]
            assert (step["params"], step["flops"]) == NET.cost(IndexMap.prefix(units))
            assert step["accuracy"] is None if SIZES[client] == 1 else 0 <= step["accuracy"] <= 1
        assert budget.feasible(NET.cost(IndexMap.prefix(units)))
        assert units == found(made, reports(whole)[client])


def test_a_search_sends_the_network_down_and_two_bytes_a_group_up(whole):
    weights = sum(int(np.prod(NET.space.shapes[name])) for name in NET.parameters)
    searched = [row for row in rows(whole) if row["round"] == 3]
    assert {row["bytes_up"] for row in searched} == {2 * 2}
    assert {row["bytes_down"] for row in searched} == {4 * weights}


def test_a_search_leaves_the_network_bit_for_bit(tmp_path):
    warm = finished(tmp_path / "warm", fedcs(rounds=2, phases=("warm-up",)))
    searched = finished(tmp_path / "searched", fedcs(rounds=3, phases=("warm-up", "search")))
    assert toys.same_bits(searched.state["params"], warm.state["params"])
    assert reports(searched) and not reports(warm)


def test_what_is_found_follows_from_the_seed(whole, tmp_path):
    three = finished(tmp_path / "three", fedcs(), workers=3, bundle_clients=1)
    assert reports(three) == reports(whole)
    assert toys.same_bits(three.state["params"], whole.state["params"])
    assert traces(three) == traces(whole)


def test_a_client_of_a_single_sample_goes_by_the_costs_alone(whole):
    """BatchNorm has no statistics of one row; without BatchNorm one row can be scored."""
    sizes = [1] * 6
    alone = fedcs(phases=("search",), rounds=1)
    plain = fedcs(toys.mlp(hidden=(12, 8)), phases=("search",), rounds=1)
    for made, blind in ((alone, True), (plain, False)):
        net, task = made.setting.net, toys.task(made.setting.net, 0, samples=1)
        algorithm = toys.OneProgram(made.setting, made.phase(1).program, "collect")
        result = toys.run_bundle(
            algorithm, [replace(task, tier=2)], data(sizes), made.init(net.init(0))["params"]
        )
        trace = result.traces[0]
        assert len(trace["step"]) > 1 and bool(np.isnan(trace["loss"]).all()) == blind
        if blind:
            expected, _ = prune(
                {"fc0": 12, "fc1": 8},
                made._search.shrinking,
                made.setting.tiers[2].budget(net),
                lambda units, net=net: net.cost(IndexMap.prefix(units)),
                lambda *_: Score(0.0, 0.0),
            )
            assert result.reports[0]["units"] == list(expected.values())


@pytest.mark.parametrize("limits", [("flops",), ("params",), ("flops", "params")])
def test_budgets_of_operations_and_of_parameters(limits):
    small = NET.cost(IndexMap.prefix({"fc0": 7, "fc1": 5}))
    given = {name: {"flops": small.macs, "params": small.params - 10}[name] for name in limits}
    made = fedcs(phases=("search",), rounds=1)
    tiers = (TierSize("low", 1.0, IndexMap.prefix({"fc0": 3, "fc1": 2}), **given),)
    made = replace(made, setting=replace(made.setting, tiers=tiers))
    algorithm = toys.OneProgram(made.setting, made.phase(1).program, "collect")
    tasks = [toys.task(NET, client, samples=9) for client in range(2)]
    params = made.init(NET.init(0))["params"]
    result = toys.run_bundle(algorithm, tasks, data([9, 9]), params)
    for client in range(2):
        cost = NET.cost(IndexMap.prefix(found(made, result.reports[client]["units"])))
        assert Budget(**given).feasible(cost)


def test_options_of_the_search_matter():
    """Fewer rows, calibrated statistics, larger steps, multiples, floors: each shows."""

    def trace(**options):
        made = fedcs(phases=("search",), rounds=1, **options)
        algorithm = toys.OneProgram(made.setting, made.phase(1).program, "collect")
        task = replace(toys.task(NET, 0, samples=40), tier=2)
        shared = made.init(NET.init(0))["params"]
        return toys.run_bundle(algorithm, [task], data([40]), shared).traces[0]

    usual = trace()
    assert trace(samples=5)["loss"].tolist() != usual["loss"].tolist()
    assert trace(search_statistics="calibrated")["loss"].tolist() != usual["loss"].tolist()
    assert len(trace(shrink=0.4)["step"]) < len(usual["step"])
    assert all(units % 2 == 0 for units in trace(multiple=2)["units"].tolist())
    assert trace(min_units=4)["units"].min() == 4 > usual["units"].min()


def test_who_does_not_search_trains_the_network_of_its_tier(tmp_path):
    run = finished(tmp_path / "run", fedcs(searchers=0.5))
    searched = reports(run)
    assert len(searched) == 5
    cohort = Roster(run.job).cohort(run.algorithm.phase(4), 4)
    cohort = cohort._replace(report=[None] * len(cohort.id))
    for task in run.algorithm.plan(run.state, cohort, 4).tasks:
        assert task.map == run.algorithm.setting.tiers[task.tier].map


# --- the training ----------------------------------------------------------------------------

BEGAN: dict[int, dict[str, torch.Tensor]] = {}


@dataclass(frozen=True)
class Watched(FedCS):
    """Keeps what each round's clients start from."""

    def plan(self, state, cohort, round):
        BEGAN[round] = {n: v.clone() for n, v in state["params"].items()}
        return super().plan(state, cohort, round)


@pytest.mark.parametrize("inherit", [False, True])
def test_training_starts_from_fresh_weights_unless_it_inherits(inherit, tmp_path):
    made = fedcs()
    BEGAN.clear()
    finished(tmp_path / "run", Watched(made.setting, **TOY, inherit=inherit))
    others = FedPA(made.setting).init(NET.init(made.setting.seed))["params"]
    assert sorted(BEGAN) == [1, 2, 3, 4, 5]
    assert toys.same_bits(BEGAN[1], others) and not toys.same_bits(BEGAN[3], others)
    assert toys.same_bits(BEGAN[4], BEGAN[3] if inherit else others)
    assert not toys.same_bits(BEGAN[5], BEGAN[4])


def test_each_client_trains_what_it_found(whole):
    made = whole.algorithm
    cohort = whole.roster.cohort(made.phase(5), 5)
    for task in made.plan(whole.state, cohort, 5).tasks:
        assert task.map == NET.space.canonical(
            IndexMap.prefix(found(made, reports(whole)[task.client]))
        )
        assert task.variant == NET.space.counts(task.map)
    shapes = {
        client: {name: leaf.shape for name, leaf in (kept or {}).items()}
        for client, kept in zip(cohort.id.tolist(), whole.kept.read(cohort.id), strict=True)
    }
    for client, kept in shapes.items():
        assert kept["norm0.running_mean"] == (reports(whole)[client][0],)
        assert kept["norm1.running_var"] == (reports(whole)[client][1],)


def test_training_without_a_search_names_the_client(tmp_path):
    with pytest.raises(InputError, match=r"client \d of tier 'w0\.[46]' has searched no network"):
        finished(tmp_path / "run", fedcs(phases=("train",), rounds=1))


# --- a phase a run ---------------------------------------------------------------------------


def experiment(**changes: Any) -> Experiment:
    tiny = Experiment(
        data={"name": "synthetic_femnist", "clients": 8, "mean_samples": 12.0},
        model={"name": "small_cnn", "channels": [4, 6], "hidden": 8, "norm": "batch"},
        fleet={
            "tiers": [
                {"name": "high", "share": 0.5, "width": 1.0},
                {"name": "low", "share": 0.5, "width": 0.5},
            ]
        },
        algorithm={"name": "fedcs", "warm_up": 1, "min_units": 1},
        run={"rounds": 3, "cohort": 3, "eval_every": 0, "engine": "loop"},
    )
    return tiny.with_values({key.replace("__", "."): value for key, value in changes.items()})


def maps_of(job, round: int) -> dict[int, IndexMap]:
    """What every client that trains would train, from what is known when the run begins."""
    made = job.work.algorithm
    everybody = replace(made.phase(round), fraction=1.0)
    cohort = Roster(job).cohort(everybody, round)
    tasks = made.plan(made.init(job.start.params), cohort, round).tasks
    return {task.client: task.map for task in tasks}


def test_a_run_takes_up_the_search_of_another(tmp_path):
    """The same maps as in one go, and the warm weights where it inherits them."""
    one = launch(experiment(), out=tmp_path / "one", local=True)
    two = launch(
        experiment(algorithm__phases=["warm-up", "search"], run__rounds=2),
        out=tmp_path / "two",
        local=True,
    )
    after = {"algorithm__phases": ["train"], "run__rounds": 2, "run__start_from": str(two.path)}
    apart = assemble(experiment(**after))
    in_one_go = assemble(experiment(**after | {"run__start_from": str(one.path)}))
    assert apart.start is not None and in_one_go.start is not None
    assert apart.start.reports == in_one_go.start.reports and len(apart.start.reports) > 2
    maps = maps_of(apart, 1)
    assert maps == maps_of(in_one_go, 1) and len(set(maps.values())) > 1
    net, made = apart.work.net, apart.work.algorithm
    fresh = made.init(net.init(apart.work.seed))
    began = made.init(apart.start.params)
    assert toys.same_bits(made.enter(made.phase(1), began)["params"], fresh["params"])
    inherits = replace(made, inherit=True)
    assert toys.same_bits(inherits.enter(made.phase(1), began)["params"], two.params())
    run = launch(experiment(**after), out=tmp_path / "apart", local=True)
    assert run.summary["finished"] and not toys.same_bits(run.params(), two.params())


# --- bad input -------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_sub_network_is_named():
    least = NET.cost(IndexMap.prefix({"fc0": 6, "fc1": 4}))
    with pytest.raises(InputError) as error:
        fedcs(min_share=0.5)
    for part in (
        "tier 'w0.4'",
        "budget flops=",
        f"flops={least.macs:,}",
        f"{least.params:,}",
        "raise the budget",
        "min_units=2",
        "min_share=0.5",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("shrink", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_share_of_a_step_is_strictly_between_0_and_1(shrink):
    with pytest.raises(InputError, match=r"algorithm.shrink=.* is outside \(0, 1\); give 0.1"):
        fedcs(shrink=shrink)


@pytest.mark.parametrize(
    "options",
    [
        {"narrowest": 1.0},
        {"min_share": 0.0},
        {"searchers": 1.1},
        {"warm_up": 0},
        {"multiple": 0},
        {"min_units": 0},
        {"samples": 1},
        {"widths": 1},
    ],
)
def test_other_options_out_of_range_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=rf"algorithm.{name}={value} is (outside|below).*; give "):
        fedcs(**options)


def test_without_a_tier_of_full_capacity_nobody_can_warm_up():
    made = fedcs()
    poor = replace(made.setting, tiers=made.setting.tiers[1:])
    with pytest.raises(InputError) as error:
        replace(made, setting=poor)
    for part in ("no tier of [fleet]", "'mlp'", f"{NET.cost().macs:,}", "run.start_from"):
        assert part in str(error.value)
    assert replace(made, setting=poor, phases=("search", "train")).phase(1).name == "search"


def test_norms_over_channels_are_refused_by_a_search_only():
    net = toys.cnn("group")
    with pytest.raises(InputError, match="GroupNorm takes its mean over several channels"):
        fedcs(net, min_share=0.1)
    assert fedcs(net, min_share=0.1, phases=("warm-up",)).phase(1).name == "warm-up"


def test_a_cosine_needs_more_rounds_in_each_phase_than_its_rate_rises_in():
    rule = LocalRule(lr=0.4, schedule=Schedule("cosine", rounds=9, warmup=2))
    fedcs(rounds=9, rule=rule, warm_up=3)
    with pytest.raises(InputError, match=r"train.warmup=2 .* the warm-up's 2 .*fewer rounds"):
        fedcs(rounds=9, rule=rule, warm_up=2)
    with pytest.raises(InputError, match=r"train.warmup=2 .* the train's 1 "):
        fedcs(rounds=5, rule=rule, warm_up=3)


def test_searching_more_than_once_is_doubted():
    (doubt,) = fedcs(rounds=3, phases=("search",)).doubts()
    assert "run.rounds = 3" in doubt and "run.rounds = 1 is enough" in doubt
    assert fedcs(rounds=1, phases=("search",)).doubts() == ()


def test_more_rounds_begin_like_fewer_where_nothing_is_trained():
    """So that a run with a search at its end may be taken up again."""
    for rounds in (2, 3, 9):
        made = fedcs(rounds=rounds, warm_up=2, phases=("warm-up", "search"))
        assert [made.phase(r).name for r in (1, 2, 3)] == ["warm-up", "warm-up", "search"]


def test_one_report_is_enough_to_train_without_a_search():
    """Where a share of the clients searched, the others train their tier's network."""
    made = fedcs(phases=("train",), rounds=2)
    clients = np.array([0, 1])
    cohort = Cohort(
        clients, np.array([4, 4]), np.array([2, 2], np.int16), None, clients - 1, [None, None]
    )
    state = made.init(NET.init(0))
    with pytest.raises(InputError, match=r"client 0 of tier 'w0.4' has searched no network"):
        made.plan(state, cohort, 1)
    told = cohort._replace(report=[None, {"units": [6, 4]}])
    maps = [task.map for task in made.plan(state, told, 1).tasks]
    assert maps == [made.setting.tiers[2].map, IndexMap.prefix({"fc0": 6, "fc1": 4})]


def test_each_phase_is_computed_by_choices_of_its_own(tmp_path):
    """A search has no way but the loop; what was chosen for it does not hold in training."""
    made = fedcs(toys.mlp(hidden=(12, 8)), rounds=6)
    folder = finished(tmp_path / "run", made, engine="vmap").folder
    choices = [(c["from_round"], c["variant"], c["way"]) for c in folder.read_engine()["choices"]]
    whole = str((12, 8))
    assert [(r, way) for r, name, way in choices if name == whole] == [
        *((1, "vmap"), (3, "loop"), (4, "vmap"))
    ]
    replayed = EngineRecord.from_json(folder.read_engine())
    again = finished(tmp_path / "again", made, engine="loop", record=replayed)
    assert toys.same_bits(again.state["params"], RunFolder(tmp_path / "run", "").read_final())
    assert again.folder.read_engine() == folder.read_engine()


def test_a_search_of_weights_that_nobody_trained_is_doubted():
    def told(**changes: Any) -> list[str]:
        made = experiment(**changes)
        return [text for text in doubts(made, assemble(made)) if "start_from" in text]

    (text,) = told(algorithm__phases=["search"], run__rounds=1)
    assert text.startswith("run.start_from is not set, and fedcs expects weights that a warm-up")
    assert told(algorithm__phases=["train"], algorithm__inherit=True)
    assert told() == told(algorithm__phases=["train"]) == []
