"""Leaves beside the network's own: momentum, which is cut like its weights, and a free row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import toys
from torch.func import functional_call, grad_and_value

from subfleet.algorithms.local import IndexedAveraging
from subfleet.core import aggregate
from subfleet.core.algorithm import Phase, RoundPlan
from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult, LocalRule, StepProgram, Stream
from subfleet.core.units import IndexMap
from subfleet.platform import batches
from subfleet.platform.metrics import ClientsLog

LR, DECAY = 0.1, 0.8
SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


def step(names, net, local, batch, noise, inputs):
    """v <- 0.8 v + g, w <- w - 0.1 v; the network takes its own from the whole tree."""

    def loss(weights):
        logits = net(local | weights, batch["data"].x)
        return batch["data"].mean(F.cross_entropy(logits, batch["data"].y, reduction="none"))

    gradient, value = grad_and_value(loss)({n: local[n] for n in names})
    v = {f"momentum/{n}": DECAY * local[f"momentum/{n}"] + gradient[n] for n in names}
    w = {n: local[n] - LR * v[f"momentum/{n}"] for n in names}
    return local | v | w, {"loss": value}


@dataclass(frozen=True)
class AveragesMomentum(IndexedAveraging):
    """Momentum goes round like the weights; "device" is the mean of what clients put in it."""

    def init(self, params):
        momentum = {f"momentum/{n}": torch.zeros_like(v) for n, v in params.items()}
        return {"params": params, "rest": momentum | {"device": torch.zeros(3)}}

    def phase(self, round):
        program = StepProgram(
            lambda net, params, kept, inputs: dict(params),
            partial(step, sorted(self.setting.net.parameters)),
            lambda net, local, inputs: ClientResult(local | {"device": inputs["row"]}),
            {"data": self.setting.stream},
        )
        return Phase("train", program)

    def map_of(self, tier, round):
        counts = self.setting.net.space.counts_by_group(self.setting.tiers[tier].map)
        return IndexMap.rolling(self.setting.net.space, counts, start=round)

    def plan(self, state, cohort, round):
        tasks = [
            replace(task, inputs={"row": torch.full((3,), float(task.client))})
            for task in super().plan(state, cohort, round).tasks
        ]
        return RoundPlan(tasks, {0: state["params"] | state["rest"]})

    def server_step(self, state, plan, reduced):
        whole = aggregate.finish(reduced, self.setting.net.space, plan.shared[0])
        return {part: {n: whole[n] for n in tree} for part, tree in state.items()}


def algorithm():
    rule, stream = LocalRule(lr=LR, momentum=DECAY), Stream(batch=4, epochs=2)
    return AveragesMomentum(toys.setting(toys.mlp(), (1.0, 0.5), rule, stream, rounds=3))


def train_by_hand(net, start, velocity, map, data, client):
    module = net.module(map)
    w, v = dict(start), dict(velocity)
    x, y, _ = data.block(np.array([client]), "train")
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    for rows in batches.steps(
        Stream(batch=4, epochs=2), len(y), seed=0, round=1, client=client, min_batch=1
    ):
        leaves = {n: value.clone().requires_grad_() for n, value in w.items()}
        F.cross_entropy(functional_call(module, leaves, (x[rows],)), y[rows]).backward()
        v = {n: DECAY * v[n] + leaf.grad for n, leaf in leaves.items()}  # type: ignore
        w = {n: w[n] - LR * v[n] for n in w}
    return w, v


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_momentum_and_a_free_leaf_come_back_from_sub_networks(way):
    made, data = algorithm(), toys.federation(SIZES, (6,), 3)
    net, ids, tiers = made.setting.net, [0, 2, 3, 4], [0, 1, 1, 0]
    state = made.init(net.init(0))
    draw = torch.Generator().manual_seed(1)
    for name, value in state["rest"].items():
        state["rest"][name] = 0.1 * torch.randn(value.shape, generator=draw)
    after, result = toys.one_round(made, data, state, ids, tiers, way=way)

    momentum = {n: state["rest"][f"momentum/{n}"] for n in state["params"]}
    weights, velocities = [], []
    for client, tier in zip(ids, tiers, strict=True):
        samples = int(data.sizes(np.array([client]), "train")[0])
        task = toys.task(net, client, made.map_of(tier, 1), weight=float(samples))
        cut = [reference.cut(net, tree, task.map) for tree in (state["params"], momentum)]
        w, v = train_by_hand(net, *cut, task.map, data, client)
        weights.append((task, w))
        velocities.append((task, v))
    assert toys.distance(after["params"], reference.indexed_mean(net, state["params"], weights)) < (
        1e-5
    )
    expected = reference.indexed_mean(net, momentum, velocities)
    found = {n: after["rest"][f"momentum/{n}"] for n in expected}
    assert toys.distance(found, expected) < 1e-5
    assert not toys.same_bits(found, momentum)
    total = sum(task.weight for task, _ in weights)
    mean = sum(task.weight * task.client for task, _ in weights) / total
    assert after["rest"]["device"].tolist() == pytest.approx([mean] * 3)

    wide = (6 * 8 + 8) + (8 * 4 + 4) + (4 * 3 + 3)
    narrow = (6 * 4 + 4) + (4 * 2 + 2) + (2 * 3 + 3)
    bytes_up = dict(zip(result.table["client"].tolist(), result.table["bytes_up"], strict=True))
    for client, tier in zip(ids, tiers, strict=True):
        # Weights and momentum, the free row, and for a window 12 units as bits.
        numbers = 2 * (wide, narrow)[tier] + 3
        assert bytes_up[client] == 4 * numbers + (0, 2)[tier]


def test_extra_leaves_travel_checkpoint_and_resume(tmp_path):
    job = toys.job(algorithm(), toys.federation(SIZES, (6,), 3), checkpoint_every=1)
    whole = toys.run(job, tmp_path / "whole", workers=2)
    with pytest.raises(toys.Crash):
        toys.run(job, tmp_path / "run", observers=(toys.StopAfter(2),))
    resumed = toys.run(job, tmp_path / "run", resume=True)
    assert resumed["params_sha256"] == whole["params_sha256"]
    rows = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    assert rows["bytes_down"] == rows["bytes_up"]  # the tree that went down comes back whole


def test_a_tree_that_the_server_does_not_hold_is_refused():
    made, data = algorithm(), toys.federation(SIZES, (6,), 3)
    state = made.init(made.setting.net.init(0))

    @dataclass(frozen=True)
    class Forgets(AveragesMomentum):
        def server_step(self, state, plan, reduced):
            return {"params": aggregate.finish(reduced, self.setting.net.space, state["params"])}

    with pytest.raises(InputError, match=r"'momentum/head.bias'.* that the server does not hold"):
        toys.one_round(Forgets(made.setting), data, state, [0, 2])
