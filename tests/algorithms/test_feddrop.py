from __future__ import annotations

import numpy as np
import pytest
import torch
import toys

from subfleet.algorithms import FedAvg, FedDrop
from subfleet.core import aggregate
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.models import vgg
from subfleet.platform.metrics import ClientsLog, read_metrics

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


def feddrop(widths=(1.0,), **options):
    return FedDrop(toys.setting(toys.mlp(), widths), **options)


# --- the sub-network -----------------------------------------------------------------------------


def test_counts_of_the_vgg_of_adds():
    """0.75 of 64-128-256 and 1024-1024: 48-96-192 and 768-768.

    conv  9 (1 * 48 + 48 * 96 + 96 * 192) = 207,792
    FC    192 * 16 * 768 + 768 * 768 + 768 * 62 = 2,996,736
    conv  784 * 432 + 196 * 41,472 + 49 * 165,888
          = 16.60 M multiply-accumulates
    """
    net = vgg()
    map = FedDrop(toys.setting(net)).map_of(0, 1)
    counts = net.space.counts_by_group(map)
    assert counts == {"conv1": 48, "conv2": 96, "conv3": 192, "fc1": 768, "fc2": 768}
    shapes = net.space.slice_shapes(map)
    conv = sum(int(np.prod(shapes[f"conv{i}.weight"])) for i in (1, 2, 3))
    fc = sum(int(np.prod(shapes[f"fc{i}.weight"])) for i in (1, 2, 3))
    assert (conv, fc) == (207_792, 2_996_736)
    assert net.cost(map).params == 3_204_528
    assert net.cost(map).params / net.cost().params == pytest.approx(0.565, abs=0.001)
    flops = net.cost(map).macs
    assert (round((flops - fc) / 1e6, 2), round(flops / 1e6, 2)) == (16.60, 19.59)
    # Three quarters dropped would leave much less than the 19.05 M of ADDS's table.
    dropped = FedDrop(toys.setting(net), keep=0.25).map_of(0, 1)
    assert round(net.cost(dropped).macs / 1e6, 2) == 2.26


@pytest.mark.parametrize(
    ("keep", "fc0", "fc1"), [(0.75, 6, 3), (0.5, 4, 2), (0.1, 1, 1), (1.0, 8, 4), (0.9, 7, 4)]
)
def test_exactly_the_share_is_kept(keep, fc0, fc1):
    algorithm = feddrop(keep=keep)
    for round in range(1, 20):
        counts = algorithm.setting.net.space.counts_by_group(algorithm.map_of(0, round))
        assert counts == {"fc0": fc0, "fc1": fc1}


def test_rounds_have_their_own_draws_and_seeds_too():
    maps = [feddrop().map_of(0, round) for round in range(1, 30)]
    assert len(set(maps)) > 20  # of 28 * 4 possible ones
    assert maps == [feddrop().map_of(0, round) for round in range(1, 30)]
    other = FedDrop(toys.setting(toys.mlp(), seed=1))
    assert maps != [other.map_of(0, round) for round in range(1, 30)]


def test_over_rounds_units_are_kept_equally_often_and_weights_by_the_square():
    """A weight between hidden layers is trained where both its units are: 0.75^2 = 0.5625."""
    algorithm, rounds = feddrop(), 2000
    seen = {"fc0": np.zeros(8), "fc1": np.zeros(4)}
    weight = np.zeros((4, 8))
    for round in range(1, rounds + 1):
        map = algorithm.map_of(0, round)
        for group, count in seen.items():
            count[map.kept[group]] += 1 / rounds
        weight[np.ix_(map.kept["fc1"], map.kept["fc0"])] += 1 / rounds
    for count in seen.values():  # sd sqrt(0.75 * 0.25 / 2000) = 0.0097
        assert np.abs(count - 0.75).max() < 0.045
    assert np.abs(weight - 0.5625).max() < 0.05
    assert weight.mean() == pytest.approx(0.5625)


def test_poorer_tiers_take_fewer_units_of_the_same_draw():
    algorithm = feddrop((1.0, 0.5, 0.25))
    space = algorithm.setting.net.space
    for round in range(1, 10):
        rich, middle, poor = (algorithm.map_of(tier, round) for tier in range(3))
        sizes = [tuple(space.counts(map)) for map in (rich, middle, poor)]
        assert sizes == [(6, 3), (4, 2), (2, 1)]
        for group in ("fc0", "fc1"):
            assert set(poor.kept[group]) < set(middle.kept[group]) < set(rich.kept[group])
    assert algorithm.views({})["global"] == toys.FULL


