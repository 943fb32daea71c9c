"""Budgets, widths and the dealing out of clients to tiers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.algorithm import TierSize
from subfleet.core.budget import (
    Budget,
    Tier,
    distinct_widths,
    largest_remainder,
    largest_width,
    uniform_map,
    width_counts,
    width_map,
)
from subfleet.core.cost import Cost
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap
from subfleet.models import logreg, small_cnn

NET = small_cnn()


def test_limits_are_not_strict():
    budget = Budget(flops=100, params=10)
    assert budget.feasible(Cost(10, 100))
    assert not budget.feasible(Cost(11, 100)) and not budget.feasible(Cost(10, 101))
    assert Budget().feasible(Cost(10**12, 10**12))
    assert str(Budget(flops=1234)) == "flops=1,234"


def test_width_map_rounds_up_to_whole_units():
    assert width_counts(NET, 0.25) == {"conv1": 2, "conv2": 4, "fc1": 16}
    assert width_counts(NET, 0.26) == {"conv1": 3, "conv2": 5, "fc1": 17}
    assert width_counts(NET, 0.001) == {"conv1": 1, "conv2": 1, "fc1": 1}
    # 0.07 * 100 is 7.000000000000001 in floating point, and still 7 units.
    assert width_counts(small_cnn(hidden=100), 0.07)["fc1"] == 7
    assert width_map(NET, 1.0) == IndexMap.full() == width_map(logreg(), 0.25)
    for width in (0, 1.01, float("nan")):
        with pytest.raises(InputError, match="out of range"):
            width_map(NET, width)


@given(st.floats(0.01, 1.0))
def test_a_uniform_map_is_the_width_map_where_a_model_rounds_nothing(width):
    assert NET.thinned is None
    assert uniform_map(NET, width) == width_map(NET, width)


def test_a_uniform_map_is_rounded_as_the_model_says():
    even = {"conv1": 4, "conv2": 6, "fc1": 30, "other": 1}
    net = replace(NET, thinned=lambda times: even)
    assert uniform_map(net, 0.3) == IndexMap.prefix({"conv1": 4, "conv2": 6, "fc1": 30})
    assert uniform_map(net, 1.0) == IndexMap.full()
    for width in (0, 1.01, float("nan")):
        with pytest.raises(InputError, match="out of range"):
            uniform_map(net, width)


def test_a_tier_of_a_width_affords_the_operations_of_that_model():
    """Of its own map's where those are more, which is rounded up; with limits, just these."""
    half = width_map(NET, 0.5)
    thin = replace(NET, thinned=lambda times: {"conv1": 3, "conv2": 6, "fc1": 30})
    wide = replace(NET, thinned=lambda times: {"conv1": 8, "conv2": 8, "fc1": 32})
    own, more = NET.cost(half).macs, NET.cost(uniform_map(wide, 0.5)).macs
    tier = TierSize("low", 1.0, half, width=0.5)
    assert tier.budget(NET) == tier.budget(thin) == Budget(flops=own)
    assert tier.budget(wide) == Budget(flops=more) and more > own
    assert TierSize("low", 1.0, half).budget(wide) == Budget(flops=own)
    assert TierSize("low", 1.0, half, params=900).budget(NET) == Budget(params=900)
    assert TierSize("low", 1.0, half, 7, 900).budget(NET) == Budget(flops=7, params=900)


def test_distinct_widths_are_all_the_maps_there_are():
    widths = distinct_widths(NET)
    maps = [width_map(NET, w) for w in widths]
    assert len(set(maps)) == len(widths) and widths[-1] == 1.0
    fine = {width_map(NET, i / 10_000) for i in range(1, 10_001)}
    assert fine == set(maps)


@given(st.integers(8_931, 400_000), st.none() | st.integers(129, 60_000))
def test_largest_width_is_the_largest(flops, params):
    budget = Budget(flops=flops, params=params)
    feasible = [w for w in distinct_widths(NET) if budget.feasible(NET.cost(width_map(NET, w)))]
    assert largest_width(NET, budget) == max(feasible)


@pytest.mark.parametrize("width", distinct_widths(NET))
def test_the_cost_of_a_width_buys_that_width(width):
    cost = NET.cost(width_map(NET, width))
    assert largest_width(NET, Budget(flops=cost.flops)) == width
    assert largest_width(NET, Budget(params=cost.params)) == width


def test_a_budget_that_no_width_meets():
    with pytest.raises(InputError) as error:
        largest_width(NET, Budget(flops=8_930))
    for part in ("flops=8,930", "'small_cnn'", "flops=8,931", "params=129", "raise the budget"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="tier 'low': budget params=5"):
        Tier(name="low", share=1, params=5).largest_map(NET)
    with pytest.raises(InputError, match="budget flops is 0"):
        Budget(flops=0)


def test_tiers():
    half = width_map(NET, 0.5)
    assert Tier(name="mid", share=1, width=0.5).largest_map(NET) == half
    assert Tier(name="mid", share=1, flops=NET.cost(half).flops).largest_map(NET) == half
    with pytest.raises(InputError, match="give a width, or else"):
        Tier(name="x", share=1)
    with pytest.raises(InputError, match="give a width, or else"):
        Tier(name="x", share=1, width=0.5, flops=10)
    with pytest.raises(InputError, match="tier 'x' has width 2"):
        Tier(name="x", share=1, width=2)
    with pytest.raises(InputError, match="tier 'x' has share -1"):
        Tier(name="x", share=-1, width=1)
    with pytest.raises(InputError, match="tier 'x': budget params is -3"):
        Tier(name="x", share=1, params=-3)


def test_largest_remainder_of_the_papers():
    assert largest_remainder([50, 30, 20], 10) == [5, 3, 2]
    assert largest_remainder([20, 30, 50], 10) == [2, 3, 5]
    assert largest_remainder([0.5, 0.3, 0.2], 7) == [4, 2, 1]
    assert largest_remainder([1, 1, 1], 2) == [1, 1, 0]  # ties go to the earlier
    assert largest_remainder([0, 1], 3) == [0, 3]
    assert largest_remainder([1 / 3] * 3, 10) == [4, 3, 3]
    for shares in ([], [0, 0], [-1, 2], [float("nan")]):
        with pytest.raises(InputError, match="cannot be dealt out"):
            largest_remainder(shares, 3)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda s: sum(s) > 1e-3),
    st.integers(0, 10_000),
)
def test_largest_remainder_sums_and_is_within_one(shares, n):
    counts = largest_remainder(shares, n)
    assert sum(counts) == n
    assert all(
        abs(c - s * n / sum(shares)) <= 1 + 1e-6 for c, s in zip(counts, shares, strict=True)
    )
