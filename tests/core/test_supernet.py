"""The super-network: building, initialising, and mask = slice."""

import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork, drop_counters
from subfleet.core.units import IndexMap
from subfleet.models import chain


def inverted_residual():
    """Expand, depthwise, project, with a norm after each; then a classifier."""
    return chain(
        "block",
        nn.Sequential(
            OrderedDict(
                expand=nn.Conv2d(2, 6, 1, bias=False),
                bn1=nn.BatchNorm2d(6),
                relu1=nn.ReLU6(),
                depthwise=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
                bn2=nn.BatchNorm2d(6),
                relu2=nn.ReLU6(),
                project=nn.Conv2d(6, 4, 1, bias=False),
                bn3=nn.BatchNorm2d(4),
                flatten=nn.Flatten(),
                fc1=nn.Linear(4 * 25, 7),
                bn4=nn.BatchNorm1d(7),
                act=nn.ReLU(),
                fc2=nn.Linear(7, 3),
            )
        ),
        (2, 5, 5),
    )


def group_normed():
    return chain(
        "gn",
        nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 6, 3),
                norm=nn.GroupNorm(1, 6),
                relu=nn.ReLU(),
                flatten=nn.Flatten(),
                fc=nn.Linear(6 * 9, 3),
            )
        ),
        (2, 5, 5),
    )


