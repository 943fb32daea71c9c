"""Where a mask is the slice, and where it is not unless the norm knows the mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from subfleet.core.units import IndexMap
from subfleet.models import supernet
from subfleet.models.cnn import Norm
from subfleet.models.mobilenet import InvertedResidual
from subfleet.models.norms import MaskedLayerNorm, MaskedLayerNorm2d

KEPT = torch.tensor([0, 2, 3, 6])
MASK = torch.zeros(8).index_fill(0, KEPT, 1.0)


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    """A layer with values as after some training: no norm's weight is 1, no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise.abs() + 0.5 if "var" in name else noise)
    return layer


def batch(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- layer norms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_masked_statistics_are_those_of_the_slice(dtype: torch.dtype, tolerance: float) -> None:
    norm = drawn(MaskedLayerNorm2d(8)).to(dtype)
    x = batch(4, 8, 5, 5, dtype=dtype) + torch.arange(8.0)[:, None, None]
    sliced = F.group_norm(x[:, KEPT].to(dtype), 1, norm.weight[KEPT], norm.bias[KEPT], norm.eps)
    masked = norm(x.to(dtype), MASK)
    torch.testing.assert_close(masked[:, KEPT], sliced, rtol=tolerance, atol=tolerance)
    assert not masked[:, MASK == 0].any(), "zeros, not biases, for what is dropped"


def test_a_mask_after_a_group_norm_is_not_the_slice() -> None:
    norm, x = nn.GroupNorm(1, 8).double(), batch(4, 8, 5, 5)
    sliced = F.group_norm(x[:, KEPT], 1)
    after = norm(x) * MASK[:, None, None]
    assert (after[:, KEPT] - sliced).abs().max() > 0.05
    masked = MaskedLayerNorm2d(8).double()(x, MASK)
    assert (masked[:, KEPT] - sliced).abs().max() < 1e-12


def test_layer_norm_over_the_last_axis() -> None:
    norm, x = drawn(MaskedLayerNorm(8).double()), batch(4, 3, 8)
    sliced = F.layer_norm(x[..., KEPT], (4,), norm.weight[KEPT], norm.bias[KEPT], norm.eps)
    masked = norm(x, MASK)
    torch.testing.assert_close(masked[..., KEPT], sliced, rtol=1e-12, atol=1e-12)
    assert not masked[..., MASK == 0].any()


@pytest.mark.parametrize("kind", [MaskedLayerNorm, MaskedLayerNorm2d])
def test_masks_of_samples_and_no_mask(kind: type[nn.Module]) -> None:
    norm = drawn(kind(8).double())
    x = batch(3, 8, 5, 5) if kind is MaskedLayerNorm2d else batch(3, 5, 8)
    masks = torch.stack([MASK, 1 - MASK, torch.ones(8)])
    apart = torch.cat([norm(x[i : i + 1], masks[i]) for i in range(3)])
    torch.testing.assert_close(norm(x, masks), apart)
    torch.testing.assert_close(apart[2:], norm(x[2:]))
    plain = nn.GroupNorm(1, 8) if kind is MaskedLayerNorm2d else nn.LayerNorm(8)
    plain.double().load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))
    # Clients side by side, each with a mask of its own.
    mapped = vmap(lambda own, mask: norm(own[None], mask)[0])(x, masks)
    torch.testing.assert_close(mapped, apart)


def test_gradients_are_those_of_the_slice_and_dropped_channels_have_none() -> None:
    norm, x = drawn(MaskedLayerNorm2d(8).double()), batch(2, 8, 3, 3).requires_grad_()
    weights = batch(2, 4, 3, 3, seed=2)
    (masked,) = torch.autograd.grad((norm(x, MASK)[:, KEPT] * weights).sum(), x)
    small = x.detach()[:, KEPT].requires_grad_()
    out = F.group_norm(small, 1, norm.weight[KEPT], norm.bias[KEPT], norm.eps)
    (sliced,) = torch.autograd.grad((out * weights).sum(), small)
    torch.testing.assert_close(masked[:, KEPT], sliced, rtol=1e-10, atol=1e-10)
    assert not masked[:, MASK == 0].any()
    soft = (MASK.double() * 0.7 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x, soft))


