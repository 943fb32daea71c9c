"""Deriving a super-network from a sequence of layers."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.units import Block, Free, IndexMap, Unit
from subfleet.models import chain


def seq(**layers):
    return nn.Sequential(OrderedDict(layers))


def test_bindings_of_every_layer_type():
    net = chain(
        "all",
        seq(
            conv=nn.Conv2d(3, 4, 3, stride=2, padding=1),
            bn=nn.BatchNorm2d(4, momentum=0.2),
            relu=nn.ReLU6(),
            dw=nn.Conv2d(4, 4, 3, padding=1, groups=4),
            gn=nn.GroupNorm(1, 4),
            act=nn.SiLU(),
            drop=nn.Dropout2d(0.1),
            pw=nn.Conv2d(4, 6, 1),
            avg=nn.AvgPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(6 * 4, 5),
            bn1=nn.BatchNorm1d(5),
            same=nn.Identity(),
            fc2=nn.Linear(5, 2, bias=False),
        ),
        (3, 8, 8),
    )
    axes = net.space.axes
    assert axes["conv.weight"] == (Unit("conv"), Free(3), Free(), Free())
    assert axes["bn.running_var"] == axes["dw.bias"] == axes["gn.weight"] == (Unit("conv"),)
    assert axes["dw.weight"] == (Unit("conv"), Free(), Free(), Free())
    assert axes["fc1.weight"] == (Unit("fc1"), Block("pw", 4))
    assert axes["fc2.weight"] == (Free(2), Unit("fc1"))
    assert "fc2.bias" not in axes and "bn.num_batches_tracked" not in axes
    small = net.module(IndexMap.of({"conv": [1, 3], "pw": [0], "fc1": [2, 4]}))
    assert small(torch.rand(2, 3, 8, 8)).shape == (2, 2)
    assert small.bn.momentum == 0.2 and small.drop.p == 0.1 and small.conv.stride == (2, 2)


def test_pooling_to_one_position_binds_units_not_blocks():
    net = chain(
        "gap",
        seq(
            conv=nn.Conv2d(1, 4, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 2),
        ),
        (1, 6, 6),
    )
    assert net.space.axes["fc.weight"] == (Free(2), Unit("conv"))


def test_batch_norm_after_flatten_keeps_blocks():
    net = chain(
        "flatbn",
        seq(conv=nn.Conv2d(1, 4, 3), flat=nn.Flatten(), bn=nn.BatchNorm1d(64), fc=nn.Linear(64, 2)),
        (1, 6, 6),
    )
    assert net.space.axes["bn.weight"] == (Block("conv", 16),)
    assert net.module(IndexMap.of({"conv": [2]})).bn.num_features == 16


def test_fixed_layers_keep_all_outputs():
    layers = seq(fc1=nn.Linear(4, 8), act=nn.ReLU(), fc2=nn.Linear(8, 6), fc3=nn.Linear(6, 3))
    net = chain("mlp", layers, (4,), fixed=["fc1"])
    assert net.elastic == ("fc2",) and net.space.axes["fc2.weight"] == (Unit("fc2"), Free(8))
    assert net.cost(IndexMap.prefix({"fc2": 2})).params == 32 + 16 + 6
    with pytest.raises(InputError, match=r"fixed layers \['fc9'\] do not exist"):
        chain("mlp", layers, (4,), fixed=["fc9"])


def test_the_callers_layers_are_left_alone():
    layers = seq(bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 2))
    chain("mlp", layers, (4,))
    assert layers.training and layers.fc.weight.device.type == "cpu"
    assert "bn.num_batches_tracked" in layers.state_dict()


def test_lists_of_layers_and_layers_used_twice():
    relu = nn.ReLU()
    net = chain("mlp", [nn.Linear(4, 8), relu, nn.Linear(8, 6), relu, nn.Linear(6, 3)], (4,))
    assert dict(net.space.groups) == {"0": 8, "2": 6} and len(net.module()) == 5
    again = nn.Linear(4, 4)
    with pytest.raises(InputError, match="layer '1': it shares its weights"):
        chain("tied", [again, again, nn.Linear(4, 2)], (4,))
    with pytest.raises(InputError, match=r"give samples of shape \(channels, height, width\)"):
        chain("flat", [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)], (28, 28))


HEAD = {"flat": nn.Flatten(), "fc": nn.Linear(4 * 36, 2)}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"odd": nn.Conv2d(2, 4, 1, groups=2), **HEAD}, "'odd': a grouped convolution with 2"),
        ({"odd": nn.Conv2d(2, 4, 1), "gn": nn.GroupNorm(2, 4), **HEAD}, "'gn': GroupNorm with 2"),
        ({"odd": nn.Conv2d(3, 4, 1), **HEAD}, r"'odd': an input of shape \(2, 6, 6\) does not fit"),
        ({"odd": nn.Softmax(1), **HEAD}, "'odd'|'fc'"),
        ({"odd": nn.Conv2d(2, 4, 1), "up": nn.Upsample(scale_factor=1), **HEAD}, "Upsample is not"),
        ({"odd": nn.Conv2d(2, 4, 1), "fc": nn.Linear(6, 2)}, "'fc': a Linear layer on inputs"),
        ({"odd": nn.Conv2d(2, 4, 1), "flat": nn.Flatten(2)}, "only a whole sample"),
        ({"odd": nn.Conv2d(2, 4, 1)}, "end it with class scores"),
        ({"pool": nn.MaxPool2d(2, return_indices=True), **HEAD}, "'pool': it returns more than"),
        ({"relu": nn.ReLU()}, "no Conv2d and no Linear"),
    ],
)
def test_what_a_chain_refuses(layers, says):
    with pytest.raises(InputError, match=says):
        chain("bad", seq(**layers), (2, 6, 6))
