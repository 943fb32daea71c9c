"""The engine's optimiser step, on lists of tensors, for one client or many side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from subfleet.core.algorithm import LocalRule


def step(
    rule: LocalRule,
    params: list[Tensor],
    grads: list[Tensor],
    velocity: list[Tensor] | None,
    start: list[Tensor] | None,
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
        grads = list(torch._foreach_add(grads, params, alpha=rule.weight_decay))
    if start is not None:
        away = torch._foreach_sub(params, start)
        grads = list(torch._foreach_add(grads, away, alpha=rule.proximal))
    if velocity is not None:
        torch._foreach_mul_(velocity, rule.momentum)
        torch._foreach_add_(velocity, grads)
        grads = velocity
    torch._foreach_add_(params, grads, alpha=-rule.lr)


def clipped(grads: list[Tensor], bound: float, *, clients: bool = False) -> list[Tensor]:
    """Gradients scaled so that their joint norm is at most `bound`, for each client."""
    if not clients:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return list(torch._foreach_mul(grads, (bound / (norm + 1e-6)).clamp(max=1.0)))
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)  # [K]
    factor = (bound / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return [grad * factor.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]
