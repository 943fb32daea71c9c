"""A mask where units are read is the slice, for every kind of network."""

import pytest
import torch
from torch.func import functional_call

from subfleet.core import masks
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap
from subfleet.models import adds_mobilenet, mobilenet_v2, resnet56, sent_lstm, small_cnn, vgg

SMALL = {
    "vgg": lambda: vgg(width=0.125),
    "cnn": lambda: small_cnn(input_shape=(1, 8, 8), num_classes=3, norm="batch"),
    "depthwise": lambda: adds_mobilenet(input_shape=(3, 32, 32), width=0.125),
    "inverted residuals": lambda: mobilenet_v2(width=0.25),
    "residuals": lambda: resnet56(),
    "text": lambda: sent_lstm(vocabulary=20, input_shape=(5,), hidden=8, dense=6),
}


def scores(net, map, params, x):
    module = net.module(map).double().eval()
    return functional_call(module, params, (x,))


def drawn(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in net.init(seed).items():
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        found[name] = noise + 0.5 if name in net.statistics else value.double() + 0.1 * noise
    return found


def random_masks(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in net.space.widths:
        mask = torch.rand(net.space.size(group), generator=generator) < 0.6
        mask[0] = True
        found[group] = mask
    return found


def inputs(net):
    x = net.example(4)
    return torch.randint(0, 20, x.shape) if x.dtype == torch.int64 else torch.randn_like(x).double()


@pytest.mark.parametrize("name", SMALL)
def test_the_masked_network_is_the_sliced_one(name):
    net = SMALL[name]()
    params, kept, x = drawn(net), random_masks(net), inputs(net)
    map = IndexMap.from_masks({group: mask.numpy() for group, mask in kept.items()})
    weights = {group: mask.double() for group, mask in kept.items()}
    thin = masks.masked(params, weights, masks.readers(net), net.space)
    sliced = scores(net, map, net.space.extract(params, map), x)
    assert torch.allclose(scores(net, IndexMap.full(), thin, x), sliced, atol=1e-9)
    left = masks.coverage(params, weights, net.space)
    zeros = {n: v * left[n] if n in left else v for n, v in params.items()}
    assert torch.allclose(scores(net, IndexMap.full(), zeros, x), sliced, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_coverage_is_that_of_the_map(name):
    net = SMALL[name]()
    kept = random_masks(net)
    map = IndexMap.from_masks({group: mask.numpy() for group, mask in kept.items()})
    params = net.init(0)
    left = masks.coverage(params, {g: m.float() for g, m in kept.items()}, net.space)
    for leaf, expected in net.space.coverage(map).items():
        found = left.get(leaf, torch.ones(())).expand(params[leaf].shape)
        assert torch.equal(found, expected), leaf


def test_a_dropped_unit_has_the_slope_of_its_activation():
    """mask -> loss is linear in what the readers take in: the slope is the whole difference."""
    net = small_cnn(input_shape=(1, 8, 8), num_classes=3, channels=(4,), hidden=0)
    params, x = drawn(net), torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def total(mask):
        thin = masks.masked(params, {"conv1": mask}, masks.readers(net), net.space)
        return scores(net, IndexMap.full(), thin, x).sum()

    off = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(off), off)
    on = torch.ones(4, dtype=torch.float64)
    missing = float(total(on)) - float(total(off.detach()))
    assert float(slope[1]) == pytest.approx(missing, rel=1e-9)
    assert float(slope[1]) != 0


def test_norms_over_channels_are_refused():
    net = small_cnn(input_shape=(1, 8, 8), num_classes=3, norm="group")
    with pytest.raises(InputError, match=r"layer .norm1.: GroupNorm .* adds .*norm = .batch"):
        masks.refuse_joint_norms(net, "adds")
    masks.refuse_joint_norms(vgg(width=0.125), "adds")
