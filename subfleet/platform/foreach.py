"""The foreach kernels: one call for a list of tensors. torch keeps them under private names."""

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
