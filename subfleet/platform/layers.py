"""Layers whose numbers hang on the step: the same for one client and for many side by side.

torch's dropout draws from a generator, which cannot be mapped, and its batch norm
counts the padded rows of a mapped client's part batch. In a step of the engine these
layers draw from the step's key, and weight the rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subfleet.core.program import Batch, Loss, Noise, Params
from subfleet.core.supernet import DRAWS

SMALL = 1 << 20  # weights of a linear layer
FIRST_SALT = 1 << 20  # of the layers' draws; a loss takes small ones for its own


class Step:
    """The step that the layers of one network are in."""

    def __init__(self) -> None:
        self.noise: Noise | None = None
        self.weight: Tensor | None = None  # [B], of each row of the batch
        self._draws = 0

    @contextmanager
    def entered(self, noise: Noise, weight: Tensor | None = None) -> Iterator[None]:
        """Within it, layers draw from `noise` and give rows their `weight`."""
        self.noise, self.weight, self._draws = noise, weight, 0
        try:
            yield
        finally:
            self.noise = self.weight = None

    def uniform(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        """Numbers in (0, 1); others at each call within a step."""
        salt = FIRST_SALT + self._draws
        self._draws += 1
        return noise.uniform(shape, salt=salt)


@dataclass(frozen=True)
class InStep:
    """A loss during which the network's layers know the step."""

    loss: Loss

    def __call__(
        self, net: Any, params: Params, batch: Batch, noise: Noise, inputs: Params
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch; `net` is a `Resident`."""
        with net.step.entered(noise, batch.weight):
            return self.loss(net, params, batch, noise, inputs)


def adopt(module: nn.Module, step: Step) -> bool:
    """Let the layers of a module follow `step`, in place; whether there are any."""
    found = False
    for layer in module.modules():
        if (own := _OWN.get(type(layer))) is not None:
            layer.__class__ = own  # parameters, buffers and hooks stay as they are
            layer.step = step  # type: ignore[assignment]
            found = True
    return found


def spare_small_linear(module: nn.Module) -> None:
    """Let linear layers of few weights stay in float32 under autocast, in place.

    On a CPU their casts take longer than their products.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.numel() < SMALL:
            layer.__class__ = _FullLinear


class _FullLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def can_map(module: nn.Module, statistics: Collection[str]) -> bool:
    """Whether clients side by side get the numbers of clients one by one.

    Not where code of the author's own draws, and not where some layer holds running
    statistics in a way that is not known here. `module` may be changed.
    """
    adopt(module, Step())
    weighted = set()
    for name, layer in module.named_modules():
        if isinstance(layer, _WeightedNorm):
            weighted |= {f"{name}.running_mean", f"{name}.running_var"}
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return False
        elif isinstance(layer, _Dropout | _Dropout2d):
            continue
        elif isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            return False
    return weighted.issuperset(statistics) and not getattr(module, DRAWS, False)


class _Dropout(nn.Dropout):
    step: Step

    def forward(self, x: Tensor) -> Tensor:
        if self.step.noise is None or not self.training or self.p == 0:
            return super().forward(x)
        return x * _kept(self.step, self.step.noise, self.p, tuple(x.shape)).to(x.dtype)


class _Dropout2d(nn.Dropout2d):
    step: Step

    def forward(self, x: Tensor) -> Tensor:
        if self.step.noise is None or not self.training or self.p == 0:
            return super().forward(x)
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))  # whole channels
        return x * _kept(self.step, self.step.noise, self.p, shape).to(x.dtype)


def _kept(step: Step, noise: Noise, p: float, shape: tuple[int, ...]) -> Tensor:
    """1 / (1 - p) with probability 1 - p, else 0."""
    kept = step.uniform(noise, shape) >= p
    return kept * (1.0 / (1.0 - p) if p < 1 else 0.0)


class _WeightedNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that leaves rows of weight 0 out of mean and variance."""

    step: Step

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] normalised; a batch without real rows leaves the statistics as they are."""
        weight_B = self.step.weight
        if weight_B is None or not self.training:
            return super().forward(x)
        if len(weight_B) != len(x):
            raise ValueError(f"a BatchNorm saw {len(x)} rows of a batch of {len(weight_B)}")
        axes = (0, *range(2, x.dim()))
        rows = weight_B.view(-1, *[1] * (x.dim() - 1))
        count = weight_B.sum() * math.prod(x.shape[2:])
        given = x.float()
        mean_C = (given * rows).sum(axes) / count.clamp(min=1.0)
        away = given - _along_channels(mean_C, x)
        var_C = (away.square() * rows).sum(axes) / count.clamp(min=1.0)
        self._follow(mean_C.detach(), var_C.detach(), count)
        out = away * _along_channels((var_C + self.eps).rsqrt(), x)
        if self.affine:
            out = out * _along_channels(self.weight, x) + _along_channels(self.bias, x)
        return out.to(x.dtype)

    def _follow(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        """Move the running statistics by `momentum` to the batch's, with the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.momentum is not None  # a super-network's builder sees to it
        unbiased_C = var_C * (count / (count - 1).clamp(min=1.0))
        for running, batch in ((self.running_mean, mean_C), (self.running_var, unbiased_C)):
            moved = (1.0 - self.momentum) * running + self.momentum * batch
            running.copy_(torch.where(count > 0, moved, running))


def _along_channels(value_C: Tensor, x: Tensor) -> Tensor:
    return value_C.view(-1, *[1] * (x.dim() - 2))


class _BatchNorm1d(_WeightedNorm, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_WeightedNorm, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_WeightedNorm, nn.BatchNorm3d):
    pass


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: _Dropout,
    nn.Dropout2d: _Dropout2d,
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
}
