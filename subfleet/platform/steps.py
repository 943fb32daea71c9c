"""One step of a loss program, gradient and update, as a flat list of kernels.

For one client or for many side by side. Without clipping and proximal terms, gradients that
are products of matrices come as their factors: the product adds into the weights, or the
velocity, and no such gradient is ever stored. Nor are, of clients that see few rows, the
weights of large dense layers (`subfleet.platform.factors`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from subfleet.core.errors import RunFailed
from subfleet.core.lowrank import LowRank
from subfleet.core.program import Batch, LossProgram, Noise, Params
from subfleet.platform import factors, kernels, rule
from subfleet.platform.compiling import compiled
from subfleet.platform.factors import Factored, OfData
from subfleet.platform.feed import Feed
from subfleet.platform.resident import Resident, finite
from subfleet.platform.traces import Flat, traced


class Stepper:
    """Steps of clients of one variant, in place; `clients` where tensors have them as axis 0.

    `weights` are the trainable tensors, `held` the others, `inputs` those of the tasks, by
    name. The velocity and the start that the local rule needs begin with the weights as
    they are at the first step.
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
        self.weights: dict[str, Tensor | Factored] = dict(weights)
        self._names = tuple(tuple(tree) for tree in (weights, held, inputs))
        self._others = [*held.values(), *inputs.values()]
        self._shapes = tuple(tuple(leaf.shape) for leaf in (*weights.values(), *self._others))
        local = program.rule
        self._fuses = local.clip_norm is None and not local.proximal
        self._factored: frozenset[int] = frozenset()
        self._of_data: frozenset[int] = frozenset()
        self._begun = False

    def factor(
        self,
        bases: Params,
        rows: int,
        most: int,
        key: Tensor,
        batch: Sequence[Tensor],
        feed: Feed | None = None,
    ) -> list[str]:
        """Holds as factors those weights for which that pays, before the first step.

        `bases` are the starts that all clients share, without an axis of clients, `rows` those
        of all steps to come, `most` the same of a client that trains as long as it should, and
        (`key`, `batch`) such a step; `feed` has those of all steps, of clients side by side.
        Gives the names.
        """
        choice = self.net.choice
        if not choice.factored or choice.compiled or self.program.rule.clip_norm is not None:
            return []
        worth = {
            place
            for place, (name, weight) in enumerate(self._written().items())
            if name in bases
            and bases[name].dim() == 2
            and most <= min(bases[name].shape)
            and weight.numel() >= factors.LEAST
        }
        if not worth:
            return []
        flat = self._flat(key, batch, worth, loose=self._fuses)
        names, size = list(self.weights), batch[0].shape[int(self.clients)]
        each: dict[int, int] = {}  # rows that a layer sees of an example: its steps of time
        for place in sorted(flat.held):
            count, rest = divmod(flat.products[place], size)
            if not rest and most * count <= min(bases[names[place]].shape):
                each[place] = count
        self._factored = frozenset(each)
        if feed is not None and flat.of_data & self._factored:
            self._of_data = self._on_data(key, feed, batch[0])
        local, library = self.program.rule, choice.products
        clients = len(batch[0]) if self.clients else None
        x_KR = feed.whole() if feed is not None and self._of_data else None
        for place, count in each.items():
            base = bases[names[place]]
            self.weights[names[place]] = (
                Factored(base, clients, rows * count, local, library)
                if x_KR is None or place not in self._of_data
                else OfData(base, x_KR, size * count, local, library)
            )
        return [names[place] for place in each]

    def _on_data(self, key: Tensor, feed: Feed, x: Tensor) -> frozenset[int]:
        """Those held as factors that multiply the data alone, if steps of all forms agree."""
        found = {
            self._flat(key, batch, self._factored, loose=self._fuses and whole).of_data
            for batch, whole in feed.forms(x)
        }
        return found.pop() if len(found) == 1 else frozenset()

    def plain_step(self, noise: Noise, batch: Batch) -> Tensor:
        """One step of a single client through autograd, in the network's own buffers."""
        self._begin()
        with torch.enable_grad():
            loss, _ = self.program.loss(self.net, self.net.params, batch, noise, self.inputs)
        self._update(kernels.gradients(loss, self.net.leaves, self.net.one))
        return loss.detach()

    def step(
        self, key: Tensor, batch: Sequence[Tensor], active: np.ndarray | None = None
    ) -> Tensor:
        """One traced step on (x, y) or (x, y, weight of each row); the loss, [K] for clients.

        `active`, bool [K], says which clients still have this step; None for all.
        """
        self._begin()
        loose = self._fuses and active is None
        flat = self._flat(key, batch, self._factored, loose=loose)
        if flat.held != self._factored or (self._of_data and flat.of_data != self._of_data):
            raise RunFailed(
                "the clients' loss does one thing with a weight, or with the data, in one step and "
                'another in another; set run.engine = "loop"'
            )
        *found, loss = flat.run(*self.weights.values(), *self._others, key, *batch)
        left, kept, products = iter(found), [], []
        for weight, product in zip(self.weights.values(), flat.products, strict=False):
            if isinstance(weight, Factored):
                weight.add(next(left), next(left), active)
            else:
                kept += [next(left) for _ in range(2 if product else 1)]
                products.append(product)
        if not self._dense:
            return loss
        if loose:
            self._add(kept, products)
        elif active is None:
            self._update(kept)
        else:
            before = [w.clone() for w in self._dense]
            self._update(kept)
            which = torch.from_numpy(active).to(self.net.device)
            for weight, old in zip(self._dense, before, strict=True):
                weight.copy_(chosen(which, weight, old))  # finished clients keep every bit
        return loss

    @property
    def has_data(self) -> bool:
        """Whether a step no longer looks at the inputs that it is given."""
        return bool(self._of_data)

    def own(self, names: Collection[str]) -> None:
        """Gives weights that are not held as factors memory of their own, before the first step."""
        for name in names:
            if isinstance(weight := self.weights[name], Tensor):
                self.weights[name] = weight.clone(memory_format=torch.contiguous_format)

    def finish(self, count: int = 1) -> list[bool]:
        """After the last step: which of `count` clients have no NaN or infinity in a weight."""
        held = np.ones(count, bool)
        for weight in self.weights.values():
            if isinstance(weight, Factored):
                held &= weight.finish()
        dense = [weight for weight in self.weights.values() if isinstance(weight, Tensor)]
        if finite(dense):  # one look at all of them; at each only where that fails
            return held.tolist()
        if not self.clients:
            return [False]
        return [bool(ok) and finite([w[k] for w in dense]) for k, ok in enumerate(held)]

    def trained(self, client: int = 0) -> tuple[Params, dict[str, LowRank]]:
        """The weights of one of the clients: those that are written out, and the others."""
        written: Params = {}
        held: dict[str, LowRank] = {}
        for name, weight in self.weights.items():
            if isinstance(weight, Factored):
                held[name] = weight[client]
            else:
                written[name] = weight[client] if self.clients else weight
        return written, held

    def _written(self) -> Params:
        """Tensors of the weights' shapes."""
        return {
            name: weight.example() if isinstance(weight, Factored) else weight
            for name, weight in self.weights.items()
        }

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self._dense = [weight for weight in self.weights.values() if isinstance(weight, Tensor)]
        local = self.program.rule
        self._velocity = [torch.zeros_like(w) for w in self._dense] if local.momentum else None
        self._start = [w.clone() for w in self._dense] if local.proximal else None

    def _update(self, grads: Sequence[Tensor]) -> None:
        rule.step(
            *(self.program.rule, self._dense, grads, self._velocity, self._start),
            clients=self.clients,
        )

    def _add(self, found: Sequence[Tensor], products: Sequence[int]) -> None:
        """With momentum v <- m v + g + d w; w <- w - lr v. Else w <- (1 - lr d) w - lr g.

        `found` holds a gradient, or the two factors of one, for each weight that is written out.
        """
        local, left = self.program.rule, iter(found)
        into, scale, keep = self._dense, -local.lr, 1.0 - local.lr * local.weight_decay
        if self._velocity is not None:
            into, scale, keep = self._velocity, 1.0, local.momentum
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
        if self._velocity is not None:
            if local.weight_decay:
                kernels.add_(self._velocity, self._dense, alpha=local.weight_decay)
            kernels.add_(self._dense, self._velocity, alpha=-local.lr)

    def _flat(
        self, key: Tensor, batch: Sequence[Tensor], held: Collection[int], *, loose: bool
    ) -> Flat:
        shapes = tuple((leaf.shape, leaf.stride()) for leaf in batch)
        known = (self.program.loss, self.clients, self._shapes, shapes, loose, frozenset(held))
        return self.net.traces.get(known, lambda: self._traced(key, batch, held, loose=loose))

    def _traced(
        self, key: Tensor, batch: Sequence[Tensor], held: Collection[int], *, loose: bool
    ) -> Flat:
        """The step's gradient; compiled where that was chosen and the batch is a whole one."""
        choice = self.net.choice
        leaves = [*self._written().values(), *self._others, key, *batch]
        full = not self.clients or len(batch[0]) == choice.side_by_side
        compiles = choice.compiled and loose and full and len(batch) == 2  # no weights of rows
        flat = traced(
            *(self._gradient, leaves),
            range(len(self.weights)) if loose else held,
            held=held,
            data=len(self.weights) + len(self._others) + 1,  # after the key
            library=choice.products,
            eager=not compiles,
        )
        return compiled(flat, leaves) if compiles else flat

    def _gradient(self, *leaves: Any) -> Sequence[Tensor]:
        """The gradient at each weight, and the loss, from all leaves of a step."""
        rest, trees = list(leaves), []
        for names in self._names:
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
