"""A variant's physically small network, built once and lent to one client after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

from subfleet.core.program import LossProgram, Params
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork, has_dropout
from subfleet.core.units import IndexMap
from subfleet.core.watching import Passed, watched
from subfleet.platform import kernels, layers
from subfleet.platform.record import Choice
from subfleet.platform.slimmed import Slimmed
from subfleet.platform.traces import Traces


class Resident:
    """The network of one variant with buffers that clients take turns in.

    Calling it with its own `params` runs the module directly; any other tree
    goes through `functional_call`. So a loss written for mapped clients costs a
    looped one nothing.
    """

    def __init__(self, net: SuperNetwork, map: IndexMap, choice: Choice):
        self.choice = choice
        self.device = torch.device(choice.device)
        self.channels_last = choice.memory_format == "channels_last"
        self.autocasts = choice.dtype == "bfloat16"
        module = net.module(map).to(self.device)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module: nn.Module = module
        if self.autocasts and self.device.type == "cpu":
            layers.spare_small_linear(module)
        self.step = layers.Step()
        self._steps_matter = layers.adopt(module, self.step)
        # A chain without hooks runs layer by layer: nn.Module's call costs 3 us a layer.
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        self._layers = [layer.forward for layer in module.children()] if plain else [module]
        self.trainable = dict(module.named_parameters())
        self.leaves = tuple(self.trainable.values())
        self.weights = {name: leaf.detach() for name, leaf in self.trainable.items()}
        self.one = torch.ones((), device=self.device)
        # Buffers outside the super-network's tensors are constants, such as frozen word vectors.
        buffers = module.named_buffers()
        self.statistics = {n: b for n, b in buffers if n in net.space.axes}
        # Whether rows of weight 0 leave no trace in what the layers make of the others.
        self.weighs_rows = layers.can_map(module, self.statistics)
        self._slimmed = Slimmed(net, map, module, self.step)
        self.params: Params = {**self.trainable, **self.statistics}
        fresh = net.fresh_statistics(map)  # of a client that saw no data yet
        self.fresh: Params = {name: value.to(self.device) for name, value in fresh.items()}
        self.traces = Traces()
        self.has_dropout = has_dropout(module)

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Logits of a batch; shape [B, classes]."""
        if self.autocasts:
            with torch.autocast(self.device.type, torch.bfloat16):
                return self._scores(params, x).float()
        return self._scores(params, x)

    def watched(self, params: Params, x: Tensor) -> tuple[Tensor, list[Passed]]:
        """Logits of a batch, and what went through each layer, in the order they ran."""
        return watched(self.module, lambda: self(dict(params), x))  # never past the hooks

    def at(self, units: Mapping[str, int]) -> Callable[[Params, Tensor], Tensor]:
        """The sub-network of the first `units[g]` units of each group: `at(units)(params, x)`."""
        return partial(self._part, units)

    def _part(self, units: Mapping[str, int], params: Params, x: Tensor) -> Tensor:
        weights = {name: value for name, value in params.items() if name in self.trainable}
        if self.channels_last:
            weights = {name: _told_apart(value) for name, value in weights.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts):
            return self._slimmed.run(units, weights, x).float()

    def gradient(
        self, of: Callable[[Params], tuple[Tensor, Any]], at: Params
    ) -> tuple[Params, Tensor, Any]:
        """The gradient at `at` of the scalar in `of(at) -> (scalar, other)`, and these two."""
        if self.choice.way == "vmap":
            grads, (value, other) = grad_and_value(of, has_aux=True)(at)
            return grads, value, other
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            value, other = of(leaves)
        found = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        detached = pytree.tree_map_only(Tensor, Tensor.detach, other)
        return dict(zip(leaves, found, strict=True)), value.detach(), detached

    def _scores(self, params: Params, x: Tensor) -> Tensor:
        if params is self.params:
            for layer in self._layers:
                x = layer(x)
            return x
        # Leaves that are not the network's own (momentum, say) may stand beside them.
        own = {name: value for name, value in params.items() if name in self.params}
        if self.channels_last:
            own = {name: _told_apart(value) for name, value in own.items()}
        return functional_call(self.module, own, (x,))

    def prepared(self, program: LossProgram, round: int) -> LossProgram:
        """The program with the round's rate, and a loss whose steps this network's layers know."""
        rule = program.rule.at(round)
        loss = layers.InStep(program.loss) if self._steps_matter else program.loss
        return replace(program, rule=rule, loss=loss)

    def load(self, params: Params) -> None:
        """Copies a client's start into the buffers that it names."""
        names = [name for name in self.params if name in params]
        if names:
            with torch.no_grad():
                kernels.copy_([self.params[n] for n in names], [params[n] for n in names])

    def images(self, x: Tensor, scale: Scaling) -> Tensor:
        """Rows as the network wants them: pixels and numbers float and scaled, tokens int64."""
        if x.dtype == torch.uint8 or x.is_floating_point():
            stored, x = x, x.to(self.device, torch.float32)
            x = scale.apply(x) if x is stored else scale.apply_(x)
        else:
            x = x.to(self.device).to(torch.int64)  # narrow on the way to the device
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x


def _told_apart(value: Tensor) -> Tensor:
    """The same, but filters of one channel with strides that say channels last.

    Both layouts are one for them, arithmetic gives them the strides of the other, and then a
    convolution of images of one channel answers in it: pooling takes five times as long.
    """
    if value.dim() != 4 or value.shape[1] != 1 or not value.is_contiguous():
        return value
    return value.reshape(len(value), *value.shape[2:], 1).movedim(3, 1)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity (a float32 overflow of the norm counts)."""
    if not tensors:
        return True
    return math.isfinite(float(torch.stack(list(kernels.norm(tensors))).sum()))
