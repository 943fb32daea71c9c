"""Weights of a dense layer that K clients train side by side and nobody writes out.

All begin with the same W [O, I], and a client's steps see few rows: its weights are W and a
product of thin factors (`subfleet.core.lowrank`), the gradients at the layer's outputs and its
inputs, row by row. A step then multiplies by W for all clients at once, and by the factors of
the rows that came before; where the rows are fewer than W is wide, that is less to read and
nothing to update.

Legend: K clients, B rows a batch, R rows of all steps, H rows so far, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from subfleet.core.lowrank import LowRank
from subfleet.core.program import LocalRule
from subfleet.platform import products
from subfleet.platform.graphs import RESHAPES, TRANSPOSES, Node, aten, swaps_last

LEAST = 1 << 19  # weights of all clients at once, below which more kernels cost what they save
_TOGETHER = 24  # rows of several steps that meet all rows before them in one product


class Factored:
    """scale_k W + sum_r c_kr g_kr x_kr^T for each client k; calls take [K, B, ...] or [B, ...]."""

    def __init__(
        self,
        base_OI: Tensor,
        clients: int | None,
        rows: int,
        rule: LocalRule,
        library: products.Library,
        right_KRI: Tensor | None = None,
    ):
        """`right_KRI` are the inputs of all steps, where they are known before the first."""
        (outputs, inputs), count = base_OI.shape, clients or 1
        self.base_OI, self.clients, self._rule = base_OI, clients, rule
        self.left_KRO = base_OI.new_empty(count, rows, outputs)
        if right_KRI is None:
            right_KRI = base_OI.new_empty(count, rows, inputs)
        self.right_KRI = right_KRI
        self._bases: dict[torch.dtype, Tensor] = {}
        self._linear, self._outer = products.linear(library), products.outer(library)
        self._rows = 0  # H
        # The local rule, played on how often W and each row count: of the weights, the velocity.
        self._scale_K, self._scale_velocity_K = np.ones(count), np.zeros(count)
        self._count_KR, self._velocity_KR = np.zeros((count, rows)), np.zeros((count, rows))
        self._count_K1H = base_OI.new_empty(count, 1, 0)
        self._scale_K11: Tensor | None = None  # where it is not 1

    def example(self) -> Tensor:
        """A tensor of the shape that the weights have when they are written out."""
        clients = () if self.clients is None else (self.clients,)
        return self.base_OI.expand(*clients, *self.base_OI.shape)

    def outputs(self, x: Tensor) -> Tensor:
        """`x W_k^T`: [K, B, O] from [K, B, I]."""
        return self._times(x, self._base(x), self.right_KRI, self.left_KRO)

    def inputs(self, g: Tensor) -> Tensor:
        """`g W_k`: [K, B, I] from [K, B, O]."""
        return self._times(g, self._base(g).t(), self.left_KRO, self.right_KRI)

    def _base(self, x: Tensor) -> Tensor:
        """W in the type of what it is multiplied by: bfloat16 under autocast."""
        if x.dtype not in self._bases:
            self._bases[x.dtype] = self.base_OI.to(x.dtype)
        return self._bases[x.dtype]

    def _times(self, x: Tensor, base: Tensor, met_KR: Tensor, gives_KR: Tensor) -> Tensor:
        shape = (*x.shape[:-1], len(base))
        found = self._linear(x.reshape(-1, x.shape[-1]), base).view(len(met_KR), -1, len(base))
        x_KB = x.reshape(len(met_KR), -1, x.shape[-1]).float()
        alike = torch.bmm(x_KB, met_KR[:, : self._rows].transpose(1, 2)) if self._rows else None
        return self._moved(found.float(), alike, gives_KR).view(shape).to(x.dtype)

    def _moved(self, found_KB: Tensor, alike_KBH: Tensor | None, gives_KR: Tensor) -> Tensor:
        """A product with W, which it may write to, and what the rows so far have changed of it."""
        if self._scale_K11 is not None:
            found_KB.mul_(self._scale_K11)
        if alike_KBH is not None:
            found_KB.baddbmm_(alike_KBH * self._count_K1H, gives_KR[:, : self._rows])
        return found_KB

    def add(self, left: Tensor, right: Tensor, active: np.ndarray | None) -> None:
        """A step: the gradient is `left right`, [K, O, B] and [K, B, I]; `active` bool [K]."""
        first, self._rows = self._rows, self._rows + right.shape[-2]
        rows = slice(first, self._rows)
        if (more := self._rows - self.left_KRO.shape[1]) > 0:
            self._grow(more)
        which = None  # what padding made may be no number
        if active is not None:
            which = torch.from_numpy(active).to(left.device).view(-1, 1, 1)
            left = torch.where(which, left, 0.0)
        self.left_KRO[:, rows] = left.transpose(-1, -2)
        self._keep(rows, right, which)
        self._count(rows, slice(None) if active is None else active)

    def _keep(self, rows: slice, right: Tensor, which: Tensor | None) -> None:
        self.right_KRI[:, rows] = right if which is None else torch.where(which, right, 0.0)

    def _grow(self, more: int) -> None:
        """For steps of more rows than there are examples in their batch promised."""
        self.left_KRO, self.right_KRI = (
            torch.cat([held, held.new_empty(len(held), more, held.shape[2])], dim=1)
            for held in (self.left_KRO, self.right_KRI)
        )
        self._count_KR, self._velocity_KR = (
            np.pad(held, ((0, 0), (0, more))) for held in (self._count_KR, self._velocity_KR)
        )

    def _count(self, rows: slice, who: slice | np.ndarray) -> None:
        """Of the clients `who`: v <- m v + g + d w + mu (w - w_start);  w <- w - lr v."""
        rule, pull = self._rule, self._rule.weight_decay + self._rule.proximal
        velocity = rule.momentum * self._velocity_KR[who] + pull * self._count_KR[who]
        velocity[:, rows] += 1.0
        self._velocity_KR[who] = velocity
        self._count_KR[who] -= rule.lr * velocity
        self._count_K1H = self._on_device(self._count_KR[:, None, : self._rows])
        if pull:
            scale = self._scale_K[who]
            moved = rule.momentum * self._scale_velocity_K[who]
            moved = moved + rule.weight_decay * scale + rule.proximal * (scale - 1.0)
            self._scale_velocity_K[who] = moved
            self._scale_K[who] = scale - rule.lr * moved
            self._scale_K11 = self._on_device(self._scale_K[:, None, None])

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.base_OI.device)

    def finish(self) -> np.ndarray:
        """After the last step: the rows' counts go into the factors.

        Bool [K]: which clients have no NaN or infinity there, nor can have in the product.
        """
        self.left_KRO = self.left_KRO[:, : self._rows].mul_(self._count_K1H.transpose(1, 2))
        self.right_KRI = self.right_KRI[:, : self._rows]
        norms = torch.linalg.vector_norm(self.left_KRO, dim=(1, 2))
        norms = norms * torch.linalg.vector_norm(self.right_KRI, dim=(1, 2))
        self._each = list(zip(self.left_KRO.unbind(), self.right_KRI.unbind(), strict=True))
        return torch.isfinite(norms).cpu().numpy()

    def __getitem__(self, client: int) -> LowRank:
        """One client's weights."""
        scale = float(self._scale_K[client])
        return LowRank(self.base_OI, scale, *self._each[client], self._outer)


