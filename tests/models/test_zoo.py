"""The networks that come with subfleet, against the same networks in plain torch."""

import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.units import Block, Free, IndexMap, Unit
from subfleet.models import ZOO

IMAGES = [name for name in ZOO if not name.endswith("_lstm")]  # text: test_text.py
TRACED = ("mobilenet_v2", "resnet18", "resnet34", "resnet56")
PLAIN = ("small_cnn", "leaf_cnn", "cifar_cnn", "logreg", "vgg")  # the others: their own files
SMALL = {"leaf_cnn": {"width": 0.1}, "vgg": {"width": 0.1}}  # keep the tests quick


def plain(name, w, x):
    """The forward pass written out with functions."""
    if name == "logreg":
        return F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])
    if name == "vgg":
        for i in (1, 2, 3):
            x = F.conv2d(F.relu(x), w[f"conv{i}.weight"], padding=1)
            norm = [
                w[f"norm{i}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
            ]
            x = F.max_pool2d(F.batch_norm(x, *norm), 2, ceil_mode=True)
        x = x.flatten(1)
        for i in (1, 2, 3):
            x = F.linear(F.relu(x), w[f"fc{i}.weight"], w[f"fc{i}.bias"])
        return x
    padding = 0 if name == "cifar_cnn" else w["conv1.weight"].shape[2] // 2
    x = F.relu(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=padding))
    x = x if name == "cifar_cnn" else F.max_pool2d(x, 2)
    x = F.relu(F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=padding))
    x = F.max_pool2d(x, 2).flatten(1)
    x = F.relu(F.linear(x, w["fc1.weight"], w["fc1.bias"]))
    return F.linear(x, w["fc2.weight"], w["fc2.bias"])


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_modules_compute_what_plain_torch_does(name, width):
    net = ZOO[name](**SMALL.get(name, {}))
    kept = width_map(net, width)
    small = net.space.extract(net.init(0), kept)
    module = net.module(kept).eval()
    module.load_state_dict(small)
    x = torch.rand(3, *net.input_shape)
    torch.testing.assert_close(module(x), plain(name, small, x), rtol=1e-6, atol=1e-6)
    assert module(x).shape == (3, net.num_classes)


@pytest.mark.parametrize("name", IMAGES)
def test_factories_take_what_configuration_gives(name):
    options = inspect.signature(ZOO[name]).parameters
    assert {"input_shape", "num_classes"} <= set(options)
    assert all(o.kind is o.KEYWORD_ONLY and o.default is not o.empty for o in options.values())
    net = pickle.loads(pickle.dumps(ZOO[name](input_shape=(3, 20, 20), num_classes=5)))
    assert net.num_classes == 5 and net.module().eval()(torch.rand(2, 3, 20, 20)).shape == (2, 5)
    assert len(pickle.dumps(net)) < (150_000 if name in TRACED else 10_000)  # no weights


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("small_cnn", 55_518),
        ("leaf_cnn", 6_603_710),
        ("cifar_cnn", 1_626_442),
        ("logreg", 48_670),
        ("vgg", 5_679_486),
        ("adds_mobilenet", 9_895_554),
    ],
)
def test_sizes(name, stored):
    assert ZOO[name]().stored_params(IndexMap.full()) == stored


def test_groups_and_bindings_of_the_small_cnn():
    net = ZOO["small_cnn"]()
    assert net.elastic == ("conv1", "conv2", "fc1")
    assert dict(net.space.groups) == {"conv1": 8, "conv2": 16, "fc1": 64}
    assert net.space.axes["fc1.weight"] == (Unit("fc1"), Block("conv2", 49))
    assert net.space.axes["fc2.weight"] == (Free(62), Unit("fc1"))
    assert ZOO["logreg"]().elastic == ()


@pytest.mark.parametrize("name", ["small_cnn", "cifar_cnn", "vgg", "adds_mobilenet", *TRACED])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_norms(name, norm):
    net = ZOO[name](norm=norm, width=0.1, input_shape=(3, 20, 20))
    kinds = {type(m) for m in net.module().modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch") == bool(net.statistics)
    assert (nn.GroupNorm in kinds) == (norm == "group")
    kept = width_map(net, 0.5)
    module = net.module(kept)
    module.load_state_dict(net.space.extract(net.init(0), kept))
    assert module(torch.rand(2, *net.input_shape)).shape == (2, net.num_classes)


def test_bad_options():
    with pytest.raises(InputError, match=r"model\.norm is 'layer'; choose"):
        ZOO["small_cnn"](norm="layer")
    with pytest.raises(InputError, match=r"model\.width is 0"):
        ZOO["vgg"](width=0)
    for name in ("mobilenet_v2", "resnet56", "metagater_a", "adds_mobilenet"):
        with pytest.raises(InputError, match=r"model\.width is -1"):
            ZOO[name](width=-1)
    with pytest.raises(InputError, match=r"model\.norm is 'layer'; choose"):
        ZOO["resnet18"](norm="layer")
    with pytest.raises(InputError, match=r"divisor is 0 and model\.stem_stride 1; give"):
        ZOO["mobilenet_v2"](divisor=0)
    with pytest.raises(InputError, match=r"stem_stride 3; give"):
        ZOO["mobilenet_v2"](stem_stride=3)
    with pytest.raises(InputError, match=r"model\.variant is 'dwmp'; choose plain or dwnp"):
        ZOO["mobilenet_v2"](variant="dwmp")
    with pytest.raises(InputError, match="'cifar_cnn', layer 'conv2': an input of shape"):
        ZOO["cifar_cnn"](input_shape=(3, 3, 3))
