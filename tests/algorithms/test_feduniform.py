"""FedUniform: the largest of a few widths that the budget allows, the same in every layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import toys

from subfleet.algorithms import FedAvg, FedPA, FedUniform
from subfleet.core.algorithm import Setting, TierSize
from subfleet.core.budget import Tier, uniform_map
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.units import IndexMap
from subfleet.models import mobilenet_v2
from subfleet.platform.metrics import ClientsLog

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]
COSTS = {1.0: 87_976_448, 0.75: 59_310_080, 0.5: 27_969_024}  # MobileNetV2, 32 pixels, 10 classes
MOBILE = mobilenet_v2()
MAPS = {width: uniform_map(MOBILE, width) for width in COSTS}


def tiers(**flops: int) -> tuple[TierSize, ...]:
    return tuple(TierSize(name, 1.0, toys.FULL, flops=limit) for name, limit in flops.items())


def setting(net, sizes, **options) -> Setting:
    return Setting(
        net, sizes, **{"rule": LocalRule(), "stream": Stream(), "seed": 0, "rounds": 1} | options
    )


def test_the_budgets_of_the_paper_buy_its_widths():
    given = tiers(high=COSTS[1.0], medium=COSTS[0.75], low=COSTS[0.5])
    made = FedUniform(setting(MOBILE, given))
    assert [made.map_of(tier, 1) for tier in range(3)] == [MAPS[1.0], MAPS[0.75], MAPS[0.5]]
    assert [MOBILE.cost(made.map_of(tier, 1)).macs for tier in range(3)] == list(COSTS.values())
    views = made.views({})
    assert list(views) == ["global", "high", "medium", "low"]
    assert views["global"] == toys.FULL == views["high"] and views["low"] == MAPS[0.5]


def test_one_operation_less_buys_the_next_width():
    given = tiers(high=COSTS[1.0] - 1, medium=COSTS[0.75] - 1, rich=10**12)
    made = FedUniform(setting(MOBILE, given))
    assert [made.map_of(tier, 1) for tier in range(3)] == [MAPS[0.75], MAPS[0.5], MAPS[1.0]]


def test_tiers_that_say_a_width_have_that_width():
    """Although MobileNetV2 at x 0.75 has layers that are wider than 0.75 of the whole's."""
    sizes = tuple(
        TierSize(f"w{w}", 1.0, Tier(name="t", share=1, width=w).largest_map(MOBILE), width=w)
        for w in COSTS
    )
    made = FedUniform(setting(MOBILE, sizes))
    assert [made.map_of(tier, 1) for tier in range(3)] == [MAPS[w] for w in COSTS]


def test_parameters_may_be_the_limit():
    params = MOBILE.cost(MAPS[0.5]).params
    made = FedUniform(setting(MOBILE, (TierSize("low", 1.0, toys.FULL, params=params),)))
    assert made.map_of(0, 1) == MAPS[0.5]
    both = TierSize("low", 1.0, toys.FULL, COSTS[1.0], MOBILE.cost(MAPS[0.75]).params)
    assert FedUniform(setting(MOBILE, (both,))).map_of(0, 1) == MAPS[0.75]


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(InputError) as error:
        FedUniform(setting(MOBILE, tiers(low=COSTS[0.5] - 1)))
    for part in (
        "tier 'low'",
        "flops=27,969,023",
        "width 0.5",
        "flops=27,969,024",
        "raise the",
        "algorithm.widths",
    ):
        assert part in str(error.value)
    made = FedUniform(setting(MOBILE, tiers(low=COSTS[0.5] - 1)), widths=(0.25, 1.0))
    assert made.map_of(0, 1) == uniform_map(MOBILE, 0.25)


@pytest.mark.parametrize("widths", [(), (0.0, 1.0), (1.5,)])
def test_widths_are_shares(widths):
    with pytest.raises(InputError, match=r"algorithm.widths=\[.*\] is not a list of shares"):
        FedUniform(toys.setting(toys.mlp()), widths=widths)


def test_rich_clients_alone_are_fedavg_with_statistics_of_their_own(tmp_path):
    given = toys.setting(
        toys.mlp(norm=True), (1.0, 1.0), LocalRule(lr=0.1, momentum=0.9), Stream(batch=4), rounds=3
    )
    data = toys.federation(SIZES, (6,), 3)
    uniform = toys.run(toys.job(FedUniform(given), data), tmp_path / "uniform")
    average = toys.run(
        toys.job(FedAvg(given, width=1.0, statistics="local"), data), tmp_path / "average"
    )
    assert uniform["params_sha256"] == average["params_sha256"]
    tables = [
        ClientsLog(tmp_path / name / "clients").read().drop_columns(["seconds"]).to_pydict()
        for name in ("uniform", "average")
    ]
    assert str(tables[0]) == str(tables[1])  # NaN is NaN


def test_merging_is_fedpas(tmp_path):
    """Where `widths` are the tiers' own, and a model rounds nothing, nothing is left to differ."""
    given = toys.setting(toys.mlp(norm=True), (1.0, 0.5), LocalRule(lr=0.1), Stream(batch=4))
    data = toys.federation(SIZES, (6,), 3)
    digests = {
        toys.run(toys.job(made, data), tmp_path / str(i))["params_sha256"]
        for i, made in enumerate((FedUniform(given), FedPA(given)))
    }
    assert len(digests) == 1
    votes = replace(FedUniform(given), normaliser="all")
    assert toys.run(toys.job(votes, data), tmp_path / "all")["params_sha256"] not in digests
    assert votes.map_of(1, 1) == IndexMap.prefix({"fc0": 4, "fc1": 2})
