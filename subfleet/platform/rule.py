"""The engine's optimiser step, on lists of tensors, for one client or many side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subfleet.core.program import LocalRule
from subfleet.platform import kernels


def step(
    rule: LocalRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocity: Sequence[Tensor] | None,
    start: Sequence[Tensor] | None,
    *,
    clients: bool = False,
) -> None:
    """One step in place: v <- m v + (clip(g) + d w + mu (w - w_start));  w <- w - lr v.

    With `clients` the first axis of every tensor is the client, and clipping
    takes each client's own norm. `velocity` is given when momentum is used,
    `start` when there is a proximal term.
    """
    if rule.clip_norm is not None:
        grads = clipped(grads, rule.clip_norm, clients=clients)
    if rule.weight_decay:
        grads = kernels.add(grads, params, alpha=rule.weight_decay)
    if start is not None:
        away = kernels.sub(params, start)
        grads = kernels.add(grads, away, alpha=rule.proximal)
    if velocity is not None:
        kernels.mul_(velocity, rule.momentum)
        kernels.add_(velocity, grads)
        grads = velocity
    kernels.add_(params, grads, alpha=-rule.lr)


def clipped(grads: Sequence[Tensor], bound: float, *, clients: bool = False) -> Sequence[Tensor]:
    """Gradients scaled so that their joint norm is at most `bound`, for each client."""
    if not clients:
        norm = torch.linalg.vector_norm(torch.stack(list(kernels.norm(grads))))
        return kernels.mul(grads, (bound / (norm + 1e-6)).clamp(max=1.0))
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)  # [K]
    factor = (bound / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return [grad * factor.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]
