"""Costs against the numbers that papers print, and against hand counts."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from subfleet.core.cost import Cost, Layer, cost, cost_table, stored_params, wire_bytes
from subfleet.core.errors import InputError
from subfleet.core.units import Concat, Free, IndexMap, Unit, UnitSpace
from subfleet.models import chain, vgg


def only(net, kind, convention="macs"):
    """The cost of the layers of one kind."""
    rows = [
        c for layer, c in cost_table(net.layers, net.space, None, convention) if layer.kind in kind
    ]
    return Cost(sum(c.params for c in rows), sum(c.macs for c in rows))


def test_adds_table_2_vgg():
    net = vgg()
    assert only(net, ("conv",)) == (369_216, 29_352_960)
    assert only(net, ("linear",)) == (5_306_368, 5_306_368)
    assert net.cost() == (5_675_584, 34_659_328)
    # One operation for each element of the ReLU at the input of each convolution.
    assert only(net, ("conv",), "adds") == (369_216, 29_372_560)
    assert net.cost(convention="adds") == (5_675_584, 34_678_928)
    assert net.cost(count_bias=True).params == 369_216 + 5_308_478


def test_adds_table_2_mobilenet():
    layers = OrderedDict(conv1=nn.Conv2d(3, 64, 3, padding=1, bias=False))
    layers["pool1"] = nn.MaxPool2d(2, ceil_mode=True)
    sizes = [64, 128, 256, 512, 512]
    for i, (a, b) in enumerate(itertools.pairwise(sizes), start=2):
        layers[f"dw{i}"] = nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False)
        layers[f"pw{i}"] = nn.Conv2d(a, b, 1, bias=False)
        layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)
    layers |= OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(8192, 1024),
        fc2=nn.Linear(1024, 1024),
        fc3=nn.Linear(1024, 62),
    )
    with torch.device("meta"):
        net = chain("mobilenet", nn.Sequential(layers), (3, 112, 112))
    assert only(net, ("linear",)).params == 9_500_672
    assert only(net, ("conv", "depthwise")) == (444_544, 114_978_304)
    assert net.cost().params == pytest.approx(9_945_216, rel=5e-4)
    assert net.cost().macs == pytest.approx(124.46e6, rel=5e-4)
    # Depthwise filters follow their input group: seven groups, 3,520 units, 440 bytes.
    assert len(net.space.groups) == 7 and net.space.num_units == 3_520
    assert IndexMap.of({"conv1": [1]}).wire_bytes(net.space) == 440


def test_shakespeare_lstm():
    rows = []
    for layer, (inputs, h, hr) in enumerate(
        [(Free(32), "f0", "b0"), (Concat((Unit("f0"), Unit("b0"))), "f1", "b1")]
    ):
        rows += [
            Layer(name=f"{layer}{g}", kind="lstm", inputs=inputs, outputs=Unit(g)) for g in (h, hr)
        ]
    space = UnitSpace(dict.fromkeys(["f0", "b0", "f1", "b1"], 256), {}, {})
    assert cost(rows, space).params == 2_170_880
    # The second forward LSTM with 10 of 256 units of the first backward one dropped.
    small = cost_table(rows, space, IndexMap.prefix({"b0": 246}))[2][1]
    assert small == (4 * 256 * (502 + 256) + 8 * 256, 4 * 256 * (502 + 256))


def test_a_sub_network_by_hand():
    net = vgg()
    kept = IndexMap.of({"conv1": [3, 9], "conv2": [0, 1, 7], "fc1": [5]})
    params = {
        "conv1": 9 * 1 * 2,
        "conv2": 9 * 2 * 3,
        "conv3": 9 * 3 * 256,
        "fc1": 256 * 16 * 1,
        "fc2": 1024,
        "fc3": 1024 * 62,
    }
    places = {"conv1": 784, "conv2": 196, "conv3": 49}
    table = {layer.name: c for layer, c in cost_table(net.layers, net.space, kept)}
    assert {n: table[n].params for n in params} == params
    assert {n: table[n].macs for n in params} == {
        n: p * places.get(n, 1) for n, p in params.items()
    }
    assert net.cost(kept) == (
        sum(params.values()),
        sum(p * places.get(n, 1) for n, p in params.items()),
    )


def test_conventions():
    space = UnitSpace({"c": 4}, {}, {})
    conv = Layer(
        name="conv",
        kind="conv",
        inputs=Free(3),
        outputs=Unit("c"),
        kernel=9,
        positions=25,
        relu_positions=36,
        bias=True,
        gated=True,
    )
    norm = Layer(name="bn", kind="norm", inputs=Unit("c"), outputs=Unit("c"), positions=25)
    half = IndexMap.prefix({"c": 2})
    assert cost([conv, norm], space, half) == (54, 1350)
    assert cost([conv, norm], space, half, "adds") == (54, 1350 + 3 * 36)
    assert cost([conv, norm], space, half, "dwnp") == (54, 1350 + 3 * 2 * 25)
    assert cost([conv, norm], space, half, "profiler") == (54, 1350 + 2 * 2 * 25)
    assert cost([conv, norm], space, half, count_bias=True, count_norm=True).params == 54 + 2 + 4
    assert cost([conv], space, half).flops == 1350
    with pytest.raises(InputError, match="unknown cost convention 'mac'; did you mean 'macs'"):
        cost([conv], space, half, "mac")


def test_wire_bytes_by_hand():
    net = vgg()
    kept = IndexMap.of({"fc1": range(1, 1024, 2)})  # 512 of 1,024
    entries = 369_216 + 448 * 4  # convs, and four vectors of each norm
    entries += 512 * 4096 + 512 + 1024 * 512 + 1024 + 62 * 1024 + 62
    assert stored_params(net.space, kept) == entries == net.stored_params(kept)
    assert net.wire_bytes(kept) == (4 * entries, 312)
    assert net.wire_bytes(kept).total == 4 * entries + 312
    # Statistics that stay with the client do not travel: 2 x 448 entries less.
    assert net.wire_bytes(kept, policy="local") == (4 * (entries - 896), 312)
    assert wire_bytes(net.space, IndexMap.prefix({"fc1": 512})) == (4 * entries, 10)
    assert net.wire_bytes(IndexMap.full()).map == 0


def test_sliced_module_agrees_with_stored_params():
    net = vgg(width=0.1)
    kept = IndexMap.of({"conv1": [2, 4], "conv3": [0], "fc2": [1, 5, 7]})
    entries = sum(t.numel() for t in net.module(kept).state_dict().values())
    assert entries == net.stored_params(kept)
    counted = net.cost(kept, count_bias=True, count_norm=True).params
    assert sum(p.numel() for p in net.module(kept).parameters()) == counted
