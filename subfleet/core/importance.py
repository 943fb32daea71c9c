"""How much a unit matters: by its norm's scale, its activation, or its relevance.

"slim" is the magnitude of the BatchNorm scale behind a unit (as in network slimming), and
the mean activation where there is no such norm; "lrp" the layer-wise relevance for the true
class (`subfleet.core.relevance`), both as ADDS has them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from subfleet.core import relevance
from subfleet.core.errors import InputError
from subfleet.core.program import Batch, Net, Params
from subfleet.core.supernet import SuperNetwork
from subfleet.core.unit_rows import UnitRows
from subfleet.core.watching import Passed, watched

Kind = Literal["slim", "lrp"]

MOMENTUM = 0.9  # of the running means, over a client's steps


class Importance:
    """Importances b [G, C] of the units of all groups.

    `passes` [G, C] is what is known of what units pass on: for "lrp" the batch's relevance,
    for "slim" running means of activations. A step calls `looked_at` before it asks for `of`,
    and `after` with what went through the layers as it trained. What is no unit's is 0.
    """

    def __init__(self, net: SuperNetwork, kind: Kind, normalise: Literal["max", "none"]):
        self.net, self.kind, self.normalise = net, kind, normalise
        self.rows = UnitRows(net)

    @cached_property
    def watches(self) -> bool:
        """Whether some unit's importance is its activation."""
        return self.kind == "slim" and len(self.rows.scales) < len(self.rows.groups)

    def of(self, params: Params, passes: Tensor) -> Tensor:
        """B [G, C]; with `normalise` "max" each group's largest is 1."""
        if self.kind == "slim":
            scales = {g: params[name].abs() for g, name in self.rows.scales.items()}  # |gamma|
            passes = self.rows.stacked(scales, like=passes)
        if self.normalise == "none":
            return passes
        return passes / passes.amax(1, keepdim=True).clamp(min=torch.finfo(passes.dtype).tiny)

    def looked_at(self, net: Net, params: Params, passes: Tensor, batch: Batch) -> Tensor:
        """|Mean over a batch's rows of each unit's relevance| for "lrp" (11)."""
        if self.kind != "lrp":
            return passes
        scores, passed = net.watched(self.aside(params), batch.x)
        true = torch.zeros_like(scores).scatter(1, batch.y.unsqueeze(1), 1.0)
        found = self.rows.passed_on(relevance.backwards(passed, params, scores * true))
        owed = {g: _mean(r.sum(2), batch).abs() for g, r in found.items()}
        return self.rows.stacked(owed, like=passes).detach()

    def after(self, passes: Tensor, passed: list[Passed], batch: Batch, step: Tensor) -> Tensor:
        """The running means with each unit's mean activation over rows and positions.

        `step` counts from 0: the first mean is the first batch's.
        """
        found = self.rows.passed_on((one, one.input) for one in passed)
        means = {g: _mean(a.abs().mean(2), batch) for g, a in found.items()}
        now = self.rows.stacked(means, like=passes).detach()
        # m_t = (1 - 0.9) sum_i 0.9^(t-i) a_i / (1 - 0.9^t)
        return passes + (now - passes) * (1 - MOMENTUM) / (1 - MOMENTUM ** (step + 1))

    def aside(self, params: Params) -> Params:
        """The same, with copies of the BatchNorm statistics that a mere look would move."""
        statistics = self.net.statistics
        return {name: v.clone() if name in statistics else v for name, v in params.items()}

    def refuse_unknown(self) -> None:
        """`InputError` where some unit's importance cannot be told; tried without computing."""
        # Constants, such as frozen word vectors, come with their values: they move last.
        module = self.net.module(device="meta").eval().to("meta")
        x = self.net.example(2, device="meta")
        scores, passed = watched(module, lambda: module(x))
        if self.kind == "lrp":
            params = dict(module.named_parameters())
            known = {*self.rows.passed_on(relevance.backwards(passed, params, scores))}
        else:
            known = {*self.rows.passed_on((p, p.input) for p in passed), *self.rows.scales}
        missing = [group for group in self.rows.groups if group not in known]
        if missing:
            remedy = 'use "slim"' if self.kind == "lrp" else 'give them a BatchNorm, or use "lrp"'
            raise InputError(
                f'algorithm.importance="{self.kind}" cannot tell how much units of '
                f"{', '.join(missing)} matter in model {self.net.name!r}; {remedy}"
            )


def _mean(per_row: Tensor, batch: Batch) -> Tensor:
    """[B, C] -> [C], the mean over a batch's real rows."""
    if batch.weight is None:
        return per_row.mean(0)
    return (per_row * batch.weight.unsqueeze(1)).sum(0) / batch.weight.sum().clamp(min=1.0)
