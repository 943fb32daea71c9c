"""Training a network so that every width of it works: US-Net's sandwich, a client's program.

Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from subfleet.algorithms.local import mean_cross_entropy, sgd
from subfleet.core import seeds
from subfleet.core.budget import width_counts, width_map
from subfleet.core.program import (
    Batch,
    ClientResult,
    LocalRule,
    Net,
    Noise,
    Params,
    StepProgram,
    Stream,
)
from subfleet.core.supernet import SuperNetwork

Units = Mapping[str, int]
"""How many units of each group a sub-network has, always the first."""

WHOLE: Units = {}


@dataclass(frozen=True)
class Sandwich:
    """Each step trains the whole network, the narrowest, and some widths between.

    The whole network learns the labels, the others what it then says (in-place distillation):

        y'  = softmax f_1(x), held fixed
        g   = grad [ CE(f_1(x), y) + sum_{m < 1} - sum_c y'_c log softmax(f_m(x))_c ]
        w  <- one step of SGD along g: a sum, not a mean over the widths

    `count` widths a step, of which `count` - 2 are drawn from U(`narrowest`, 1); one such
    draw is for all groups, or, with probability 1/2 where `mixed`, each group has its own.
    Widths are shapes, so that all clients of a round draw the same at the same step.
    BatchNorm takes the batch's statistics and keeps none: those of one width are wrong for
    another.
    """

    net: SuperNetwork
    rule: LocalRule
    seed: int
    round: int
    narrowest: float = 0.35
    count: int = 4
    mixed: bool = True

    def program(self, stream: Stream) -> StepProgram:
        """The program of a client over its batches."""
        return StepProgram(
            self.init,
            self.step,
            self.final,
            {"train": stream},
            kind=lambda step: step,
            passes=self.passes,
        )

    @property
    def passes(self) -> float:
        """What a step costs, in passes of the whole network; of drawn widths the middle one."""
        whole = self.net.cost().macs

        def share(width: float) -> float:
            return self.net.cost(width_map(self.net, width)).macs / whole

        middle = (1 + self.narrowest) / 2
        return 1 + share(self.narrowest) + (self.count - 2) * share(middle)

    def widths(self, step: int) -> list[Units]:
        """The sub-networks of a step after the whole one."""
        draw = seeds.generator(self.seed, f"widths of step {step}", round=self.round)
        narrow = width_counts(self.net, self.narrowest)
        return [narrow, *(self._drawn(draw) for _ in range(self.count - 2))]

    def _drawn(self, draw: np.random.Generator) -> Units:
        groups = self.net.elastic
        apart = self.mixed and draw.random() < 0.5
        shares = draw.uniform(self.narrowest, 1.0, len(groups) if apart else 1)
        return {
            group: max(1, math.ceil(share * self.net.space.size(group)))
            for group, share in zip(groups, np.broadcast_to(shares, len(groups)), strict=True)
        }

    def init(self, net: Net, params: Params, kept: Params | None, inputs: Params) -> dict[str, Any]:
        """The weights, and no velocity yet."""
        del net, kept, inputs
        weights = {n: value for n, value in params.items() if n not in self.net.statistics}
        return {"weights": weights, "velocity": {n: w * 0.0 for n, w in weights.items()}}

    def step(
        self,
        net: Net,
        local: dict[str, Any],
        batch: Mapping[str, Batch],
        noise: Noise,
        inputs: Params,
        kind: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One batch; the loss is that of the whole network. `kind` is the step's number."""
        del noise, inputs
        weights, given = local["weights"], batch["train"]

        def labels(params: Params) -> tuple[Tensor, Tensor]:
            scores = net.at(WHOLE)(params, given.x)
            return mean_cross_entropy(scores, given), F.softmax(scores, dim=1).detach()

        total, loss, taught = net.gradient(labels, weights)
        for units in self.widths(kind):

            def echo(params: Params, units: Units = units) -> tuple[Tensor, Tensor]:
                value = distilled(net.at(units)(params, given.x), taught, given)
                return value, value

            found, _, _ = net.gradient(echo, weights)
            total = {name: grad + found[name] for name, grad in total.items()}
        weights, velocity = sgd(self.rule, weights, total, local["velocity"])
        return {"weights": weights, "velocity": velocity}, {"loss": loss}

    def final(self, net: Net, local: dict[str, Any], inputs: Params) -> ClientResult:
        """Uploads the weights; there are no statistics to keep."""
        del net, inputs
        return ClientResult(local["weights"])


def distilled(scores: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """Mean over the rows of - sum_c taught_c log softmax(scores)_c; both [B, classes].

    Its gradient with respect to the scores of a row is (softmax(scores) - taught) / B.
    """
    return batch.mean(-(taught * F.log_softmax(scores, dim=1)).sum(1))
