"""ADDS: every client learns, by gradient, how much of each layer to keep.

"ADDS: Adaptive Differentiable Sampling for Robust Multi-Party Learning". A client gets
the whole super-network. While it trains the weights it learns a keep ratio for each unit
group, on rows that the weights do not see, and returns the sub-network of its most
important units, which the server averages unit by unit.

Legend: G groups of at most C units. Masks act where units are read
(`subfleet.core.masks`): a unit's derivative is that of its activation, also while dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from subfleet.algorithms.local import cross_entropy, mean_cross_entropy, sgd
from subfleet.core import keep_ratio, masks
from subfleet.core.algorithm import FULL, Algorithm, Cohort, Phase, RoundPlan, State
from subfleet.core.bindings import Binding
from subfleet.core.errors import InputError
from subfleet.core.importance import Importance, Kind
from subfleet.core.program import (
    Batch,
    ClientResult,
    ClientTask,
    LocalRule,
    Net,
    Noise,
    Params,
    StepProgram,
)
from subfleet.core.skew import njsd
from subfleet.core.unit_rows import UnitRows
from subfleet.core.units import IndexMap

SHRINK = 0.95  # of all keep ratios together, until a tier's budget holds

Local = dict[str, Any]
"""A client at work: `params`, `velocity`, `ratio` [G], `passes` and `drawn` [G, C], `step`."""


@dataclass(frozen=True)
class ADDS(Algorithm):
    """Bilevel training of weights w and keep ratios alpha, and the indexed mean of what is kept.

        min_alpha  F_val(w*(alpha), alpha) + lambda sum_g alpha_g^2,  w* = argmin_w F_train  (4-6)

    A tier's budget caps what its clients return, not what they train or download. A client
    with a single row validates on the row that it trains on. With BatchNorm, which needs two
    rows, a client that has but one to validate on has the penalty alone to move its alpha.

    Options:
        importance: "slim" takes a unit's BatchNorm scale, its mean activation where there is
            none; "lrp" its layer-wise relevance.
        normalise: "max" divides a group's importances by their largest; "none" does not.
        ratio: In [least_ratio, 1]: where alpha begins in every round.
        least_ratio: In (0, 1]: where alpha ends at the lowest.
        persist: Whether alpha goes on from where the client left it, from its second round on.
        arch_lr: The rate of alpha's steps, 0 or more.
        epsilon: How inexact sampling is in round 1, from 1e-6 up; near 0 only the most important
            units are drawn.
        epsilon_decay: In (0, 1]: what epsilon is multiplied by each round.
        penalty: Lambda, 0 or more; without it NJSD + 0.5 of the client's labels.
        validation: In (0, 1): the share of a client's training rows that alpha is learnt on.
        resample: Whether a step of w draws its units anew, by the alpha just moved.
        architecture: "top" returns the most important units, alpha C of a group; "drawn" those
            of the last draw.
        weighting: How clients count in the mean: "uniform" all alike, "samples" by their rows.
    """

    importance: Kind = "slim"
    normalise: Literal["max", "none"] = "max"
    ratio: float = 1.0
    least_ratio: float = 0.05
    persist: bool = False
    arch_lr: float = 0.02
    epsilon: float = 1.0
    epsilon_decay: float = 0.98
    penalty: float | None = None
    validation: float = 0.1
    resample: bool = False
    architecture: Literal["top", "drawn"] = "top"
    weighting: Literal["uniform", "samples"] = "uniform"

    paper: ClassVar[str] = "ADDS (adaptive differentiable sampling)"

    def __post_init__(self) -> None:
        self._check("least_ratio", 0 < self.least_ratio <= 1, "(0, 1]")
        self._check(
            "ratio",
            self.least_ratio <= self.ratio <= 1,
            f"[{self.least_ratio}, 1], from algorithm.least_ratio on",
        )
        self._check("arch_lr", self.arch_lr >= 0, "[0, inf)")
        least = keep_ratio.LEAST_EPSILON
        self._check("epsilon", self.epsilon >= least, f"[{least:g}, inf)")
        self._check("epsilon_decay", 0 < self.epsilon_decay <= 1, "(0, 1]")
        self._check("penalty", self.penalty is None or self.penalty >= 0, "[0, inf)")
        self._check("validation", 0 < self.validation < 1, "(0, 1)")
        if not self._rows.groups:
            raise InputError(
                f"model {self.setting.net.name!r} has no units to sample, which is what adds does; "
                "choose a model with hidden channels or neurons, or another algorithm"
            )
        masks.refuse_joint_norms(self.setting.net, "adds")
        self._matter.refuse_unknown()
        self._refuse_small_budgets()

    def _check(self, name: str, holds: bool, bounds: str) -> None:
        if not (holds and math.isfinite(getattr(self, name) or 0.0)):
            raise InputError(
                f"algorithm.{name}={getattr(self, name)} is outside {bounds}; "
                f"give {getattr(type(self), name) or 0.5}, say"
            )

    def _refuse_small_budgets(self) -> None:
        net = self.setting.net
        least = IndexMap.prefix(dict.fromkeys(self._rows.groups, 1))
        for tier in self.setting.tiers:
            for name, cost, limit in tier.over(net, least):
                raise InputError(
                    f"fleet tier {tier.name!r}: {name}={limit:,} is below the smallest "
                    f"sub-network of {net.name!r}, {cost:,}; give it at least that"
                )

    @cached_property
    def _rows(self) -> UnitRows:
        return self._matter.rows

    @cached_property
    def _matter(self) -> Importance:
        return Importance(self.setting.net, self.importance, self.normalise)

    # --- the server --------------------------------------------------------------------------

    def views(self, state: State) -> dict[str, IndexMap]:
        """The whole network: what a tier's clients keep of it is their own."""
        return dict.fromkeys(super().views(state), FULL)

    def phase(self, round: int) -> Phase:
        """One phase; the validation rows are drawn anew each round."""
        stream = self.setting.stream
        share = self.validation
        streams = {
            "train": replace(stream, redraw="round", skip=share, take=1 - share),
            "val": replace(stream, redraw="round", take=share, epochs=1, steps=None),
        }
        rule = self.setting.rule.at(round)
        step = partial(self._step, rule)
        program = StepProgram(self._init, step, self._final, streams, passes=self._passes)
        return Phase("train", program, wants_labels=True)

    @property
    def _passes(self) -> float:
        """One for alpha on the validation rows and one for w, both of the whole masked network.

        Relevance is a third: a forward pass, and in each layer but the first another and its
        derivative.
        """
        return 3.0 if self.importance == "lrp" else 2.0

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Everybody gets the whole super-network, and returns what it keeps of it."""
        net, params = self.setting.net, state["params"]
        assert cohort.label_counts is not None
        # lambda_i = Norm(JSD(p_i || u)) + 0.5,  epsilon_t = epsilon_0 * decay^t
        lambdas = njsd(cohort.label_counts) + 0.5
        if self.penalty is not None:
            lambdas = np.full(len(cohort.id), self.penalty)
        epsilon = torch.tensor(self.epsilon * self.epsilon_decay ** (round - 1))
        variant = net.space.counts(FULL)
        sent = 4 * net.space.cut_numel(params, FULL) + 4  # all parameters, and epsilon
        tasks = []
        for i, client in enumerate(cohort.id.tolist()):
            samples, tier = int(cohort.num_samples[i]), int(cohort.tier[i])
            inputs = {
                "lambda": torch.tensor(lambdas[i]),
                "epsilon": epsilon,
                "ratio": self._first_ratio(cohort.report[i]),
                "tier": torch.tensor(tier),
            }
            weight = 1.0 if self.weighting == "uniform" else float(samples)  # a_k, (19)
            tasks.append(
                ClientTask(client, FULL, variant, weight, samples, tier, inputs, bytes_down=sent)
            )
        return RoundPlan(tasks, {0: params})

    def _first_ratio(self, report: dict[str, Any] | None) -> Tensor:
        if self.persist and report is not None and "ratio" in report:
            return torch.tensor([report["ratio"][group] for group in self._rows.groups])
        return torch.full((len(self._rows.groups),), self.ratio)

    # --- one client --------------------------------------------------------------------------

    def _init(self, net: Net, params: Params, kept: Params | None, inputs: Params) -> Local:
        del net, kept
        # The optimiser begins anew in every round.
        weights = {name: params[name] for name in params if name in self.setting.net.parameters}
        nothing = inputs["ratio"].new_zeros(self._rows.real.shape)
        return {
            "params": params,
            "velocity": {name: torch.zeros_like(weight) for name, weight in weights.items()},
            "ratio": inputs["ratio"],
            "passes": nothing,
            "step": nothing.new_zeros(()),
            "drawn": nothing + self._rows.real.to(nothing.device),
        }

    def _step(
        self,
        rule: LocalRule,
        net: Net,
        local: Local,
        given: dict[str, Batch],
        noise: Noise,
        inputs: Params,
    ) -> tuple[Local, dict[str, Tensor]]:
        params, ratio, passes = local["params"], local["ratio"], local["passes"]
        real = self._rows.real.to(ratio.device)
        passes = self._matter.looked_at(net, params, passes, given["train"])
        b = self._matter.of(params, passes)
        at = keep_ratio.sampling(b, ratio, inputs["epsilon"], real)  # p(alpha), (12-14)
        omega = _drawn(at.p, noise.uniform(tuple(real.shape)))
        # dL/dalpha = sum_c dL_val/domega_c dp_c/dalpha + 2 lambda alpha              (9, 18)
        slope = self._validation_slope(net, params, omega, given["val"], noise, inputs)
        slope = (slope * at.slope).sum(1) + 2 * inputs["lambda"] * ratio
        ratio = (ratio - self.arch_lr * slope).clamp(self.least_ratio, 1.0).to(ratio.dtype)
        if self.resample:
            at = keep_ratio.sampling(b, ratio, inputs["epsilon"], real)
            omega = _drawn(at.p, noise.uniform(tuple(real.shape), salt=1))
        local = local | {"ratio": ratio, "passes": passes, "drawn": omega}
        return self._weight_step(rule, net, local, given["train"])

    def _validation_slope(
        self, net: Net, params: Params, omega: Tensor, batch: Batch, noise: Noise, inputs: Params
    ) -> Tensor:
        """dF_val/domega, [G, C]; 0 where the client's validation part makes no batch."""
        if not len(batch.y):
            return torch.zeros_like(omega)
        fixed = self._matter.aside(params)

        def loss(at: Params) -> tuple[Tensor, Params]:
            return cross_entropy(net, self._masked(fixed, at["omega"]), batch, noise, inputs)

        return net.gradient(loss, {"omega": omega})[0]["omega"]

    def _weight_step(
        self, rule: LocalRule, net: Net, local: Local, batch: Batch
    ) -> tuple[Local, dict[str, Tensor]]:
        """SGD on the coordinates that the mask keeps, and a look at what the units pass on."""
        params, omega, passes = local["params"], local["drawn"], local["passes"]
        weights = {name: params[name] for name in local["velocity"]}
        rest = {name: value for name, value in params.items() if name not in weights}

        def loss(at: Params) -> tuple[Tensor, Tensor]:
            thin = self._masked(at | rest, omega)
            if not self._matter.watches:
                return mean_cross_entropy(net(thin, batch.x), batch), passes
            scores, passed = net.watched(thin, batch.x)
            return mean_cross_entropy(scores, batch), self._matter.after(
                passes, passed, batch, local["step"]
            )

        grads, value, passes = net.gradient(loss, weights)
        left = masks.coverage(weights, self._rows.by_group(omega), self.setting.net.space)
        weights, velocity = sgd(rule, weights, grads, local["velocity"], left)
        changed = {"params": weights | rest, "velocity": velocity, "passes": passes}
        # A ratio that is no number leaves weights that are: the loss tells of both.
        healthy = torch.isfinite(local["ratio"]).all()
        told = {"loss": torch.where(healthy, value, float("nan"))}
        return local | changed | {"step": local["step"] + 1}, told

    def _masked(self, params: Params, omega: Tensor) -> Params:
        by_group, space = self._rows.by_group(omega), self.setting.net.space
        return masks.masked(params, by_group, self._readers, space)

    @cached_property
    def _readers(self) -> dict[str, Binding]:
        return masks.readers(self.setting.net)

    # --- what a client returns ----------------------------------------------------------------

    def _final(self, net: Net, local: Local, inputs: Params) -> ClientResult:
        """The most important units of each group, alpha C of them, within the tier's budget."""
        del net
        params: Params = local["params"]
        ratio = torch.nan_to_num(local["ratio"].detach().cpu())
        b = torch.nan_to_num(self._matter.of(params, local["passes"]).cpu())
        kept = self._top(b, ratio) if self.architecture == "top" else local["drawn"].cpu() > 0
        tier = self.setting.tiers[int(inputs["tier"])]
        map = self._map(kept)
        while tier.over(self.setting.net, map):
            ratio = ratio * SHRINK
            kept &= self._top(b.masked_fill(~kept, -1.0), ratio)
            map = self._map(kept)
        units, space = self._rows.by_group(kept), self.setting.net.space
        left = masks.coverage(params, {g: m.to(ratio.dtype) for g, m in units.items()}, space)
        return ClientResult(
            update=space.extract(params, map),
            units=units,
            local={n: v * left[n].to(v) if n in left else v for n, v in params.items()},
            report={
                "ratio": dict(zip(self._rows.groups, local["ratio"].tolist(), strict=True)),
                "units": {group: int(mask.sum()) for group, mask in units.items()},
                "kept": {group: _hex(mask) for group, mask in units.items()},
            },
        )

    def client_map(self, view: IndexMap, report: dict[str, Any] | None) -> IndexMap:
        """The units that the client last kept; all of them before it has trained."""
        if report is None or "kept" not in report:
            return view
        rows = zip(self._rows.groups, self._rows.sizes, strict=True)
        return IndexMap.from_masks({g: _mask(report["kept"][g], size) for g, size in rows})

    def _top(self, b: Tensor, ratio: Tensor) -> Tensor:
        """The max(1, round(alpha C)) most important units of each group, bool [G, C]."""
        kept = torch.zeros_like(self._rows.real)
        for row, (size, share) in enumerate(zip(self._rows.sizes, ratio.tolist(), strict=True)):
            count = max(1, int(share * size + 0.5))
            # Stable: of equals, the lower index.
            kept[row, b[row, :size].argsort(descending=True, stable=True)[:count]] = True
        return kept

    def _map(self, kept: Tensor) -> IndexMap:
        units = self._rows.by_group(kept)
        return IndexMap.from_masks({group: mask.numpy() for group, mask in units.items()})


def _hex(mask: Tensor) -> str:
    """A mask as hex digits, four units in each: reports of many clients are remembered."""
    return np.packbits(mask.numpy()).tobytes().hex()


def _mask(digits: str, size: int) -> np.ndarray:
    """The mask of so many units that `_hex` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=size)


def _drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """omega_c ~ Bernoulli(p_c), [G, C]; a group that drew nobody keeps its likeliest unit."""
    omega = uniform < p
    likeliest = torch.zeros_like(omega).scatter(1, p.argmax(1, keepdim=True), True)
    return (omega | (likeliest & ~omega.any(1, keepdim=True))).to(uniform.dtype)
