"""Layer norms whose statistics are those of the kept channels alone.

A norm over channels computes its mean and variance from all of them. Where a mask drops
channels *after* such a norm, they have already had their say, and the masked network is
not the sliced one. The norms here take the mask themselves: they compute what the norm of
the slice does, and zeros for what it lacks. A norm of each channel by itself, such as
BatchNorm, needs none of this: a mask after norm and activation is the slice.

Without a mask they are torch's own layers, with the same names of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_standardise(x: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """`x` less its mean, over its standard deviation, both over the kept entries of `dims`.

    `mask` (1 keeps, 0 drops) broadcasts against `x`; entries that it drops come out as 0,
    and all of them where it keeps none. Between 0 and 1 it weights the statistics and the
    result. Differentiable in both.

    >>> x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([1.0, 1.0, 0.0])
    >>> masked_standardise(x, mask, (1,), eps=0.0).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    mask = mask.to(x.dtype)
    weight = mask.expand_as(x)
    # mean = sum(m x) / sum(m), variance = sum(m (x - mean)^2) / sum(m)
    total = weight.sum(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    centred = x - (weight * x).sum(dims, keepdim=True) / total
    variance = (weight * centred.square()).sum(dims, keepdim=True) / total
    return mask * centred * torch.rsqrt(variance + eps)


class MaskedLayerNorm2d(nn.GroupNorm):
    """GroupNorm(1, C), a layer norm over (C, H, W), of the channels that a mask keeps.

    >>> norm, x = MaskedLayerNorm2d(3), torch.rand(2, 3, 4, 4)
    >>> masked, sliced = norm(x, torch.tensor([1, 0, 1])), nn.GroupNorm(1, 2)(x[:, [0, 2]])
    >>> torch.allclose(masked[:, [0, 2]], sliced, atol=1e-5), bool(masked[:, 1].any())
    (True, False)
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(1, channels, eps, affine)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, ...] -> the same; `mask` is [C], or [B, C] where samples differ."""
        if mask is None:
            return super().forward(input)
        places = (1,) * (input.dim() - 2)
        mask = mask.reshape(*mask.shape, *places).to(input.dtype)
        out = masked_standardise(input, mask, tuple(range(1, input.dim())), self.eps)
        if self.affine:
            scale, shift = (t.reshape(-1, *places) for t in (self.weight, self.bias))
            out = out * scale + mask * shift
        return out


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, of the features that a mask keeps."""

    def __init__(self, features: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__(features, eps, elementwise_affine)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, ..., F] -> the same; `mask` is [F], or [B, F] where samples differ."""
        if mask is None:
            return super().forward(input)
        places = (1,) * (input.dim() - 2)
        mask = mask.to(input.dtype)
        if mask.dim() == 2:
            mask = mask.reshape(mask.shape[0], *places, mask.shape[1])
        out = masked_standardise(input, mask, (-1,), self.eps)
        if self.elementwise_affine:
            out = out * self.weight + mask * self.bias
        return out
