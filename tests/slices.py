"""What must hold for the sub-networks of any super-network, checked on one random map."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subfleet.core.presence import centre
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import Binding, Block, Concat, Gates, IndexMap, Unit, extent
from subfleet.models.blocks import StandardisedConv2d

Tensors = dict[str, Tensor]
Kept = Mapping[str, np.ndarray]  # the kept indices of a row's "inputs" and "outputs"

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def drawn(net: SuperNetwork, seed: int) -> IndexMap:
    """A random map: any units of every layer, any blocks, any kernel sizes."""
    draw, space = np.random.default_rng(seed), net.space
    widths = {g: int(draw.integers(1, space.size(g) + 1)) for g in space.widths}
    kept = dict(IndexMap.random(space, widths, draw).kept)
    kept |= {g: np.arange(int(draw.integers(2))) for g in space.blocks}
    kept |= {g: centre(space.size(g), int(draw.choice(k))) for g, k in space.kernels.items()}
    return IndexMap(kept)


def tensors_of(net: SuperNetwork, seed: int = 5) -> Tensors:
    """Tensors in float64 without the zeros and ones of a fresh norm."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t.double() + 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
        for n, t in net.init(seed).items()
    }


def batch_of(net: SuperNetwork, size: int = 2, *, vocabulary: int = 0) -> Tensor:
    """A random batch, of tokens where there is a vocabulary."""
    generator = torch.Generator().manual_seed(6)
    shape = (size, *net.input_shape)
    if vocabulary:
        return torch.randint(0, vocabulary, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def outputs(net: SuperNetwork, tensors: Tensors, x: Tensor, kept: IndexMap) -> Tensor:
    """What the small module of a map makes of a batch, in evaluation."""
    module = net.module(kept).double().eval()
    module.load_state_dict(net.space.extract(tensors, kept))
    with torch.no_grad():
        return module(x)


# -- a mask is the slice


def check_slice(net: SuperNetwork, tensors: Tensors, x: Tensor, kept: IndexMap) -> None:
    """Cuts can be put back, cover what they cut, and compute what the masked network does."""
    small = net.space.extract(tensors, kept)
    again = net.space.extract(net.space.scatter(small, kept), kept)
    assert all(torch.equal(again[n], t) for n, t in small.items())
    coverage = net.space.coverage(kept, torch.float64)
    assert sum(int(c.sum()) for c in coverage.values()) == net.stored_params(kept)
    ones = net.space.scatter({n: torch.ones_like(t) for n, t in small.items()}, kept)
    absent = torch.zeros(())
    assert all(torch.equal(ones.get(n, absent).expand_as(c), c) for n, c in coverage.items())
    # The full network with all else zero computes what the small one does.
    module = net.module().double().eval()
    know_the_mask(net, module, kept)
    module.load_state_dict({n: t * coverage[n] for n, t in tensors.items()})
    with torch.no_grad():
        masked = module(x)
    torch.testing.assert_close(masked, outputs(net, tensors, x, kept), **CLOSE)


def know_the_mask(net: SuperNetwork, module: nn.Module, kept: IndexMap) -> None:
    """Let layers that compute statistics over units see the kept ones alone.

    Norms over channels, and weights standardised over inputs; other outputs are zero.
    """
    for row in net.layers:
        layer = dict(module.named_modules()).get(row.name)
        of = {"inputs": row.inputs, "outputs": row.outputs}
        if isinstance(layer, nn.GroupNorm) and layer.num_groups == 1:
            hook = _group_norm
        elif isinstance(layer, nn.LayerNorm):
            hook = _layer_norm
        elif isinstance(layer, StandardisedConv2d):
            hook = _standardised
        else:
            continue
        indices = {n: torch.from_numpy(net.space.indices(b, kept).copy()) for n, b in of.items()}
        layer.register_forward_hook(
            lambda layer, inputs, output, hook=hook, indices=indices: hook(
                layer, inputs[0], torch.zeros_like(output), **indices
            )
        )


def _group_norm(
    layer: nn.GroupNorm, x: Tensor, out: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor:
    small = nn.functional.group_norm(
        x.index_select(1, inputs), 1, layer.weight[outputs], layer.bias[outputs], layer.eps
    )
    return out.index_copy_(1, outputs, small)


def _layer_norm(
    layer: nn.LayerNorm, x: Tensor, out: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor:
    scale, shift = layer.weight[outputs], layer.bias[outputs]
    own = x.index_select(-1, inputs)
    small = nn.functional.layer_norm(own, scale.shape, scale, shift, layer.eps)
    return out.index_copy_(out.dim() - 1, outputs, small)


def _standardised(
    layer: StandardisedConv2d, x: Tensor, out: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor:
    weight = layer.standardised(layer.weight[outputs][:, inputs])
    own = x.index_select(1, inputs)
    small = nn.functional.conv2d(own, weight, None, layer.stride, layer.padding)
    return out.index_copy_(1, outputs, small)


# -- the order of units


def check_order(net: SuperNetwork, tensors: Tensors, x: Tensor, seed: int) -> None:
    """Units in another order, and the map with them: the sub-network computes the same."""
    draw = np.random.default_rng(seed)
    orders = {g: draw.permutation(net.space.size(g)) for g in net.space.widths}
    other = {}
    for leaf, tensor in tensors.items():
        for axis, binding in enumerate(net.space.axes[leaf]):
            index = torch.from_numpy(_moved(binding, orders, tensor.shape[axis]).copy())
            tensor = tensor.index_select(axis, index)
        other[leaf] = tensor
    kept = drawn(net, seed)
    moved = {g: np.flatnonzero(np.isin(orders[g], kept.kept[g])) for g in orders}
    there = IndexMap.of(dict(kept.kept) | moved)
    torch.testing.assert_close(
        outputs(net, other, x, there), outputs(net, tensors, x, kept), **CLOSE
    )


def _moved(binding: Binding, orders: dict[str, np.ndarray], length: int) -> np.ndarray:
    """The old indices of an axis in the order of its units' new places."""
    match binding:
        case Unit(group) if group in orders:
            return orders[group]
        case Block(group, each):
            return (orders[group][:, None] * each + np.arange(each)).reshape(-1)
        case Gates(group, gates):
            size = len(orders[group])
            return (np.arange(gates)[:, None] * size + orders[group]).reshape(-1)
        case Concat(parts):
            sizes = {group: len(order) for group, order in orders.items()}
            ends = np.cumsum([0] + [extent(part, sizes) for part in parts])
            return np.concatenate(
                [
                    _moved(part, orders, end - start) + start
                    for part, start, end in zip(parts, ends[:-1], ends[1:], strict=True)
                ]
            )
    return np.arange(length)


# -- costs


def check_costs(net: SuperNetwork, x: Tensor, kept: IndexMap) -> None:
    """The cost table agrees with torch's own counter on the small module, exactly.

    `x` is a batch of one sample. On the device "meta" nothing is computed, and recurrent
    layers come apart into the products that the counter knows.
    """
    small = net.module(kept, device="meta").to("meta").eval()  # constants, too
    x = x.to("meta", torch.float32 if x.is_floating_point() else x.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x)
    assert net.cost(kept).macs * 2 == counter.get_total_flops()
    # A module's own parameters have no row; only layers' do.
    own = {n for n in net.space.shapes if "." not in n and n not in {r.name for r in net.layers}}
    params = sum(p.numel() for n, p in small.named_parameters() if n not in own)
    assert net.cost(kept, count_bias=True, count_norm=True).params == params
    entries = sum(t.numel() for t in small.state_dict().values())
    assert net.stored_params(kept) == entries
