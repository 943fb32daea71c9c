"""pFedMe: personal models pulled towards the server's by Moreau envelopes.

T. Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subfleet.algorithms.local import OneNetwork, clipped, cross_entropy, tasks
from subfleet.core.algorithm import Cohort, Phase, Reduced, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.program import (
    Batch,
    ClientResult,
    ClientTask,
    LocalRule,
    Loss,
    Net,
    Noise,
    Params,
    StepProgram,
)

Begin = Literal["global", "personal"]
"""Where a client's personal model begins a round: at the server's model, or where it stopped."""

_OWN = "theta/"  # what a client keeps is named like this, and so is cut like the network


@dataclass(frozen=True)
class PFedMe(OneNetwork):
    """Each client trains a personal model theta_k near a copy w_k of the server's model.

    min_w sum_k F_k(w),  F_k(w) = min_theta L_k(theta) + (penalty / 2) |theta - w|^2

    client, with w_k = theta = w^t at first, for each batch D:
        `inner_steps` times  theta <- theta - personal_lr (grad L(theta; D) + penalty (theta - w_k))
        w_k <- w_k - eta penalty (w_k - theta)
    server:  w <- (1 - beta) w + beta sum_k (n_k / sum n) w_k

    theta_k stays on its client, BatchNorm's statistics included, and is what the local accuracy
    measures. The statistics of w_k follow theta's by the same line as its weights. train.lr and
    train.momentum have no effect; `train.schedule` scales both rates, and train.weight_decay and
    train.clip_norm act on theta's gradient. Everybody trains the same network (`OneNetwork`).

    Options:
        penalty: The paper's lambda, 0 or more: how strongly theta is held near w_k.
        personal_lr: The rate of theta's steps, 0 or more, below 1 / penalty.
        inner_steps: Steps of theta on each batch, 1 or more; the paper's K.
        eta: The rate of w_k's steps, 0 to 1 / penalty.
        beta: How far the server moves towards the clients' mean, 0 or more; 1 is all the way.
        begin: Where theta begins a round: "global" at the server's model, "personal" where it
            stopped.
    """

    penalty: float = 15.0
    personal_lr: float = 0.05
    inner_steps: int = 5
    eta: float = 0.01
    beta: float = 1.0
    begin: Begin = "global"

    paper: ClassVar[str] = "T. Dinh et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalty", "personal_lr", "eta", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"algorithm.{name}={getattr(self, name)} is outside [0, inf); "
                    f"give {getattr(type(self), name)}, say"
                )
        if self.inner_steps < 1:
            raise InputError(
                f"algorithm.inner_steps={self.inner_steps} is below 1; give 1 or more, such as 5"
            )
        self._check_stable()

    def doubts(self) -> tuple[str, ...]:
        """Rates of `[train]` that were given and move nothing."""
        rule, plain = self.setting.rule, LocalRule()
        return tuple(
            f"train.{name} = {getattr(rule, name):g} has no effect: pfedme's rates are "
            "algorithm.personal_lr and algorithm.eta"
            for name in ("lr", "momentum")
            if getattr(rule, name) != getattr(plain, name)
        )

    def _check_stable(self) -> None:
        """Beyond these bounds theta, or w_k, jumps over what it is pulled to."""
        if self.personal_lr * self.penalty >= 1:
            raise InputError(
                f"algorithm.personal_lr={self.personal_lr} times algorithm.penalty={self.penalty} "
                f"is {self.personal_lr * self.penalty:g}, not below 1: theta would overshoot; "
                f"set personal_lr below {1 / self.penalty:g}"
            )
        if self.eta * self.penalty > 1 + 1e-9:
            raise InputError(
                f"algorithm.eta={self.eta} times algorithm.penalty={self.penalty} is "
                f"{self.eta * self.penalty:g}, above 1: w_k would overshoot theta; "
                f"set eta to at most {1 / self.penalty:g}"
            )

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Everybody trains the same network."""
        del round
        work = tasks(self.setting.net, cohort, lambda tier: self.network)
        return RoundPlan(work, {0: state["params"]})

    def phase(self, round: int) -> Phase:
        """One phase, with the round's rates."""
        rule = self.setting.rule
        factor = 1.0 if rule.schedule is None else rule.schedule.factor(round)
        envelope = Envelope(
            cross_entropy,
            penalty=self.penalty,
            personal_lr=self.personal_lr * factor,
            inner_steps=self.inner_steps,
            eta=self.eta * factor,
            weight_decay=rule.weight_decay,
            clip_norm=rule.clip_norm,
            begin=self.begin,
            statistics=self.setting.net.statistics,
        )
        streams = {"train": self.setting.stream}
        program = StepProgram(
            envelope.init, envelope.step, envelope.final, streams, passes=self.inner_steps
        )
        return Phase("train", program)

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """Moves by `beta` towards the clients' mean; by 1 at most for BatchNorm's statistics."""
        before: Params = state["params"]
        mean: Params = super().server_step(state, plan, reduced)["params"]
        after = {}
        for name, w in before.items():
            # Beyond 1 a variance could become negative.
            beta = min(self.beta, 1.0) if name in self.setting.net.statistics else self.beta
            # w <- (1 - beta) w + beta sum_k (n_k / sum n) w_k
            after[name] = (1 - beta) * w + beta * mean[name]
        return state | {"params": after}

    @property
    def keeps(self) -> bool:
        """Clients keep their personal models."""
        return True

    def initial_kept(self, task: ClientTask) -> Params:
        """No personal model yet, in the shape of one."""
        shapes = self.setting.net.space.slice_shapes(task.map)
        return {_OWN + name: torch.zeros(shape) for name, shape in shapes.items()} | {
            "begun": torch.zeros(())
        }

    def client_params(self, cut: Params, kept: Params | None) -> Params:
        """The personal model theta_k; the server's before the client has one."""
        if kept is None or not kept["begun"]:
            return cut
        return {n.removeprefix(_OWN): v for n, v in kept.items() if n.startswith(_OWN)}


