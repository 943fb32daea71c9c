"""A candidate's score is that of the sub-network as it would be built."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import numpy as np
import plain_modules
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.core.trials import Trials
from subfleet.core.units import IndexMap
from subfleet.models import chain, mobilenet_v2, resnet18, small_cnn, supernet


def traced(name: str) -> SuperNetwork:
    make, x = plain_modules.EXAMPLES[name]
    return supernet(make(), x)


@cache
def net_of(name: str) -> SuperNetwork:
    return NETS[name]()


NETS = {
    "mobilenet": lambda: mobilenet_v2(width=0.25, divisor=2),
    "resnet": lambda: resnet18(width=0.1, input_shape=(3, 16, 16), num_classes=4),
    "mlp": lambda: toys.mlp(norm=True),
    "flatten": lambda: toys.cnn("batch"),
    "branches": lambda: traced("concats"),  # no chain: one stage, with concatenations
    "gate": lambda: traced("separable"),
    "no norm": lambda: toys.cnn(),
}

each_net = pytest.mark.parametrize("name", NETS)


def made(name: str, rows: int = 6) -> tuple[SuperNetwork, dict, torch.Tensor, torch.Tensor]:
    """A network, weights whose norms are no ones and zeros, and rows."""
    net, generator = net_of(name), torch.Generator().manual_seed(3)
    params = {
        n: v + 0.1 * torch.rand(v.shape, generator=generator)
        for n, v in net.init(1).items()
        if n not in net.statistics
    }
    x = torch.randn(rows, *net.input_shape, generator=generator)
    y = torch.randint(0, net.num_classes, (rows,), generator=generator)
    return net, params, x, y


def sliced(net: SuperNetwork, params: dict, units: dict[str, int]) -> nn.Module:
    """The sub-network of the first units, built as small as it is, with fresh statistics."""
    map = IndexMap.prefix(units)
    module = net.module(map)
    module.load_state_dict(net.space.extract(params, map) | net.fresh_statistics(map))
    return module


def built(net, params, x, y, units) -> tuple[float, float]:
    """Its score by the batch's own statistics: plain training mode, in which nothing drops."""
    with torch.no_grad():
        scores = sliced(net, params, units).train()(x)
    return float((scores.argmax(1) == y).float().mean()), float(F.cross_entropy(scores, y))


def whole(net: SuperNetwork) -> dict[str, int]:
    return {group: net.space.size(group) for group in net.elastic}


def candidates(units: dict[str, int], most: int, seed: int = 0):
    """Groups with fewer units: the first, the last, and others."""
    draw, groups = np.random.default_rng(seed), [g for g, c in units.items() if c > 1]
    others = draw.permutation(len(groups))[: most - 2]
    for i in {0, len(groups) - 1, *others.tolist()}:
        yield groups[i], int(draw.integers(1, units[groups[i]]))


# Fifty BatchNorms over six rows amplify rounding.
ROUNDING = {"mobilenet": 1e-4}


@each_net
def test_a_candidate_scores_what_its_slice_does(name):
    net, params, x, y = made(name)
    close = ROUNDING.get(name, 1e-5)
    trials, units = Trials(net, params, x, y), whole(net)
    for _ in range(2):  # of the whole network, and of a narrower one
        assert trials.score(units) == pytest.approx(built(net, params, x, y, units), abs=close)
        for group, fewer in candidates(units, 6):
            found = trials(units, group, fewer)
            expected = built(net, params, x, y, units | {group: fewer})
            assert found == pytest.approx(expected, abs=close), (group, fewer)
        units = {g: max(1, (2 * c + 2) // 3) for g, c in units.items()}


@each_net
@pytest.mark.parametrize("statistics", ["batch", "calibrated"])
def test_candidates_leave_the_known_network_as_it_is(name, statistics):
    net, params, x, y = made(name)
    before = {n: v.clone() for n, v in params.items()}
    trials, units = Trials(net, params, x, y, statistics), whole(net)
    known = trials.score(units)
    scores = {(g, c): trials(units, g, c) for g, c in candidates(units, 4)}
    assert len({s.loss for s in scores.values()}) > 1
    assert trials.score(units) == known  # bit for bit
    assert {(g, c): trials(units, g, c) for g, c in scores} == scores
    assert toys.same_bits(params, before)


def test_scores_do_not_depend_on_what_was_known_before():
    net, params, x, y = made("mlp")
    trials, narrow = Trials(net, params, x, y), {"fc0": 5, "fc1": 3}
    trials(whole(net), "fc0", 7)
    found = trials(narrow, "fc1", 2)
    assert found == Trials(net, params, x, y)(narrow, "fc1", 2)


@pytest.mark.parametrize("rows", [200, 300])
@pytest.mark.parametrize("name", ["mlp", "flatten"])
def test_calibrated_statistics_come_from_two_batches(name, rows):
    """Of 128 rows each, as many as there are; then all rows are scored in evaluation."""
    net, params, x, y = made(name, rows)
    trials, units = Trials(net, params, x, y, "calibrated"), whole(net)
    for group, fewer in candidates(units, 3):
        module = sliced(net, params, units | {group: fewer}).train()
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        with torch.no_grad():
            for norm in norms:
                norm.momentum = 1.0
            module(x[:128])
            for norm in norms:
                norm.momentum = 0.5
            module(x[128:256])
            scores = module.eval()(x)
        found = trials(units, group, fewer)
        assert found.loss == pytest.approx(float(F.cross_entropy(scores, y)), abs=1e-5)
        assert found.accuracy == pytest.approx(float((scores.argmax(1) == y).float().mean()))
        assert found != trials.score(units)


def test_calibrated_without_norms_is_a_plain_pass():
    net, params, x, y = made("no norm")
    trials, units = Trials(net, params, x, y, "calibrated"), whole(net)
    assert trials(units, "conv1", 2) == Trials(net, params, x, y)(units, "conv1", 2)


def test_dropout_rests():
    layers = OrderedDict(fc0=nn.Linear(6, 8), act=nn.ReLU(), drop=nn.Dropout(0.5))
    net = chain("mlp", nn.Sequential(layers | {"head": nn.Linear(8, 3)}), (6,))
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    params = net.init(0)
    trials = Trials(net, params, x, y)
    found = trials(whole(net), "fc0", 5)
    assert found == trials(whole(net), "fc0", 5)
    w = {n: v[:5] if n.startswith("fc0") else v for n, v in params.items()}
    hidden = F.relu(F.linear(x, w["fc0.weight"], w["fc0.bias"]))
    scores = F.linear(hidden, w["head.weight"][:, :5], w["head.bias"])
    assert found.loss == pytest.approx(float(F.cross_entropy(scores, y)), abs=1e-6)


@pytest.mark.parametrize("net", [small_cnn(norm="group"), traced("layer_norm")], ids=["gn", "ln"])
def test_norms_over_channels_are_refused(net):
    x, y = net.example(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        InputError, match=r"Norm takes its mean over several.*the search.*BatchNorm"
    ):
        Trials(net, net.init(0), x, y)