def shaken(net, seed=0):
    """Tensors in float64 without the zeros and ones of a fresh norm."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t.double() + 0.3 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
        for n, t in net.init(seed).items()
    }


def masked(net, kept, but=()):
    """The full module with a mask after every layer that has units, except those in `but`."""
    module = net.module().double()
    for row in net.layers:
        if row.name in but:
            continue
        indices = net.space.indices(row.outputs, kept)

        def hook(layer, inputs, output, indices=indices):
            mask = torch.zeros(output.shape[1], dtype=output.dtype)
            mask[indices] = 1
            return output * mask.reshape(1, -1, *[1] * (output.dim() - 2))

        module.get_submodule(row.name).register_forward_hook(hook)
    return module


@st.composite
def block_maps(draw):
    sizes = {"expand": 6, "project": 4, "fc1": 7}
    return IndexMap.of(
        {g: sorted(draw(st.sets(st.integers(0, c - 1), min_size=1))) for g, c in sizes.items()}
    )


@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=15, deadline=None)
@given(kept=block_maps())
def test_masking_equals_slicing(training, kept):
    net = inverted_residual()
    w = shaken(net)
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64)
    big, small = masked(net, kept).train(training), net.module(kept).double().train(training)
    big.load_state_dict(w)
    small.load_state_dict(net.space.extract(w, kept))
    torch.testing.assert_close(big(x), small(x), rtol=0, atol=1e-12)
    if training:  # and the statistics of the kept channels move alike
        after = net.space.extract(big.state_dict(), kept)
        for name in ("bn1.running_mean", "bn2.running_var", "bn4.running_mean"):
            torch.testing.assert_close(after[name], small.state_dict()[name], rtol=0, atol=1e-12)


def test_one_mask_in_a_depthwise_block_is_not_slicing():
    net = inverted_residual()
    w, kept = shaken(net), IndexMap.of({"expand": [0, 3]})
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64)
    big, small = masked(net, kept, but=("depthwise", "bn2")).eval(), net.module(kept).double()
    big.load_state_dict(w)
    small.load_state_dict(net.space.extract(w, kept))
    # The second norm's bias revives the dropped channels.
    assert (big(x) - small.eval()(x)).abs().max() > 0.01


def test_group_norm_needs_the_statistics_of_kept_channels():
    net = group_normed()
    w, kept = shaken(net), IndexMap.of({"conv": [1, 2, 5]})
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64)
    big, small = masked(net, kept), net.module(kept).double()
    big.load_state_dict(w)
    small.load_state_dict(net.space.extract(w, kept))
    assert (big(x) - small(x)).abs().max() > 0.01  # dropped zeros count in mean and variance

    class KeptGroupNorm(nn.Module):
        def forward(self, y):
            own = y[:, [1, 2, 5]].flatten(1)
            mean, var = own.mean(1), own.var(1, unbiased=False)
            shape = (-1, 1, 1, 1)
            z = (y - mean.reshape(shape)) / (var.reshape(shape) + 1e-5).sqrt()
            z = z * w["norm.weight"].reshape(1, -1, 1, 1) + w["norm.bias"].reshape(1, -1, 1, 1)
            mask = torch.zeros(6, dtype=y.dtype)
            mask[[1, 2, 5]] = 1
            return z * mask.reshape(1, -1, 1, 1)

    big.norm = KeptGroupNorm()
    torch.testing.assert_close(big(x), small(x), rtol=0, atol=1e-12)


def test_init_depends_on_the_seed_alone():
    net = inverted_residual()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = net.init(3)
    net.module(IndexMap.prefix({"fc1": 2}))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = net.init(3), net.init(4)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["fc1.weight"], c["fc1.weight"])
    assert set(a) == set(net.space.shapes) == net.parameters | net.statistics
    assert net.statistics == {f"bn{i}.running_{s}" for i in range(1, 5) for s in ("mean", "var")}
    assert not any(t.requires_grad for t in a.values())


def test_small_modules_have_the_networks_names_and_shapes():
    net = pickle.loads(pickle.dumps(inverted_residual()))
    kept = IndexMap.of({"expand": [1, 4], "project": [3], "fc1": [0, 2]})
    small = net.module(kept)
    shapes = {n: tuple(t.shape) for n, t in small.state_dict().items()}
    assert shapes == net.space.slice_shapes(kept)
    assert small.depthwise.groups == 2
    small.load_state_dict(net.space.extract(net.init(0), kept))  # strict, without counters
    small(torch.randn(4, 2, 5, 5))
    assert set(small.state_dict()) == set(shapes)
    bare = net.module(kept, device="meta")
    assert all(t.is_meta for t in bare.state_dict().values())
    w, x = net.space.extract(net.init(0), kept), torch.randn(4, 2, 5, 5)
    called = torch.func.functional_call(bare.eval(), w, (x,))
    small.load_state_dict(w)
    assert torch.equal(called, small.eval()(x))
    with pytest.raises(InputError, match="unknown unit group"):
        net.module(IndexMap.prefix({"nope": 1}))


def test_fresh_statistics_are_those_of_a_module_that_saw_no_data():
    net = inverted_residual()
    kept = IndexMap.of({"expand": [1, 4], "project": [3]})
    state = net.module(kept).state_dict()
    fresh = net.fresh_statistics(kept)
    assert set(fresh) == net.statistics
    assert all(torch.equal(value, state[name]) for name, value in fresh.items())


def test_counters_are_dropped_and_cumulative_momentum_refused():
    module = drop_counters(drop_counters(nn.Sequential(nn.BatchNorm1d(3))))
    assert "0.num_batches_tracked" not in module.state_dict()
    module.load_state_dict(dict(module.state_dict()))
    module(torch.randn(5, 3))
    assert module[0].running_mean.abs().sum() > 0
    with pytest.raises(InputError, match="momentum None"):
        drop_counters(nn.BatchNorm1d(3, momentum=None))


def test_contradictory_networks_are_refused():
    net = inverted_residual()
    parts = {
        k: getattr(net, k)
        for k in ("name", "space", "layers", "build", "input_shape", "num_classes")
    }
    with pytest.raises(InputError, match="unknown unit group 'x'"):
        SuperNetwork(**parts, elastic=("x",))
    with pytest.raises(InputError, match="not among its tensors"):
        SuperNetwork(**parts, elastic=(), statistics=frozenset({"bn9.running_mean"}))