# --- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_with_all_units_it_is_fedavg_bit_for_bit(norm, tmp_path):
    setting = toys.setting(toys.mlp(norm=norm), rule=LocalRule(lr=0.1, momentum=0.9))
    data = toys.federation(SIZES, (6,), 3)
    dropped = toys.run(toys.job(FedDrop(setting, keep=1.0), data), tmp_path / "feddrop")
    plain = toys.run(toys.job(FedAvg(setting), data), tmp_path / "fedavg")
    assert dropped["params_sha256"] == plain["params_sha256"]


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_coordinates_that_were_not_kept_keep_every_bit(way):
    algorithm, data = feddrop(keep=0.5), toys.all_train([9, 6], (6,), 3)
    params = algorithm.setting.net.init(0)
    state, result = toys.one_round(algorithm, data, {"params": params}, [0, 1], round=3, way=way)
    kept = algorithm.map_of(0, 3).kept
    inside = np.zeros((4, 8), bool)
    inside[np.ix_(kept["fc1"], kept["fc0"])] = True
    changed = (state["params"]["fc1.weight"] != params["fc1.weight"]).numpy()
    assert not changed[~inside].any() and changed[inside].any()
    counts = aggregate.coverage_counts(result.update, algorithm.setting.net.space)
    assert {g: np.flatnonzero(c).tolist() for g, c in counts.items()} == {
        g: units.tolist() for g, units in kept.items()
    }
    assert set(counts["fc0"].tolist()) == {0, 2}  # both clients, the same units


def test_a_client_trains_the_small_network_without_rescaling():
    """One step of one client equals the module of its map, with its slice of the weights."""
    net, data = toys.mlp(), toys.all_train([8], (6,), 3)
    algorithm = FedDrop(
        toys.setting(net, rule=LocalRule(lr=0.5), stream=Stream(batch=None)), keep=0.5
    )
    params = net.init(0)
    state, _ = toys.one_round(algorithm, data, {"params": params}, [0])
    map = algorithm.map_of(0, 1)
    module = net.module(map)
    module.load_state_dict(net.space.extract(params, map))
    x, y, _ = data.block(np.array([0]), "train")
    loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
    loss.backward()
    expected = {n: w.detach() - 0.5 * w.grad for n, w in module.named_parameters()}
    assert toys.distance(net.space.extract(state["params"], map), expected) < 1e-6


def test_each_client_may_have_a_draw_of_its_own():
    algorithm, data = feddrop(per_client=True), toys.all_train([9, 6, 7, 8], (6,), 3)
    state = {"params": algorithm.setting.net.init(0)}
    results = {
        way: toys.one_round(algorithm, data, state, [0, 1, 2, 3], way=way)
        for way in ("loop", "vmap")
    }
    assert toys.distance(*(after["params"] for after, _ in results.values())) < 1e-5
    counts = aggregate.coverage_counts(results["loop"][1].update, algorithm.setting.net.space)
    assert counts["fc0"].sum() == 4 * 6 and counts["fc1"].sum() == 4 * 3
    assert counts["fc0"].min() > 0  # 4 draws of 6 of 8; with one draw two units would go without


def test_wire_bytes_by_hand(tmp_path):
    """MLP 6-8-4-3 with 6 and 3 units: 6*6+6 + 6*3+3 + 3*3+3 = 75 numbers, and 12 bits of map."""
    data = toys.federation([9] * 10, (6,), 3)
    toys.run(toys.job(feddrop(), data, cohort=4), tmp_path / "run")
    prefixes = [feddrop().map_of(0, round).is_prefix for round in range(1, 5)]
    for record, prefix in zip(
        read_metrics(tmp_path / "run" / "metrics.jsonl"), prefixes, strict=True
    ):
        words = 4 if prefix else 2
        assert record["bytes_up"] == record["bytes_down"] == 4 * (300 + words)
        assert record["bytes_map"] == 4 * 2 * words
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    assert set(table["params"]) == {75}


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01])
def test_a_share_out_of_range_is_refused(keep):
    with pytest.raises(InputError, match=rf"algorithm\.keep={keep} is outside \(0, 1\]"):
        feddrop(keep=keep)


def test_a_model_with_nothing_to_drop_is_refused_unless_all_stays():
    setting = toys.setting(toys.linear(6, 3))
    with pytest.raises(InputError, match=r"linear has no hidden units.*keep = 1\.0"):
        FedDrop(setting)
    assert FedDrop(setting, keep=1.0).map_of(0, 1) == toys.FULL


def test_statistics_cannot_stay_on_clients_whose_units_change():
    with pytest.raises(InputError, match=r'algorithm\.statistics = "local".*indexed_mean'):
        FedDrop(toys.setting(toys.mlp(norm=True)), statistics="local")
    assert not feddrop(statistics="local").keeps  # no BatchNorm, nothing to keep
