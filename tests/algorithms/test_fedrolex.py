from __future__ import annotations

import numpy as np
import pytest
import toys

from subfleet.algorithms import FedPA, FedRolex
from subfleet.core import aggregate
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap
from subfleet.platform.metrics import read_metrics


def fedrolex(widths=(1.0, 0.5, 0.25), **options):
    return FedRolex(toys.setting(toys.mlp(), widths), **options)


@pytest.mark.parametrize(
    ("round", "fc0", "fc1"),
    [
        (1, [0, 1, 2, 3], [0, 1]),
        (2, [1, 2, 3, 4], [1, 2]),
        (4, [3, 4, 5, 6], [0, 3]),
        (7, [0, 1, 6, 7], [2, 3]),
        (9, [0, 1, 2, 3], [0, 1]),
        (101, [4, 5, 6, 7], [0, 1]),
    ],
)
def test_the_window_of_a_round(round, fc0, fc1):
    """Round r begins at unit r - 1 (mod C): 8 units of fc0 and 4 of fc1, half of them kept."""
    assert fedrolex().map_of(1, round) == IndexMap.of({"fc0": fc0, "fc1": fc1})


@pytest.mark.parametrize("first", [1, 6])
def test_in_as_many_rounds_as_units_every_unit_is_trained_equally_often(first):
    algorithm = fedrolex()
    space = algorithm.setting.net.space
    for tier, (wide, narrow) in enumerate([(8, 4), (4, 2), (2, 1)]):
        seen = {"fc0": np.zeros(8, int), "fc1": np.zeros(4, int)}
        for round in range(first, first + 8):
            for group, units in space.used(algorithm.map_of(tier, round)).items():
                seen[group][units] += 1
        assert seen["fc0"].tolist() == [wide] * 8  # C_g rounds of n_g units on C_g units
        assert seen["fc1"].tolist() == [2 * narrow] * 4


def test_a_full_tier_trains_everything_in_each_round():
    algorithm = fedrolex()
    space = algorithm.setting.net.space
    assert all(algorithm.map_of(0, round).is_full(space) for round in range(1, 10))
    assert len({algorithm.map_of(0, round) for round in range(1, 10)}) == 1


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_round_trains_its_window_and_nothing_else(way):
    algorithm, data = fedrolex((0.5,)), toys.all_train([9, 6], (6,), 3)
    params = algorithm.setting.net.init(0)
    state, result = toys.one_round(algorithm, data, {"params": params}, [0, 1], round=7, way=way)
    changed = (state["params"]["fc0.bias"] != params["fc0.bias"]).tolist()
    assert [i for i, moved in enumerate(changed) if moved] == [0, 1, 6, 7] or (
        # A unit that no row switches on has no gradient.
        {i for i, moved in enumerate(changed) if moved} < {0, 1, 6, 7}
    )
    counts = aggregate.coverage_counts(result.update, algorithm.setting.net.space)
    assert counts["fc0"].tolist() == [2, 2, 0, 0, 0, 0, 2, 2]
    assert counts["fc1"].tolist() == [0, 0, 2, 2]


def test_windows_reach_units_that_prefixes_never_do(tmp_path):
    data = toys.federation([9] * 10, (6,), 3)
    seen = {}
    for cls in (FedRolex, FedPA):
        coverage = Coverage()
        setting = toys.setting(toys.mlp(), (0.25,), rounds=8)
        toys.run(toys.job(cls(setting), data), tmp_path / cls.__name__, observers=(coverage,))
        seen[cls] = coverage.total
    assert seen[FedRolex]["fc0"].tolist() == [4 * 2] * 8
    assert seen[FedPA]["fc0"].tolist() == [4 * 8] * 2 + [0] * 6


class Coverage:
    """An observer that adds up how many clients trained each unit."""

    def __init__(self):
        self.total: dict[str, np.ndarray] = {}

    def on_start(self, info):
        pass

    def on_round(self, record, coverage):
        for group, counts in coverage.items():
            self.total[group] = self.total.get(group, 0) + counts

    def on_end(self, summary):
        pass


def test_wire_bytes_by_hand(tmp_path):
    """A window that is no prefix costs a bit a unit: ceil(12 / 8) = 2 bytes; 47 numbers as ever."""
    data = toys.federation([9] * 10, (6,), 3)
    toys.run(toys.job(fedrolex((0.5,)), data, cohort=4), tmp_path / "run")
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [r["bytes_map"] for r in records] == [4 * 2 * 4] + [4 * 2 * 2] * 3  # round 1: a prefix
    assert [r["bytes_up"] for r in records] == [4 * (188 + 4)] + [4 * (188 + 2)] * 3


def test_statistics_cannot_stay_on_clients_whose_window_moves():
    normed = toys.setting(toys.mlp(norm=True), (0.5,))
    with pytest.raises(InputError, match=r'algorithm\.statistics = "local".*indexed_mean'):
        FedRolex(normed, statistics="local")
    assert not FedRolex(normed).keeps
    assert not fedrolex(statistics="local").keeps  # no BatchNorm, nothing to keep