def test_a_mask_that_keeps_nothing_gives_zeros() -> None:
    x = batch(2, 8, 3, 3).requires_grad_()
    out = drawn(MaskedLayerNorm2d(8).double())(x, torch.zeros(8))
    out.sum().backward()
    assert not out.any() and x.grad is not None and not x.grad.any()


# --- whole blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_after_batch_norm_and_relu_is_the_slice(training: bool) -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    drawn(block.double()).train(training)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    state = {}
    for name, tensor in block.state_dict().items():
        cut = tensor if name.startswith("3.") or tensor.dim() == 0 else tensor[KEPT]
        state[name] = tensor[:, KEPT] if name == "3.weight" else cut
    small.double().train(training).load_state_dict(state)
    x = batch(4, 3, 8, 8)
    masked = block[3](block[:3](x) * MASK[:, None, None])
    torch.testing.assert_close(masked, small(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block[1].running_var[KEPT], small[1].running_var)


def inverted_residual(norm: Norm) -> InvertedResidual:
    return InvertedResidual(4, 8, 4, 1, norm, nn.ReLU6, expands=True, projects=False)


def masked_block(block: InvertedResidual, x: Tensor, masks: int, *, aware: bool = False) -> Tensor:
    """The block with its hidden channels masked after the first `masks` activations.

    With `aware`, its norms over the hidden channels know the mask.
    """
    hidden = x
    for step, part in enumerate((block.expand, block.depthwise)):
        conv, norm, act = part
        hidden = conv(hidden)
        if aware:
            own = MaskedLayerNorm2d(8).double()
            own.load_state_dict(norm.state_dict())
            hidden = act(own(hidden, MASK))
        else:
            hidden = act(norm(hidden))
        if step < masks:
            hidden = hidden * MASK[:, None, None]
    return x + block.project(hidden)


def sliced_block(block: InvertedResidual, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the physically small block makes, and its tensors afterwards.

    It is cut by a super-network that was traced around it.
    """

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = block, nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean((2, 3)))

    around = Around()
    net = supernet(around, x[:1])
    kept = IndexMap.of({"block.expand.conv": KEPT.numpy()})
    state = {n: t for n, t in around.state_dict().items() if n in net.space.shapes}
    module = net.module(kept, device="meta").train(block.training)
    small = net.space.extract(state, kept)
    own = {n.removeprefix("block."): t for n, t in small.items() if n.startswith("block.")}
    return functional_call(module.block, own, (x,)), own


def test_an_inverted_residual_needs_both_masks() -> None:
    block, x = drawn(inverted_residual("batch").double()).eval(), batch(4, 4, 6, 6)
    sliced, _ = sliced_block(block, x)
    torch.testing.assert_close(masked_block(block, x, 2), sliced, rtol=1e-12, atol=1e-12)
    assert (masked_block(block, x, 1) - sliced).abs().max() > 0.3, "its bias revives it"


@pytest.mark.parametrize("masks", [1, 2])
def test_in_training_one_mask_spoils_the_statistics(masks: int) -> None:
    block, x = drawn(inverted_residual("batch").double()), batch(4, 4, 6, 6)
    sliced, small = sliced_block(block, x)
    # What a dropped channel's bias adds is the same everywhere, so that the norm of the
    # projection takes it out again; but its running mean remembers.
    torch.testing.assert_close(masked_block(block, x, masks), sliced, rtol=1e-12, atol=1e-12)
    off = (block.project.norm.running_mean - small["project.norm.running_mean"]).abs().max()
    assert off < 1e-12 if masks == 2 else off > 0.05


def test_an_inverted_residual_with_layer_norms_needs_masked_statistics() -> None:
    block, x = drawn(inverted_residual("group").double()), batch(4, 4, 6, 6)
    sliced, _ = sliced_block(block, x)
    aware = masked_block(block, x, 2, aware=True)
    torch.testing.assert_close(aware, sliced, rtol=1e-12, atol=1e-12)
    assert (masked_block(block, x, 2) - sliced).abs().max() > 0.05
