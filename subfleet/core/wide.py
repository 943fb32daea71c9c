"""Sums in float64 of tensors in float32, by stretches that stay in a core's cache.

Widened as a whole, a large tensor would be written to memory and read again. A small one
is a stretch of its own, for which cutting would cost more than adding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CACHED = 1 << 16  # entries whose float64 copies stay in the cache


def add_(total: Tensor, tensor: Tensor, weight: float) -> None:
    """Adds `weight * tensor` to a float64 total of its shape, in place."""
    if tensor.numel() <= _CACHED or not (total.is_contiguous() and tensor.is_contiguous()):
        total.add_(tensor, alpha=weight)
        return
    stretches = zip(total.view(-1).split(_CACHED), tensor.view(-1).split(_CACHED), strict=True)
    for into, piece in stretches:
        into.add_(piece.to(torch.float64), alpha=weight)


def widened(tensor: Tensor, weight: float) -> Tensor:
    """`weight * tensor` in float64; contiguous, so that Ray can pass it on uncopied."""
    wide = torch.empty_like(tensor, dtype=torch.float64, memory_format=torch.contiguous_format)
    return wide.copy_(tensor).mul_(weight)


def mean(total: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """`total / weight` in another dtype."""
    if total.numel() <= _CACHED or not total.is_contiguous():
        return (total / weight).to(dtype)
    found = torch.empty(total.shape, dtype=dtype, device=total.device)
    stretches = zip(found.view(-1).split(_CACHED), total.view(-1).split(_CACHED), strict=True)
    for into, piece in stretches:
        into.copy_(piece / weight)
    return found
