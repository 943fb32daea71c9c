"""Greedy pruning, with costs and scores that anybody can redo by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.budget import Budget
from subfleet.core.cost import Cost
from subfleet.core.errors import InputError
from subfleet.core.pruning import Score, Shrinking, prune

TEN = {"a": 10, "b": 10, "c": 10}


def linear(units):
    """Each unit costs one operation and one parameter."""
    return Cost(params=sum(units.values()), macs=sum(units.values()))


def shrinking(ratio=0.2, floor=1, multiple=1, groups="abc"):
    return Shrinking(ratio, dict.fromkeys(groups, floor), multiple)


class Drops:
    """Shrinking a group costs so much accuracy, whatever else has shrunk; counts its trials."""

    def __init__(self, drops, losses=None):
        self.drops, self.losses, self.calls = drops, losses or {}, []

    def __call__(self, units, group, fewer):
        self.calls.append((dict(units), group, fewer))
        return Score(1 - self.drops[group], self.losses.get(group, 0.0))


# --- one step ------------------------------------------------------------------------------


def test_a_step_takes_the_share_and_at_least_one():
    rule = shrinking(0.1)
    assert rule.shrunk("a", 7) == 6  # 6.3
    assert rule.shrunk("a", 6) == 5  # 5.4
    assert rule.shrunk("a", 2) == 1  # 1.8 is 2: one less all the same
    assert rule.shrunk("a", 1) is None
    assert shrinking(0.9).shrunk("a", 3) == 1  # 0.3 is 0: the floor


@pytest.mark.parametrize(
    ("units", "fewer"),
    [(32, 24), (24, 16), (20, 16), (16, 8), (9, 8), (8, 4), (5, 4), (4, None), (3, None)],
)
def test_multiples_and_floors(units, fewer):
    """32 * 0.7 = 22.4 is 24, 16 * 0.7 = 11.2 is 8; 8 * 0.7 = 5.6 would be 8 again."""
    assert shrinking(0.3, floor=4, multiple=8).shrunk("a", units) == fewer


@given(st.floats(0.01, 0.99), st.integers(1, 40), st.integers(1, 9), st.integers(1, 400), st.data())
def test_steps_go_down_to_the_floor_and_end(ratio, floor, multiple, units, data):
    rule, steps = shrinking(ratio, floor, multiple), 0
    start = units
    while (fewer := rule.shrunk("a", units)) is not None:
        assert floor <= fewer < units
        units, steps = fewer, steps + 1
        assert units == floor or units % multiple == 0
    assert units == min(start, floor)
    assert steps <= max(0, start - floor)


# --- which group -----------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_three_groups_by_hand(lazy):
    """b costs least: 10 -> 8 (cost 28) -> 6, the nearest to 6.4 (cost 26), and that is the budget.

    The paper's example counts groups from 0, so that its group 1 is b.
    """
    trial = Drops({"a": 0.3, "b": 0.1, "c": 0.2})
    left, steps = prune(TEN, shrinking(), Budget(flops=26), linear, trial, lazy=lazy)
    assert left == {"a": 10, "b": 6, "c": 10}
    assert [(s.group, s.units, s.cost.macs) for s in steps] == [("b", 8, 28), ("b", 6, 26)]
    assert [s.score.accuracy for s in steps] == [0.9, 0.9]
    assert len(trial.calls) == (4 if lazy else 6)


def test_a_budget_that_holds_tries_nothing_and_keeps_all():
    trial = Drops({})  # any call is a KeyError
    assert prune(TEN, shrinking(), Budget(flops=30), linear, trial) == (TEN, [])
    assert prune(TEN, shrinking(), Budget(), linear, trial) == (TEN, [])


def test_a_group_whose_units_matter_is_the_last_to_shrink():
    """acc = -|theta_c - 10|, whatever the others have: c is whole while a and b can shrink."""

    def trial(units, group, fewer):
        kept = units | {group: fewer}
        return Score(-abs(kept["c"] - 10), 0.0)

    floors = Shrinking(0.2, {"a": 3, "b": 3, "c": 3})
    left, steps = prune(TEN, floors, Budget(flops=16), linear, trial)
    assert left == {"a": 3, "b": 3, "c": 10} and {s.group for s in steps} == {"a", "b"}
    left, steps = prune(TEN, floors, Budget(flops=15), linear, trial)
    assert left == {"a": 3, "b": 3, "c": 8} and steps[-1].group == "c"


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1),
    st.floats(0.05, 0.95),
    st.floats(0.01, 1.2),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_budget_is_met_by_shrinking_one_group_at_a_time(units, ratio, share, lazy, salt):
    def trial(left, group, fewer):
        return Score(hash((salt, tuple(left.values()), ord(group), fewer)) % 7 / 7, 0.0)

    budget = Budget(flops=max(share * linear(units).macs, len(units)))
    rule = Shrinking(ratio, dict.fromkeys(units, 1))
    left, steps = prune(units, rule, budget, linear, trial, lazy=lazy)
    assert budget.feasible(linear(left)) and list(left) == list(units)
    now = dict(units)
    for step in steps:
        assert not budget.feasible(linear(now))  # nobody shrinks further than needed
        assert step.units == rule.shrunk(step.group, now[step.group])
        now[step.group] = step.units
        assert step.cost == linear(now)
    assert now == left


# --- ties ------------------------------------------------------------------------------------


def weighed(units):
    """A unit of b saves two operations, one of c two operations and two parameters."""
    return Cost(
        params=units["a"] + units["b"] + 2 * units["c"],
        macs=units["a"] + 2 * units["b"] + 2 * units["c"],
    )


def first_of(cost, losses=None, criterion="accuracy_then_loss", **drops):
    trial = Drops({"a": 0.0, "b": 0.0, "c": 0.0} | drops, losses)
    budget = Budget(flops=cost(TEN).macs - 1)
    _, steps = prune(TEN, shrinking(), budget, cost, trial, criterion)
    assert len(steps) == 1
    return steps[0].group


def test_ties_are_broken_by_loss_then_operations_then_parameters_then_order():
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert first_of(weighed, losses, a=0.1, b=0.1) == "c"  # accuracy before all else
    assert first_of(weighed, losses) == "a"  # the lowest loss
    assert first_of(weighed, losses | {"b": 1.0}) == "b"  # which saves more operations
    assert first_of(weighed) == "c"  # as many as b, but more parameters
    assert first_of(linear) == "a"  # all alike: the first
    assert first_of(linear, a=0.1) == "b"


def test_accuracy_alone_looks_at_no_loss():
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert first_of(weighed, losses, "accuracy") == "c"
    assert first_of(linear, {"a": 3.0, "b": 2.0, "c": 1.0}, "accuracy") == "a"
    assert first_of(linear, {"a": 3.0, "b": 2.0, "c": 1.0}, "accuracy_then_loss") == "c"


# --- budgets ---------------------------------------------------------------------------------


def test_every_limit_of_the_budget_counts():
    """a has the parameters, b the operations."""

    def cost(units):
        return Cost(params=10 * units["a"] + units["b"], macs=units["a"] + 10 * units["b"])

    units, rule = {"a": 10, "b": 10}, shrinking(0.2, groups="ab")
    spares_b, spares_a = Drops({"a": 0.0, "b": 0.5}), Drops({"a": 0.5, "b": 0.0})
    left, _ = prune(units, rule, Budget(params=70), cost, spares_b)
    assert left == {"a": 6, "b": 10} and cost(left).params == 70  # exactly the limit is enough
    # b has few parameters: it shrinks until it is gone, and then a must.
    left, _ = prune(units, rule, Budget(params=100), cost, spares_a)
    assert left == {"a": 8, "b": 1}
    left, _ = prune(units, rule, Budget(flops=70), cost, spares_a)
    assert left == {"a": 10, "b": 6}
    left, _ = prune(units, rule, Budget(flops=100, params=90), cost, spares_b)
    assert left["a"] == 1 and cost(left).macs <= 100
    left, _ = prune(units, rule, Budget(flops=110, params=90), cost, spares_b)
    assert left == {"a": 8, "b": 10} and cost(left) == Cost(params=90, macs=108)


def test_when_nothing_can_shrink_the_smallest_cost_is_named():
    floors = Shrinking(0.5, {"a": 4, "b": 4, "c": 12})
    with pytest.raises(InputError) as error:
        prune(TEN, floors, Budget(flops=17), linear, Drops({"a": 0.1, "b": 0.2, "c": 0.3}))
    for part in ("budget flops=17", "flops=18", "params=18", "raise the budget", "min_units"):
        assert part in str(error.value)
    left, _ = prune(TEN, floors, Budget(flops=18), linear, Drops({"a": 0.1, "b": 0.2, "c": 0.3}))
    assert left == {"a": 4, "b": 4, "c": 10}


# --- lazy ------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(2, 30), min_size=2),
    st.floats(0.05, 0.9),
    st.floats(0.1, 1.0),
    st.integers(0, 1000),
)
def test_lazy_takes_the_same_steps_where_drops_add_up(units, ratio, share, seed):
    """Every unit that goes costs something, however much the others have lost."""
    draw = np.random.default_rng(seed)
    kept_is_worth = {g: np.cumsum(draw.uniform(0.1, 1.0, c + 1)) for g, c in units.items()}

    def counted():
        calls = []

        def trial(left, group, fewer):
            calls.append(group)
            kept = left | {group: fewer}
            return Score(sum(float(kept_is_worth[g][c]) for g, c in kept.items()), 0.0)

        return trial, calls

    budget = Budget(flops=max(share * linear(units).macs, len(units)))
    rule = Shrinking(ratio, dict.fromkeys(units, 1))
    (eager, every), (lazily, few) = counted(), counted()
    wanted = prune(units, rule, budget, linear, eager)
    assert prune(units, rule, budget, linear, lazily, lazy=True) == wanted
    assert len(few) <= len(every)


def test_lazy_takes_several_times_fewer_trials():
    groups = {f"g{i:02}": 20 for i in range(24)}

    def run(lazy):
        trial = Drops({g: i / 100 for i, g in enumerate(groups)})
        rule = Shrinking(0.1, dict.fromkeys(groups, 5))
        found = prune(groups, rule, Budget(flops=240), linear, trial, lazy=lazy)
        return found, len(trial.calls)

    (wanted, eager), (found, lazy) = run(False), run(True)
    assert found == wanted and len(wanted[1]) > 100
    assert lazy * 5 < eager