class OfData(Factored):
    """A layer whose inputs are the data: W and the rows meet once, before the first step.

    `x_KR` [K, R, ...] are the rows of all steps, `step` of them in each; what `outputs` is given
    is not looked at.
    """

    def __init__(
        self, base_OI: Tensor, x_KR: Tensor, step: int, rule: LocalRule, library: products.Library
    ):
        rows_KRI = x_KR.reshape(len(x_KR), -1, base_OI.shape[1])
        count, rows, inputs = rows_KRI.shape
        super().__init__(base_OI, count, rows, rule, library, rows_KRI)
        self._step = step
        found = self._linear(rows_KRI.reshape(-1, inputs), base_OI)
        self._found_KRO = found.view(count, rows, len(base_OI))
        self._alike_KRR = self._alike()

    def _alike(self) -> Tensor:
        """The products of each row with those of the steps before; the rest is not written."""
        x_KRI, step = self.right_KRI, self._step
        count, rows, _ = x_KRI.shape
        alike_KRR = x_KRI.new_empty(count, rows, rows)
        together = max(1, _TOGETHER // step) * step
        for first in range(step, rows, together):
            these = slice(first, min(first + together, rows))
            before = slice(these.stop - step)
            alike_KRR[:, these, before] = torch.bmm(
                x_KRI[:, these], x_KRI[:, before].transpose(1, 2)
            )
        return alike_KRR

    def outputs(self, x: Tensor) -> Tensor:
        """`x W_k^T` of the next step's rows."""
        rows = slice(self._rows, self._rows + self._step)
        alike = self._alike_KRR[:, rows, : self._rows] if self._rows else None
        found = self._found_KRO[:, rows].clone(memory_format=torch.contiguous_format)
        return self._moved(found, alike, self.left_KRO).view(*x.shape[:-1], -1)

    def _keep(self, rows: slice, right: Tensor, which: Tensor | None) -> None:
        """They have been there from the start."""


# -- in traced graphs


def only_multiplied(weight: Node) -> bool:
    """Whether a graph does nothing with a weight but multiply by it, from the right."""
    for user in weight.users:
        if _is_cast(user) or (user.target in TRANSPOSES and swaps_last(user)):
            if not only_multiplied(user):
                return False
        elif (
            _second(user) is not weight
            or weight in user.args[:-1]
            or weight in user.kwargs.values()
        ):
            return False
    return bool(weight.users)


def _is_cast(node: Node) -> bool:
    return node.target is aten._to_copy.default and node.kwargs.keys() == {"dtype"}


def _second(node: Node) -> Node | None:
    """The right factor of a product of matrices; None of anything else."""
    if node.target in (aten.mm.default, aten.bmm.default):
        return node.args[1]
    if node.target is aten.addmm.default and not node.kwargs:
        return node.args[2]
    return None


def multiply(module: GraphModule, places: Collection[int]) -> frozenset[int]:
    """Let a graph take a `Factored` as inputs of these numbers, if it only multiplies by them.

    The numbers of those that it does.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = frozenset(place for place in places if only_multiplied(inputs[place]))
    for place in found:
        _replace(module, inputs[place], inputs[place], transposed=False)
    module.graph.eliminate_dead_code()
    module.recompile()
    return found


def _replace(module: GraphModule, weight: Node, found: Node, *, transposed: bool) -> None:
    for user in list(found.users):
        if user.target in TRANSPOSES or _is_cast(user):
            turned = transposed ^ (user.target in TRANSPOSES)
            _replace(module, weight, user, transposed=turned)
            continue
        *bias, x, _ = user.args
        with module.graph.inserting_before(user):
            new = module.graph.call_method("outputs" if transposed else "inputs", (weight, x))
            new.meta = dict(user.meta)
            if bias:
                new = module.graph.call_function(aten.add.Tensor, (new, *bias))
                new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        module.graph.erase_node(user)


def of_data(module: GraphModule, held: Collection[int], data: int) -> frozenset[int]:
    """Of the `Factored` inputs `held`, those that multiply the input `data`, reshaped or not.

    None where the graph does anything else with that, or multiplies anything else by them.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    weights, end = {inputs[place]: place for place in held}, module.graph.output_node()
    pending, found = [inputs[data]], set()
    while pending:
        for user in pending.pop().users:
            if user.target in RESHAPES:
                pending.append(user)
            elif user.target == "outputs" and user.args[0] in weights:
                if len(user.args[0].users) > 1:
                    return frozenset()
                found.add(weights[user.args[0]])
            elif user is not end:  # which returns it as a factor of the gradient
                return frozenset()
    return frozenset(found)
