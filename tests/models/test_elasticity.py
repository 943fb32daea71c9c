"""Blocks that maps skip and kernels that they shrink, on a small residual network."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import slices
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subfleet.algorithms.fedpa import FedPA
from subfleet.algorithms.fedrolex import FedRolex
from subfleet.core.aggregate import Update, accumulate, coverage_counts, finish
from subfleet.core.algorithm import Setting, TierSize
from subfleet.core.budget import Budget, Tier, largest_width, width_map
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.units import IndexMap
from subfleet.models import mobilenet_v2, resnet18, resnet56, supernet
from subfleet.models.elasticity import TransformedConv2d, elastic


class Block(nn.Module):
    """Expand, 7x7 depthwise, project, with a shortcut."""

    def __init__(self, channels: int, hidden: int, norm: Callable) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 7, padding=3, groups=hidden, bias=False)
        self.norm2 = norm(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = norm(channels)

    def forward(self, x):
        y = torch.relu(self.norm1(self.expand(x)))
        y = torch.relu(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


class Net(nn.Module):
    """A stem, two stages of two blocks, a head."""

    def __init__(self, norm: Callable = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.stages = nn.Sequential(
            nn.Sequential(Block(6, 8, norm), Block(6, 10, norm)),
            nn.Sequential(nn.Conv2d(6, 8, 1), Block(8, 12, norm), Block(8, 12, norm)),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.stages(self.stem(x))).mean((2, 3)))


STAGES = [["stages.0.0", "stages.0.1"], ["stages.1.1", "stages.1.2"]]
PATHS = [path for stage in STAGES for path in stage]


@cache
def net_of(transforms: bool = False):
    plain = supernet(Net(), torch.zeros(1, 1, 12, 12), name="blocks")
    kernels = {f"{path}.depthwise": (3, 5) for path in PATHS}
    return elastic(plain, stages=STAGES, kernels=kernels, transforms=transforms)


@cache
def tensors_of(transforms: bool):
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor.double() + 0.1 * torch.rand(tensor.shape, generator=generator).double()
        for name, tensor in net_of(transforms).init(0).items()
    }


def outputs(net, kept, tensors, x):
    module = net.module(kept).double().eval()
    module.load_state_dict(net.space.extract(tensors, kept))
    with torch.no_grad():
        return module(x)


X = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_slices_cover_and_compute_what_the_masked_network_does(seed):
    net, tensors = net_of(), tensors_of(False)
    kept = net.space.canonical(slices.drawn(net, seed))
    small = net.space.extract(tensors, kept)
    assert set(small) == set(net.module(kept).state_dict())
    again = net.space.extract(net.space.scatter(small, kept), kept)
    assert all(torch.equal(again[n], t) for n, t in small.items())
    coverage = net.space.coverage(kept, torch.float64)
    assert sum(int(c.sum()) for c in coverage.values()) == net.stored_params(kept)
    masked = outputs(net, IndexMap.full(), {n: t * coverage[n] for n, t in tensors.items()}, X)
    torch.testing.assert_close(outputs(net, kept, tensors, X), masked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transforms", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_a_sub_network_has_sub_networks_of_its_own(transforms, seed):
    """Blocks that it skips are gone from its space; of the others, and of kernels, some may go.

    A kernel that was computed from a larger one has no matrix left for a smaller one.
    """
    net, tensors = net_of(transforms), tensors_of(transforms)
    outer = slices.drawn(net, seed)
    own = net.space.within(outer)
    assert set(own.blocks) == {g for g in net.space.blocks if len(outer.kept[g])}
    assert own.shapes == net.space.slice_shapes(outer)
    inner = slices.drawn(replace(net, space=own, statistics=frozenset()), seed + 1)
    if transforms:
        inner = IndexMap({g: units for g, units in inner.kept.items() if g not in own.kernels})
    kept = dict(outer.kept) | {g: outer.kept[g][units] for g, units in inner.kept.items()}
    twice = own.extract(net.space.extract(tensors, outer), inner)
    once = net.space.extract(tensors, IndexMap(kept))
    assert twice.keys() == once.keys() == own.slice_shapes(inner).keys()
    assert all(torch.equal(twice[n], once[n]) for n in once)


@pytest.mark.parametrize("transforms", [False, True])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_costs_are_those_of_the_small_modules(transforms, seed):
    net = net_of(transforms)
    kept = net.space.canonical(slices.drawn(net, seed))
    small = net.module(kept).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(X[:1].float())
    own = sum(  # of the matrices, once a batch and not a sample
        counts.get(torch.ops.aten.mm, 0) for counts in [counter.get_flop_counts()["Global"]]
    )
    assert 2 * net.cost(kept).macs == counter.get_total_flops() - own
    params = sum(p.numel() for p in small.parameters())
    assert net.cost(kept, count_bias=True, count_norm=True).params == params
    assert net.stored_params(kept, "local") == params


def test_transformed_kernels_by_hand():
    net = net_of(True)
    at = "stages.0.0.depthwise"
    space, tensors = net.space, dict(net.init(3))
    assert torch.equal(tensors[f"{at}.to_3"], torch.eye(9)) and len(tensors[f"{at}.to_5"]) == 25
    big = tensors[f"{at}.weight"]
    shapes = {
        k: {n.removeprefix(f"{at}."): tuple(t.shape) for n, t in cut.items() if n.startswith(at)}
        for k in (3, 5, 7)
        for cut in [space.extract(tensors, width_map(net, 1.0, kernel=k))]
    }
    five = {"weight": (8, 1, 5, 5), "to_5": (25, 25)}
    assert shapes == {7: {"weight": (8, 1, 7, 7)}, 5: five, 3: five | {"to_3": (9, 9)}}
    # Identities crop; another matrix mixes the positions of each channel's kernel.
    x = torch.rand(1, 8, 6, 6)
    kept = width_map(net, 1.0, kernel=3)
    for scale in (1.0, 2.0):
        tensors[f"{at}.to_5"] = scale * torch.eye(25)
        module = net.module(kept)
        module.load_state_dict(space.extract(tensors, kept))
        layer = module.get_submodule(at)
        assert isinstance(layer, TransformedConv2d)
        wanted = nn.functional.conv2d(x, scale * big[..., 2:5, 2:5], padding=1, groups=8)
        torch.testing.assert_close(layer(x), wanted)
    flip = torch.eye(9).flip(0)
    tensors |= {f"{at}.to_5": torch.eye(25), f"{at}.to_3": flip}
    module.load_state_dict(space.extract(tensors, kept))
    wanted = nn.functional.conv2d(x, big[..., 2:5, 2:5].flip(2, 3), padding=1, groups=8)
    torch.testing.assert_close(layer(x), wanted)


def test_what_nobody_trains_keeps_its_value():
    net = net_of(True)
    current = net.init(0)
    kept = width_map(net, 0.5, depth=0.5, kernel=3)
    assert set(kept.kept) >= {"stages.0.1.block", "stages.1.2.block", "stages.0.0.depthwise.kernel"}
    assert not any(g.startswith(("stages.0.1.depth", "stages.1.2.exp")) for g in kept.kept)
    small = {n: torch.full_like(t, 9.0) for n, t in net.space.extract(current, kept).items()}
    update = Update()
    accumulate(update, net.space, kept, small, 3.0)
    accumulate(update, net.space, IndexMap.full(), net.space.extract(current, IndexMap.full()), 1.0)
    new = finish(update, net.space, current)
    assert torch.equal(new["stages.0.1.depthwise.weight"], current["stages.0.1.depthwise.weight"])
    assert torch.equal(new["stages.0.0.depthwise.to_3"], torch.full((9, 9), 9.0))
    weight = new["stages.0.0.depthwise.weight"]
    was = current["stages.0.0.depthwise.weight"]
    torch.testing.assert_close(weight[:4, :, 1:6, 1:6], (was[:4, :, 1:6, 1:6] + 27) / 4)
    assert torch.equal(weight[..., 0, :], was[..., 0, :]) and torch.equal(weight[4:], was[4:])
    counts = coverage_counts(update, net.space)
    assert counts["stages.0.0.block"].tolist() == [2] and counts["stages.0.1.block"].tolist() == [1]
    assert counts["stages.0.1.expand"].tolist() == [1] * 10
    assert counts["stages.0.0.depthwise.kernel"].tolist() == [1, 1, 2, 2, 2, 1, 1]


def test_bytes_of_maps():
    net = net_of()
    space = net.space
    units = 6 + 8 + 10 + 8 + 12 + 12
    assert (len(space.widths), space.num_units) == (6, units)
    assert len(space.blocks) == len(space.kernels) == 4
    assert IndexMap.full().wire_bytes(space) == 0
    assert width_map(net, 0.5, kernel=3).wire_bytes(space) == 2 * 6 + 8
    assert IndexMap.of({"stem": [1, 2]}).wire_bytes(space) == 7 + 8


def test_tiers_and_budgets():
    net = net_of()
    full, shallow = width_map(net, 1.0), width_map(net, 1.0, depth=0.5)
    assert full == IndexMap.full()
    assert sorted(shallow.kept) == ["stages.0.1.block", "stages.1.2.block"]
    assert set(width_map(net, 1.0, depth=0.0).kept) == {f"{path}.block" for path in PATHS}
    assert Tier(name="a", share=1, width=1.0, depth=0.5).largest_map(net) == shallow
    limit = net.cost(width_map(net, 1.0, depth=0.5, kernel=3)).flops
    tier = Tier(name="a", share=1, flops=limit, depth=0.5, kernel=4)
    assert tier.largest_map(net) == width_map(net, 1.0, depth=0.5, kernel=3)
    assert largest_width(net, Budget(flops=limit)) < 0.8
    with pytest.raises(InputError, match="depth 2 is out of range"):
        width_map(net, 1.0, depth=2)
    with pytest.raises(InputError, match="kernel 0 is out of range"):
        width_map(net, 1.0, kernel=0)
    # Costs fall with every elastic dimension.
    sizes = [net.cost(width_map(net, 1.0, depth=d)).macs for d in (0.0, 0.5, 1.0)]
    sizes += [net.cost(width_map(net, 0.5, kernel=k)).macs for k in (3, 5, 7)]
    assert sizes[:3] == sorted(set(sizes[:3])) and sizes[3:] == sorted(set(sizes[3:]))


def test_it_travels():
    net = pickle.loads(pickle.dumps(net_of(True)))
    kept = slices.drawn(net, 5)
    assert all(t.is_meta for t in net.module(kept, device="meta").state_dict().values())
    assert net.space.when == net_of(True).space.when


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"stem": []}, "'stem' keeps no unit"),
        ({"stages.0.0.block": [1]}, "has units 0 to 0, the map keeps unit 1"),
        ({"stages.0.0.depthwise.kernel": [0, 1, 2]}, r"keeps rows \[0, 1, 2\] of a kernel of 7"),
        ({"stages.0.0.depthwise.kernel": [3]}, r"sizes 3, 5, 7, such as \[2, 3, 4\]"),
    ],
)
def test_maps_that_are_none(kept, says):
    with pytest.raises(InputError, match=says):
        net_of().module(IndexMap.of(kept))


def test_tensors_of_skipped_blocks_are_refused():
    net = net_of()
    kept = width_map(net, 1.0, depth=0.0)
    with pytest.raises(InputError, match=r"'stages\.0\.0\.expand\.weight' is not part of this map"):
        net.space.scatter(net.init(0), kept)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": [["stages.0.3"]]}, r"layer 'stages\.0\.3': there is no such block; did you"),
        ({"stages": [["stages.1.0"]]}, r"layer 'stages\.1\.0': it does not turn one tensor into"),
        ({"stages": [["head"]]}, r"layer 'head': it does not turn one tensor into another"),
        ({"stages": ["stages.0.1.project"]}, r"'stages\.0\.1\.project': it does not turn one"),
        ({"stages": [["stages.0", "stages.0.1"]]}, r"it is inside 'stages\.0'"),
        ({"kernels": {"head": (3,)}}, "layer 'head': it is no Conv2d"),
        ({"kernels": {"stem": (2,)}}, "kernel sizes .2. beside its own of 3"),
        ({"kernels": {"stem": ()}}, "kernel sizes .. beside its own of 3"),
    ],
)
def test_what_cannot_be_elastic_names_the_layer(options, says):
    plain = supernet(Net(), torch.zeros(1, 1, 12, 12), name="blocks")
    with pytest.raises(InputError, match=says):
        elastic(plain, **options)


class Plain(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def test_blocks_that_change_their_input_in_place_are_seen_through():
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1, bias=False))
    module = nn.Sequential(nn.Conv2d(1, 8, 1), Plain(body), nn.Flatten(), nn.Linear(288, 2))
    net = supernet(module, torch.zeros(1, 1, 6, 6))
    with pytest.raises(InputError, match="layer '1': without its weights it is not the identity"):
        elastic(net, stages=["1"])


def test_blocks_that_are_not_called_by_themselves():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)])
            self.head = nn.Linear(36, 2)

        def forward(self, x):
            for conv in self.convs:
                x = x + conv(x)
            return self.head(x.flatten(1))

    net = supernet(Listed(), torch.zeros(1, 1, 6, 6))
    with pytest.raises(InputError, match="layer 'convs': it is not called by itself"):
        elastic(net, stages=["convs"])


def test_blocks_whose_parts_others_use():
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Plain(nn.Conv2d(1, 1, 3, padding=1))
            self.head = nn.Linear(36, 2)

        def forward(self, x):
            return self.head(self.block(x).flatten(1)) * len(self.block.body.kernel_size)

    net = supernet(Peeks(), torch.zeros(1, 1, 6, 6))
    with pytest.raises(InputError, match=r"does not run without them \(AttributeError"):
        elastic(net, stages=["block"])


def test_a_network_is_made_elastic_once():
    with pytest.raises(InputError, match="'blocks' is elastic already; name all stages and"):
        elastic(net_of(), stages=STAGES)


def test_padding_that_cannot_shrink():
    plain = supernet(
        nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(256, 2)), X[:1].float()
    )
    with pytest.raises(InputError, match="leaves none for one of 3; pad more"):
        elastic(plain, kernels={"0": (3,)})


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("algorithm", [FedPA, FedRolex])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_shallow_clients_with_small_kernels_train(algorithm, transforms, norm):
    """With BatchNorm, whose statistics stay on FedPA's clients, in a loop."""
    plain = supernet(Net(norm), torch.zeros(1, 1, 12, 12))
    kernels = {f"{path}.depthwise": (3, 5) for path in PATHS}
    net = elastic(plain, stages=STAGES, kernels=kernels, transforms=transforms)
    small = width_map(net, 0.5, depth=0.5, kernel=3)
    tiers = (TierSize("high", 0.5, IndexMap.full()), TierSize("low", 0.5, small))
    setting = Setting(net, tiers, LocalRule(lr=0.1), Stream(batch=4), 0, 4)
    data = toys.all_train([6, 6], (1, 12, 12), 5)
    start = algorithm(setting).init(net.init(0))
    ends = [
        toys.one_round(algorithm(setting), data, start, [0, 1], [0, 1], way=way)[0]["params"]
        for way in ("loop", "vmap" if norm is nn.Identity else "traced")
    ]
    assert toys.distance(*ends) < 1e-5
    moved = {n for n, t in ends[0].items() if not torch.equal(t, start["params"][n])}
    assert "stages.0.1.expand.weight" in moved  # by the first client alone
    matrices = {n for n in net.space.shapes if ".to_" in n}
    trained = {n for n in matrices if n.startswith(("stages.0.0", "stages.1.1"))}
    assert moved & matrices == trained


def test_the_zoo_is_elastic_on_demand():
    net = mobilenet_v2(depth=True, kernels=(3, 5, 7), transforms=True)
    assert [len(stage) for stage in net.stages] == [1, 2, 3, 2, 2]
    assert set(net.space.kernels.values()) == {(3, 5, 7)} and len(net.space.kernels) == 17
    plain, small = mobilenet_v2(), width_map(net, 1.0, depth=0.0, kernel=3)
    assert width_map(plain, 1.0, depth=0.0, kernel=3) == IndexMap.full()
    assert net.cost(small).macs < net.cost(width_map(net, 1.0, kernel=3)).macs == plain.cost().macs
    assert [len(stage) for stage in resnet18(depth=True).stages] == [2, 1, 1, 1]
    assert len(resnet56(depth=True).space.blocks) == 25
    with pytest.raises(InputError, match=r"model\.kernels is \[4\]; give odd sizes"):
        mobilenet_v2(kernels=(4,))
    with pytest.raises(InputError, match="a StandardisedConv2d may depend on all of its kernel"):
        elastic(resnet18(standardise=True), kernels={"stem.conv": (1,)})
