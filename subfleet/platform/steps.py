"""One step of a loss program, gradient and update, as a flat list of kernels.

For one client or for many side by side. Without clipping and proximal terms, gradients that
are products of matrices come as their factors: the product adds into the weights, or the
velocity, and no such gradient is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from subfleet.core.program import Batch, LossProgram, Noise, Params
from subfleet.platform import kernels, rule
from subfleet.platform.compiling import compiled
from subfleet.platform.resident import Resident
from subfleet.platform.traces import Flat, traced


class Stepper:
    """Steps of clients of one variant, in place; `clients` where tensors have them as axis 0.

    `weights` are the trainable tensors, `held` the others, `inputs` those of the tasks, by
    name. The velocity and the start that the local rule needs begin with the weights as
    they are now.
    """

    def __init__(
        self,
        net: Resident,
        program: LossProgram,
        weights: Params,
        held: Params,
        inputs: Params,
        *,
        clients: bool,
    ):
        self.net, self.program, self.clients, self.inputs = net, program, clients, inputs
        self.weights = list(weights.values())
        local = program.rule
        self.velocity = [torch.zeros_like(w) for w in self.weights] if local.momentum else None
        self.start = [w.clone() for w in self.weights] if local.proximal else None
        self.fuses = local.clip_norm is None and not local.proximal
        self._trees = tuple(tuple(tree) for tree in (weights, held, inputs))  # their names
        self._fixed = [*self.weights, *held.values(), *inputs.values()]
        self._key = (program.loss, clients, *(tuple(leaf.shape) for leaf in self._fixed))

    def plain_step(self, noise: Noise, batch: Batch) -> Tensor:
        """One step of a single client through autograd, in the network's own buffers."""
        with torch.enable_grad():
            loss, _ = self.program.loss(self.net, self.net.params, batch, noise, self.inputs)
        self._update(kernels.gradients(loss, self.net.leaves, self.net.one))
        return loss.detach()

    def step(self, key: Tensor, batch: Sequence[Tensor], active: Tensor | None = None) -> Tensor:
        """One traced step on (x, y) or (x, y, weight of each row); the loss, [K] for clients.

        `active`, bool [K], says which clients still have this step; None for all.
        """
        shapes = tuple((leaf.shape, leaf.stride()) for leaf in batch)
        leaves = [*self._fixed, key, *batch]
        factors = self.fuses and active is None
        flat = self.net.traces.get(
            (factors, shapes, self._key), lambda: self._traced(leaves, factors)
        )
        *grads, loss = flat.run(*leaves)
        if factors:
            self._add(grads, flat.products)
        elif active is None:
            self._update(grads)
        else:
            before = [w.clone() for w in self.weights]
            self._update(grads)
            for weight, old in zip(self.weights, before, strict=True):
                weight.copy_(chosen(active, weight, old))  # finished clients keep every bit
        return loss

    def _update(self, grads: Sequence[Tensor]) -> None:
        rule.step(
            self.program.rule, self.weights, grads, self.velocity, self.start, clients=self.clients
        )

    def _add(self, found: Sequence[Tensor], products: Sequence[bool]) -> None:
        """With momentum v <- m v + g + d w; w <- w - lr v. Else w <- (1 - lr d) w - lr g.

        `found` holds a gradient, or the two factors of one, for each weight.
        """
        local, left = self.program.rule, iter(found)
        into, scale, keep = self.weights, -local.lr, 1.0 - local.lr * local.weight_decay
        if self.velocity is not None:
            into, scale, keep = self.velocity, 1.0, local.momentum
        rest: list[Tensor] = []
        grads: list[Tensor] = []
        for target, product in zip(into, products, strict=True):
            if not product:
                rest.append(target)
                grads.append(next(left))
            elif target.dim() == 2:
                target.addmm_(next(left), next(left), beta=keep, alpha=scale)
            else:
                target.baddbmm_(next(left), next(left), beta=keep, alpha=scale)
        if rest:
            if keep != 1.0:
                kernels.mul_(rest, keep)
            kernels.add_(rest, grads, alpha=scale)
        if self.velocity is not None:
            if local.weight_decay:
                kernels.add_(self.velocity, self.weights, alpha=local.weight_decay)
            kernels.add_(self.weights, self.velocity, alpha=-local.lr)

    def _traced(self, leaves: list[Any], factors: bool) -> Flat:
        """The step's gradient; compiled where that was chosen and the batch is a whole one."""
        choice, count = self.net.choice, len(self.weights) if factors else 0
        whole = len(leaves) == len(self._fixed) + 3  # key, x and y, and no weights of rows
        full = not self.clients or len(leaves[-1]) == choice.side_by_side
        compiles = choice.compiled and factors and whole and full
        flat = traced(self._gradient, leaves, count, eager=not compiles)
        return compiled(flat, leaves) if compiles else flat

    def _gradient(self, *leaves: Any) -> Sequence[Tensor]:
        """The gradient at each weight, and the loss, from all leaves of a step."""
        rest, trees = list(leaves), []
        for names in self._trees:
            trees.append(dict(zip(names, rest, strict=False)))
            del rest[: len(names)]
        weights, held, inputs = trees
        key, *batch = rest

        def loss(weights, held, inputs, key, x, y, *weight):
            whole = Batch(x, y, *(weight or (None,)))
            return self.program.loss(self.net, weights | held, whole, Noise(key), inputs)

        gradient = grad_and_value(loss, has_aux=True)
        if self.clients:
            gradient = vmap(gradient)
        grads, (value, _) = gradient(weights, held, inputs, key, *batch)
        return [*(grads[name] for name in weights), value]


def chosen(active_K: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where a client is active, of `old` where it is not."""
    return torch.where(active_K.view(-1, *[1] * (new.dim() - 1)), new, old)
