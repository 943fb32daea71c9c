from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys

from subfleet.algorithms import FedAvg
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.units import IndexMap
from subfleet.datasets.memory import InMemory

WHOLE = Stream(batch=None, epochs=1)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_the_weighted_mean_by_hand(way):
    # One input, two classes, w = 0, so that both have probability 1/2.
    # A: one row x = 2 of class 0: gradient (1/2 - 1, 1/2) * 2 = (-1, 1), so w_A = (1, -1).
    # B: three rows x = 1 of class 1: gradient (1/2, -1/2), so w_B = (-1/2, 1/2).
    # w = (1 * w_A + 3 * w_B) / 4 = (-1/8, 1/8)
    x = np.array([[2], [1], [1], [1]], np.float32)
    data = InMemory(x, np.array([0, 1, 1, 1]), np.array([0, 1, 4]), train=np.ones(4, bool))
    net = toys.linear(1, 2, bias=False)
    algorithm = FedAvg(toys.setting(net, rule=LocalRule(lr=1.0), stream=WHOLE))
    state, result = toys.one_round(
        algorithm, data, {"params": {"fc.weight": torch.zeros(2, 1)}}, [0, 1], way=way
    )
    assert state["params"]["fc.weight"].flatten().tolist() == [-0.125, 0.125]
    assert result.table["loss"].tolist() == pytest.approx([np.log(2)] * 2)


def test_one_whole_batch_is_a_gradient_step_on_everybodys_data():
    """FedAvg with E = 1 and full batches is FedSGD."""
    net, data = toys.mlp(), toys.all_train([5, 12, 3, 8], (6,), 3)
    algorithm = FedAvg(toys.setting(net, rule=LocalRule(lr=0.3), stream=WHOLE), width=1.0)
    params = net.init(0)
    state, _ = toys.one_round(algorithm, data, {"params": params}, [0, 1, 2, 3])
    module = net.module()
    module.load_state_dict(params)
    x, y, _ = data.block(np.arange(4), "train")
    F.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    expected = {n: w.detach() - 0.3 * w.grad for n, w in module.named_parameters()}
    assert toys.distance(state["params"], expected) < 1e-6


def test_one_client_is_its_own_mean_and_equal_clients_are_one():
    net, alone = toys.mlp(), toys.all_train([8], (6,), 3, seed=4)
    block = alone.block(np.array([0]), "train")
    x, y = np.concatenate([block.x] * 3), np.concatenate([block.y] * 3)
    thrice = InMemory(x, y, np.array([0, 8, 16, 24]), num_classes=3, train=np.ones(24, bool))
    algorithm = FedAvg(toys.setting(net, rule=LocalRule(lr=0.3), stream=WHOLE), width=1.0)
    params = net.init(0)
    one, result = toys.one_round(algorithm, alone, {"params": params}, [0])
    (plain,) = toys.each(
        net, algorithm.phase(1).program, [toys.task(net, 0, samples=8)], alone, params
    )
    assert toys.distance(one["params"], plain[0]) < 1e-7
    three, _ = toys.one_round(algorithm, thrice, {"params": params}, [0, 1, 2])
    assert toys.distance(three["params"], one["params"]) < 1e-6
    assert result.table["num_samples"].tolist() == [8]


def test_the_order_of_clients_does_not_matter():
    net, data = toys.mlp(), toys.all_train([5, 12, 3], (6,), 3)
    algorithm = FedAvg(toys.setting(net), width=1.0)
    state = {"params": net.init(0)}
    there, _ = toys.one_round(algorithm, data, state, [0, 1, 2])
    back, _ = toys.one_round(algorithm, data, state, [2, 1, 0])
    assert toys.distance(there["params"], back["params"]) < 1e-7


def test_clients_that_return_what_they_got_change_nothing():
    net, data = toys.mlp(norm=True), toys.all_train([5, 12, 3], (6,), 3)
    rule = LocalRule(lr=0.0)
    algorithm = FedAvg(toys.setting(net, rule=rule), width=1.0, statistics="local")
    state = algorithm.init(net.init(0))
    after, _ = toys.one_round(algorithm, data, state, [0, 1, 2])
    assert toys.distance(after["params"], state["params"]) < 1e-7


def test_without_a_width_everybody_trains_what_the_poorest_can():
    net = toys.mlp()
    algorithm = FedAvg(toys.setting(net, (1.0, 0.25, 0.5)))
    poorest = IndexMap.prefix({"fc0": 2, "fc1": 1})
    assert {algorithm.map_of(tier, 5) for tier in range(3)} == {poorest}
    assert set(algorithm.views({}).values()) == {poorest}
    half = FedAvg(toys.setting(net, (1.0, 0.25)), width=0.5)
    assert half.map_of(1, 1) == IndexMap.prefix({"fc0": 4, "fc1": 2})


def test_units_beyond_the_width_are_never_touched():
    net, data = toys.mlp(), toys.all_train([9, 6], (6,), 3)
    algorithm = FedAvg(toys.setting(net, (1.0, 0.5)))
    params = net.init(0)
    state, _ = toys.one_round(algorithm, data, {"params": params}, [0, 1], [0, 1])
    assert torch.equal(state["params"]["fc0.weight"][4:], params["fc0.weight"][4:])
    assert not torch.equal(state["params"]["fc0.weight"][:4], params["fc0.weight"][:4])


@pytest.mark.parametrize("width", [0.0, -1.0, 1.1])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(InputError, match=rf"algorithm\.width={width}"):
        FedAvg(toys.setting(toys.mlp()), width=width)
