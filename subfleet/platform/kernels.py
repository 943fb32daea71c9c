"""Calls of torch that a hot loop needs and torch keeps under private names.

The foreach kernels work on a list of tensors in one call. `gradients` enters the
autograd engine directly: `torch.autograd.grad` spends 20 us a call on checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch

add: Callable[..., Sequence[Tensor]] = _torch._foreach_add
add_: Callable[..., None] = _torch._foreach_add_
sub: Callable[..., Sequence[Tensor]] = _torch._foreach_sub
mul: Callable[..., Sequence[Tensor]] = _torch._foreach_mul
mul_: Callable[..., None] = _torch._foreach_mul_
copy_: Callable[..., None] = _torch._foreach_copy_
norm: Callable[..., Sequence[Tensor]] = _torch._foreach_norm

_run_backward: Callable[..., Sequence[Tensor | None]] = (
    _torch.autograd.Variable._execution_engine.run_backward
)


def gradients(loss: Tensor, weights: Sequence[Tensor], one: Tensor) -> Sequence[Tensor]:
    """The gradient of a scalar at each weight; zeros where the loss does not depend on it.

    `one` is a scalar 1.0 on the loss's device, kept between calls.
    """
    found = _run_backward(
        (loss,), (one,), False, False, weights, allow_unreachable=True, accumulate_grad=False
    )
    return [
        torch.zeros_like(weight) if grad is None else grad
        for grad, weight in zip(found, weights, strict=True)
    ]
