"""The slow, plain way: a fresh module and a torch optimiser for each client, sums in NumPy.

Nothing here comes from the platform but which rows a step sees (`batches.steps`,
which has tests of its own).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from subfleet.algorithms.local import IndexedAveraging
from subfleet.core.program import ClientTask, LocalRule, Params, Stream
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.datasets.federation import Federation
from subfleet.platform import batches


def cut(net: SuperNetwork, params: Params, map: IndexMap) -> Params:
    """The sub-network's tensors by NumPy's `ix_`."""
    return {
        name: torch.from_numpy(value.numpy()[_ix(net, name, map)].copy())
        for name, value in params.items()
    }


def _ix(net: SuperNetwork, name: str, map: IndexMap) -> tuple[np.ndarray, ...]:
    space = net.space
    axes = zip(space.axes[name], space.shapes[name], strict=True)
    return np.ix_(*(space.indices(binding, map, size) for binding, size in axes))


def train_client(
    net: SuperNetwork,
    start: Params,
    map: IndexMap,
    data: Federation,
    client: int,
    rule: LocalRule,
    stream: Stream,
    *,
    seed: int,
    round: int,
) -> tuple[Params, float]:
    """One client's trained tensors and its mean loss over the rows seen."""
    module = net.module(map).train()
    module.load_state_dict(start)
    weights = list(module.parameters())
    anchor = [w.detach().clone() for w in weights]
    optimiser = torch.optim.SGD(
        weights, rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay
    )
    x, y, _ = data.block(np.array([client]), stream.part)
    x, y = data.scale.apply(torch.from_numpy(np.asarray(x, np.float32))), torch.from_numpy(y)
    schedule = batches.steps(
        stream, len(y), seed=seed, round=round, client=client, min_batch=2 if net.statistics else 1
    )
    total, rows = 0.0, 0
    for batch in schedule:
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x[batch]), y[batch])
        total, rows = total + float(loss.detach()) * len(batch), rows + len(batch)
        loss.backward()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, rule.clip_norm)
        for w, w0 in zip(weights, anchor, strict=True):
            assert w.grad is not None
            w.grad += rule.proximal * (
                w.detach() - w0
            )  # not clipped: it is no gradient of the data
        optimiser.step()
    trained = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return trained, total / rows if rows else float("nan")


def indexed_mean(
    net: SuperNetwork, current: Params, results: list[tuple[ClientTask, Params]]
) -> Params:
    """w_j = sum_{k covers j} a_k w_kj / sum_{k covers j} a_k, float64; uncovered ones stay."""
    new = {}
    for name, value in current.items():
        num, den = (np.zeros(tuple(value.shape)) for _ in range(2))
        for task, tensors in results:
            if name in tensors:
                at = _ix(net, name, task.map)
                num[at] += task.weight * tensors[name].double().numpy()
                den[at] += task.weight
        mean = np.where(den > 0, num / np.where(den > 0, den, 1.0), value.double().numpy())
        new[name] = torch.from_numpy(mean).to(value.dtype)
    return new


def federated(
    algorithm: IndexedAveraging, data: Federation, cohorts: dict[int, list[tuple[int, int]]]
) -> tuple[Params, dict[int, Params]]:
    """All rounds of indexed averaging, client by client.

    `cohorts[round]` are pairs of client and tier. Returns the server's parameters and
    the BatchNorm statistics that each client kept.
    """
    given, local = algorithm.setting, algorithm.local_statistics
    net = given.net
    params = net.init(given.seed)
    if local:
        params = {n: v for n, v in params.items() if n not in net.statistics}
    own: dict[int, Params] = {}
    for round in sorted(cohorts):
        results = []
        for client, tier in cohorts[round]:
            map = algorithm.map_of(tier, round)
            start = cut(net, params, map)
            if local:
                start |= own.get(client) or _fresh(net, map)
            samples = int(data.sizes(np.array([client]), "train")[0])
            trained, _ = train_client(
                net,
                start,
                map,
                data,
                client,
                given.rule,
                given.stream,
                seed=given.seed,
                round=round,
            )
            if local:
                own[client] = {n: trained.pop(n) for n in net.statistics}
            results.append((ClientTask(client, map, (), float(samples), samples, tier), trained))
        params = indexed_mean(net, params, results)
    return params, own


def _fresh(net: SuperNetwork, map: IndexMap) -> Params:
    state = net.module(map).state_dict()
    return {
        n: torch.ones_like(v) if "var" in n else torch.zeros_like(v)
        for n, v in state.items()
        if n in net.statistics
    }
