"""STC: sparse ternary compression, up and down.

Sattler, Wiedemann, Müller, Samek, "Robust and Communication-Efficient Federated
Learning from Non-i.i.d. Data", 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from subfleet.algorithms.local import OneNetwork, cross_entropy, tasks
from subfleet.core import aggregate, golomb
from subfleet.core.aggregate import Update
from subfleet.core.algorithm import Cohort, Phase, Reduced, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.golomb import Sparse
from subfleet.core.program import ClientResult, ClientTask, LossProgram, Params

PRESETS = {"adds_femnist": 0.2439, "adds_celeba": 0.1582}
"""Sparsities that the tables of the ADDS paper imply: the share of parameters transmitted."""

Sparsity = float | Literal["adds_femnist", "adds_celeba"]

RESIDUAL = "residual/"  # a client's residual of "conv.weight" is its "residual/conv.weight"


class Message(NamedTuple):
    """What a receiver has after decoding, and the bytes that travelled."""

    tensors: Params
    num_bytes: int


def largest(vector: np.ndarray, p: float, *, ternary: bool = True) -> Sparse:
    """STC_p: the k = max(1, ceil(N p)) largest entries, each as mu with its sign.

    mu = mean |v_i| over them; without `ternary` each keeps its own magnitude. Exactly k:
    of equal entries the first. A zero counts as positive. `vector`: float32 [N], N >= 1.

    >>> v = np.array([0.1, -0.9, 0.3, 0.05, -0.4, 0.7], np.float32)
    >>> largest(v, 1 / 3).dense().round(3).tolist()
    [0.0, -0.800000011920929, 0.0, 0.0, 0.0, 0.800000011920929]
    """
    size = len(vector)
    k = _sent(size, p)
    magnitude = np.abs(vector)
    rank = np.where(np.isnan(magnitude), np.inf, magnitude)  # a NaN is sent, never hidden
    least = np.partition(rank, size - k)[size - k]
    chosen = rank > least
    ties = np.flatnonzero(rank == least)
    chosen[ties[: k - np.count_nonzero(chosen)]] = True
    positions = np.flatnonzero(chosen)
    own = magnitude[positions]
    mu = own.mean(dtype=np.float64, keepdims=True).astype(np.float32)
    return Sparse(size, positions, vector[positions] < 0, mu if ternary else own)


@dataclass(frozen=True)
class STC(OneNetwork):
    """Clients and server send the largest entries of what changed, and keep the rest for later.

    client:  D_k = A_k + (SGD(W) - W),       D~_k = STC_up(D_k),   A_k <- D_k - D~_k
    server:  D = A + (1/|S|) sum_k D~_k,     D~ = STC_down(D),     A <- D - D~,  W <- W + D~

    All messages are really encoded (`subfleet.core.golomb`): their lengths are the bytes
    counted, and what is decoded from them is what is added. A client that trains again
    downloads the messages of all rounds since, or the dense model where that is less; one
    that never trained has nothing to add them to and downloads the dense model.

    BatchNorm's running statistics are no sums of changes: they travel as they are, dense
    and counted, and the server averages them, every client alike.

    Clients train without momentum, whatever the experiment's rule says: the residuals are
    the memory of former steps.

    Options:
        p_up: The fraction in (0, 1] of the entries that a client sends, or what the tables of
            the ADDS paper imply: "adds_femnist" (0.2439) or "adds_celeba" (0.1582).
        p_down: The same of the server's messages.
        per_tensor: Whether each tensor is compressed by itself; else all together.
        ternary: Whether all entries sent of a tensor share one magnitude; else each keeps its
            own, 4 bytes each.
    """

    p_up: Sparsity = 1 / 400
    p_down: Sparsity = 1 / 400
    per_tensor: bool = True
    ternary: bool = True

    paper: ClassVar[str] = "Sattler et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, p in (("p_up", self.p_up), ("p_down", self.p_down)):
            if not 0 < _fraction(p) <= 1:
                raise InputError(
                    f"algorithm.{name}={p} is outside (0, 1]; give the fraction of the entries "
                    "that are sent, such as 0.0025"
                )

    def doubts(self) -> tuple[str, ...]:
        """Momentum is not used."""
        if momentum := self.setting.rule.momentum:
            return (
                f"train.momentum = {momentum:g} has no effect: stc trains without; a train.lr that "
                f"was chosen beside it wants to be {1 / (1 - momentum):.3g} times as large",
            )
        return ()

    def compress(self, change: Params, p: Sparsity) -> Message:
        """Encodes tensors and decodes them again."""
        groups = [[name] for name in change] if self.per_tensor else [list(change)]
        received, num_bytes = {}, 0
        for names in groups:
            vector = torch.cat([change[name].flatten() for name in names]).numpy()
            sparse = largest(vector, _fraction(p), ternary=self.ternary)
            code = golomb.encode(sparse)
            num_bytes += len(code)
            decoded = golomb.decode(code, len(vector), ternary=self.ternary).dense()
            pieces = torch.from_numpy(decoded).split([change[name].numel() for name in names])
            for name, piece in zip(names, pieces, strict=True):
                received[name] = piece.reshape(change[name].shape)
        return Message(received, num_bytes)

    # --- clients -----------------------------------------------------------------------------

    def phase(self, round: int) -> Phase:
        """One phase: local SGD without momentum, its change compressed."""
        del round
        rule = replace(self.setting.rule, momentum=0.0)
        return Phase(
            "train", LossProgram(cross_entropy, rule, self.setting.stream, finish=self.upload)
        )

    def upload(
        self, start: Params, trained: Params, kept: Params | None, inputs: Params
    ) -> ClientResult:
        """What a client sends after training, and what it keeps of its change."""
        del inputs
        assert kept is not None
        statistics = self.setting.net.statistics
        # D_k = A_k + (SGD(W) - W)
        change = {
            name: (kept[RESIDUAL + name] + (value - start[name])).to("cpu", torch.float32)
            for name, value in trained.items()
            if name not in statistics
        }
        sent, num_bytes = self.compress(change, self.p_up)
        dense = {name: trained[name].cpu() for name in trained if name in statistics}
        return ClientResult(
            update=sent | dense,
            kept={RESIDUAL + name: change[name] - sent[name] for name in change},  # A_k
            wire_bytes=num_bytes + _dense_bytes(dense),
        )

    @property
    def keeps(self) -> bool:
        """Clients keep their residuals A_k."""
        return True

    def initial_kept(self, task: ClientTask) -> Params:
        """A_k = 0."""
        del task
        return {RESIDUAL + name: zero for name, zero in self._zeros().items()}

    # --- server ------------------------------------------------------------------------------

    def init(self, params: Params) -> State:
        """The drawn parameters, A = 0, and the bytes of every round's message, none yet."""
        return {
            "params": params,
            "residual": self._zeros(),
            "messages": np.zeros(0, np.int64),
        }

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        """Everybody trains the one network, with equal weights, and first catches up."""
        work = tasks(self.setting.net, cohort, lambda tier: self.network)
        down = self.bytes_down(state, cohort.last_round)
        return RoundPlan(
            [
                replace(task, weight=1.0, bytes_down=sent, bytes_up=self._most_up)
                for task, sent in zip(work, down.tolist(), strict=True)
            ],
            {0: state["params"]},
        )

    def bytes_down(self, state: State, last_round: np.ndarray) -> np.ndarray:
        """Bytes that clients who last trained in these rounds (-1: never) download, int64 [C].

        Who trained in round l began it without the message of round l, and needs the
        messages of l, l + 1, ... up to now.
        """
        net = self.setting.net
        dense = 4 * net.space.slice_numel(self.network, without=net.statistics)
        up_to = np.concatenate([[0], np.cumsum(state["messages"])])  # of the first so many rounds
        behind = up_to[-1] - up_to[np.maximum(last_round - 1, 0)]
        missed = np.where(last_round < 0, dense, np.minimum(behind, dense))
        return missed + _dense_bytes(net.fresh_statistics(self.network))

    @cached_property
    def _most_up(self) -> int:
        """Bytes of the longest message of a client."""
        net, p = self.setting.net, _fraction(self.p_up)
        sizes = [zero.numel() for zero in self._zeros().values()]
        sizes = sizes if self.per_tensor else [sum(sizes)]
        most = sum(golomb.most_bytes(n, _sent(n, p), ternary=self.ternary) for n in sizes)
        return most + _dense_bytes(net.fresh_statistics(self.network))

    def server_step(self, state: State, plan: RoundPlan, reduced: Reduced) -> State:
        """Adds the compressed mean change, and averages BatchNorm's statistics."""
        del plan
        assert isinstance(reduced, Update)
        net, params = self.setting.net, state["params"]
        # Parameters that nobody sent changed by 0; statistics that nobody sent stay.
        still = {n: v if n in net.statistics else torch.zeros_like(v) for n, v in params.items()}
        mean = net.space.extract(aggregate.finish(reduced, net.space, still), self.network)
        # D = A + (1/|S|) sum_k D~_k
        change = {n: (a + mean[n]).to(torch.float32) for n, a in state["residual"].items()}
        sent, num_bytes = self.compress(change, self.p_down)
        now = net.space.extract(params, self.network)
        new = {n: mean[n] if n in net.statistics else now[n] + sent[n] for n in now}  # W + D~
        whole = {n: v.clone() for n, v in params.items()}
        return state | {
            "params": net.space.scatter(new, self.network, out=whole),
            "residual": {n: change[n] - sent[n] for n in change},  # A
            "messages": np.append(state["messages"], num_bytes),
        }

    def idle(self, state: State) -> State:
        """Nothing changed, and a round's message of no bytes: `messages` has one a round."""
        return state | {"messages": np.append(state["messages"], 0)}

    def _zeros(self) -> Params:
        """Zeros for every parameter of the network, float32; none for statistics."""
        net = self.setting.net
        shapes = net.space.slice_shapes(self.network)
        return {n: torch.zeros(s) for n, s in shapes.items() if n not in net.statistics}


def _sent(size: int, p: float) -> int:
    """k: how many of so many entries are sent."""
    return max(1, math.ceil(size * p - 1e-9))  # 0.07 * 100 is 7, although it rounds above it


def _fraction(p: float | str) -> float:
    return PRESETS[p] if isinstance(p, str) else p


def _dense_bytes(tensors: Params) -> int:
    return 4 * sum(tensor.numel() for tensor in tensors.values())