@dataclass(frozen=True)
class Envelope:
    """A client's work: its personal model's steps near w_k, and those of w_k towards it."""

    loss: Loss
    penalty: float
    personal_lr: float
    inner_steps: int
    eta: float
    weight_decay: float = 0.0
    clip_norm: float | None = None
    begin: Begin = "global"
    statistics: frozenset[str] = frozenset()

    def init(self, net: Net, params: Params, kept: Params | None, inputs: Params) -> dict[str, Any]:
        """w_k = w^t; theta = w^t, or the one that was kept."""
        del net, inputs
        w = {name: value.float() for name, value in params.items()}
        theta = {name: value.clone() for name, value in w.items()}
        if self.begin == "personal" and kept is not None:
            begun = kept["begun"] > 0
            theta = {n: torch.where(begun, kept[_OWN + n], value) for n, value in w.items()}
        return {"w": w, "theta": theta}

    def step(
        self, net: Net, local: dict[str, Any], batch: dict[str, Batch], noise: Noise, inputs: Params
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One batch: theta's inner steps on it, and w_k's one. The loss is theta's before them."""
        w, theta = local["w"], local["theta"]
        pull = self.personal_lr * self.penalty
        losses = []
        for _ in range(self.inner_steps):
            gradient, loss, seen = self._gradient(net, theta, batch["train"], noise, inputs)
            # theta <- theta - eta_p (grad L(theta; D) + lambda (theta - w_k))
            #        = [theta + eta_p lambda (w_k - theta)] - eta_p grad L(theta; D)
            theta = seen | {
                n: torch.lerp(theta[n], w[n], pull).add(g, alpha=-self.personal_lr)
                for n, g in gradient.items()
            }
            losses.append(loss)
        # w_k <- w_k - eta lambda (w_k - theta)
        w = {n: torch.lerp(value, theta[n], self.eta * self.penalty) for n, value in w.items()}
        return {"w": w, "theta": theta}, {"loss": losses[0]}

    def _gradient(
        self, net: Net, theta: Params, batch: Batch, noise: Noise, inputs: Params
    ) -> tuple[Params, Tensor, Params]:
        """The gradient at theta's weights, clipped and decayed; the loss; statistics after it."""
        weights = {n: value for n, value in theta.items() if n not in self.statistics}

        def loss(weights: Params) -> tuple[Tensor, Params]:
            # BatchNorm writes its statistics in place: into tensors of this call's own.
            own = {n: theta[n].clone() for n in theta if n in self.statistics}
            return self.loss(net, weights | own, batch, noise, inputs)[0], own

        gradient, value, seen = net.gradient(loss, weights)
        gradient = clipped(gradient, self.clip_norm)
        if self.weight_decay:
            gradient = {n: g + self.weight_decay * weights[n] for n, g in gradient.items()}
        return gradient, value, seen

    def final(self, net: Net, local: dict[str, Any], inputs: Params) -> ClientResult:
        """Uploads w_k; keeps theta_k, and tests it."""
        del net, inputs
        theta = local["theta"]
        kept = {_OWN + name: value for name, value in theta.items()} | {"begun": torch.ones(())}
        return ClientResult(local["w"], kept=kept, local=theta)
