"""Loop and vmap against plain torch, and what a bundle returns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.func import functional_call, grad

from subfleet.algorithms.fedpa import FedPA
from subfleet.algorithms.local import cross_entropy
from subfleet.core import aggregate, seeds
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.program import (
    ClientResult,
    LocalRule,
    LossProgram,
    RunProgram,
    StepProgram,
    Stream,
)
from subfleet.core.scaling import Scaling
from subfleet.core.units import IndexMap
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.models import chain, small_cnn, supernet
from subfleet.platform import batches
from subfleet.platform.bundles import TrainBundle
from subfleet.platform.engine import Work
from subfleet.platform.worker import Worker

SIZES = [13, 4, 9, 1, 22, 8]  # 4, 1, 3, 1, 6, 2 batches of 4: uneven steps and part batches
RULES = {
    "sgd": LocalRule(lr=0.2),
    "momentum": LocalRule(lr=0.1, momentum=0.9),
    "decay": LocalRule(lr=0.2, momentum=0.5, weight_decay=0.05),
    "proximal": LocalRule(lr=0.2, proximal=0.7),
    "clip": LocalRule(lr=0.2, momentum=0.3, clip_norm=0.4),
}
STREAM = Stream(batch=4, epochs=2)


def loss_program(rule=RULES["sgd"], stream=STREAM, finish=None):
    return LossProgram(cross_entropy, rule, stream, finish)


def dropping():
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    return chain("dropping", layers, (6,))


def mapped_tasks(net, clients, maps=(toys.FULL,)):
    return [toys.task(net, c, maps[i % len(maps)]) for i, c in enumerate(clients)]


# --- form (a): a loss and a rule -----------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("rule", ["sgd", "clip"])
def test_the_loop_equals_a_module_and_an_optimiser(norm, rule):
    net, data = toys.cnn(norm), toys.all_train(SIZES, (1, 8, 8), 4)
    shared, map = net.init(1), IndexMap.of({"conv1": [0, 2, 3], "conv2": [1, 2, 4, 5]})
    tasks = mapped_tasks(net, range(len(SIZES)), [map])
    found = toys.each(net, loss_program(RULES[rule]), tasks, data, shared, round=3, seed=5)
    for task, (params, loss, _) in zip(tasks, found, strict=True):
        expected, expected_loss = reference.train_client(
            net,
            reference.cut(net, shared, map),
            map,
            data,
            task.client,
            RULES[rule],
            STREAM,
            seed=5,
            round=3,
        )
        assert toys.distance(params, expected) < 1e-6
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # NaN where nothing was seen


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("rule", RULES)
def test_traced_steps_equal_the_loop(rule, norm):
    """Running statistics too; whole batches are traced, the last of a pass is not."""
    net, data = toys.cnn(norm), toys.all_train(SIZES, (1, 8, 8), 4)
    tasks = mapped_tasks(net, range(len(SIZES)), [width_map(net, 0.5)])
    shared, program = net.init(1), loss_program(RULES[rule])
    looped = toys.each(net, program, tasks, data, shared)
    traced = toys.each(net, program, tasks, data, shared, "traced")
    for (a, loss_a, steps_a), (b, loss_b, steps_b) in zip(traced, looped, strict=True):
        assert toys.distance(a, b) < 1e-5
        assert loss_a == pytest.approx(loss_b, rel=1e-4, nan_ok=True) and steps_a == steps_b
    again = toys.each(net, program, tasks[2:3], data, shared, "traced")
    assert toys.same_bits(again[0][0], traced[2][0]), "whatever was traced before"


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "clip"])
def test_bfloat16_is_close_to_full_precision(way, rule):
    net, data = toys.cnn(), toys.all_train([12, 8], (1, 8, 8), 4)
    tasks, shared, program = mapped_tasks(net, [0, 1]), net.init(1), loss_program(RULES[rule])
    exact = toys.each(net, program, tasks, data, shared)
    rough = toys.each(net, program, tasks, data, shared, way, dtype="bfloat16")
    for (a, *_), (b, *_) in zip(rough, exact, strict=True):
        moved = toys.distance(b, shared)
        assert 0 < toys.distance(a, b) < 0.2 * moved, "rounded, and near"
        assert all(t.dtype == torch.float32 for t in a.values())


class Halves(nn.Module):
    """Splits its own input, and uses the whole of it again."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        left, _ = x.chunk(2, 1)
        return self.head(torch.cat([torch.relu(left), x], 1))


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_traced_relus_leave_alone_what_others_read(way):
    net, data = supernet(Halves(), torch.zeros(1, 6)), toys.all_train([12, 8], (6,), 3)
    tasks, shared, program = mapped_tasks(net, [0, 1]), net.init(0), loss_program()
    looped = toys.each(net, program, tasks, data, shared)
    found = toys.each(net, program, tasks, data, shared, way)
    for (a, *_), (b, *_) in zip(found, looped, strict=True):
        assert toys.distance(a, b) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_side_by_side_equals_the_loop(rule):
    """Uneven steps, part batches and different windows of one shape in one chunk."""
    net, data = toys.cnn(), toys.all_train(SIZES, (1, 8, 8), 4)
    windows = [
        IndexMap.rolling(net.space, {"conv1": 2, "conv2": 3, "fc1": 5}, start) for start in (0, 3)
    ]
    tasks = mapped_tasks(net, range(len(SIZES)), windows)
    shared, program = net.init(1), loss_program(RULES[rule])
    looped = toys.each(net, program, tasks, data, shared)
    for task, (params, *_) in zip(tasks, looped, strict=True):
        start = reference.cut(net, shared, task.map)
        expected, _ = reference.train_client(
            net, start, task.map, data, task.client, RULES[rule], STREAM, seed=0, round=1
        )
        assert toys.distance(params, expected) < 1e-5
    for width in (16, 4):  # 4: two groups, the last one smaller
        mapped = toys.each(net, program, tasks, data, shared, "vmap", width=width)
        for (a, loss_a, steps_a), (b, loss_b, steps_b) in zip(mapped, looped, strict=True):
            assert toys.distance(a, b) < 1e-5
            assert loss_a == pytest.approx(loss_b, rel=1e-4) and steps_a == steps_b
    assert not toys.same_bits(looped[0][0], looped[2][0])


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
def test_stored_pixels_are_scaled_on_the_device(way):
    data = SyntheticFemnist(40, seed=2, mean_samples=15)
    net = small_cnn(channels=(2, 3), hidden=8)
    algorithm = toys.OneProgram(toys.setting(net), loss_program(stream=Stream(batch=8)))
    worker = Worker(Work(net, algorithm, data.scale, 0), data, "cpu")
    shared, tasks = net.init(0), mapped_tasks(net, [3, 17, 39])
    result = toys.run_bundle(algorithm, tasks, data, shared, way, worker=worker)  # type: ignore
    trained = []
    for task in tasks:
        params, loss = reference.train_client(
            net,
            shared,
            toys.FULL,
            data,
            task.client,
            RULES["sgd"],
            Stream(batch=8),
            seed=0,
            round=1,
        )
        trained.append((task, params))
        assert result.table["loss"][len(trained) - 1] == pytest.approx(loss, rel=1e-4)
    expected = reference.indexed_mean(net, shared, trained)
    assert toys.distance(aggregate.finish(result.update, net.space, shared), expected) < 1e-5


def test_a_finished_client_keeps_every_bit_while_others_go_on():
    net, data = toys.mlp(), toys.all_train([4, 40], (6,), 3)
    shared = net.init(0)
    program = loss_program(LocalRule(lr=0.2, momentum=0.9, weight_decay=0.5))
    alone = toys.each(net, program, [toys.task(net, 0)], data, shared, "vmap")
    both = toys.each(net, program, mapped_tasks(net, [0, 1]), data, shared, "vmap")
    assert toys.distance(both[0][0], alone[0][0]) < 1e-6


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_client_without_rows_returns_its_start(way):
    net = toys.mlp()
    data, shared = toys.all_train([0, 6, 0], (6,), 3), net.init(0)
    found = toys.each(net, loss_program(), mapped_tasks(net, [0, 1, 2]), data, shared, way)
    assert toys.same_bits(found[0][0], shared) and toys.same_bits(found[2][0], shared)
    assert not toys.same_bits(found[1][0], shared)
    assert [steps for _, _, steps in found] == [0, 4, 0] and np.isnan(found[0][1])
    nobody = toys.each(net, loss_program(), mapped_tasks(net, [0, 2]), data, shared, way)
    assert toys.same_bits(nobody[0][0], shared)


def test_batch_norm_with_one_sample_trains_nothing():
    net = toys.mlp(norm=True)
    data, shared = toys.all_train([1, 5], (6,), 3), net.init(0)
    found = toys.each(net, loss_program(), mapped_tasks(net, [0, 1]), data, shared)
    assert toys.same_bits(found[0][0], shared) and found[0][2] == 0
    assert found[1][2] == 2  # batches of 4 and 1, twice: the single rows are left out


def noisy_loss(net, params, batch, noise, inputs):
    """Noise on the inputs, and a bonus from the task's own inputs."""
    x = batch.x + noise.uniform((6,)) + inputs["shift"] * noise.uniform((6,), salt=1)
    return batch.mean(F.cross_entropy(net(params, x), batch.y, reduction="none")), {}


def test_noise_and_inputs_are_each_clients_own_under_both_ways():
    net, data = toys.mlp(), toys.all_train(SIZES, (6,), 3)
    program, shared = LossProgram(noisy_loss, RULES["sgd"], STREAM), net.init(0)
    tasks = [toys.task(net, c, inputs={"shift": torch.tensor(float(c))}) for c in range(len(SIZES))]
    looped = toys.each(net, program, tasks, data, shared)
    mapped = toys.each(net, program, tasks, data, shared, "vmap")
    for (a, *_), (b, *_) in zip(mapped, looped, strict=True):
        assert toys.distance(a, b) < 1e-5
    still = [toys.task(net, c, inputs={"shift": torch.tensor(0.0)}) for c in range(len(SIZES))]
    assert toys.distance(toys.each(net, program, still, data, shared)[4][0], looped[4][0]) > 1e-3


def test_uniform_noise_has_equal_bits_under_vmap():
    keys = torch.tensor([5, 77, 2**31 - 1])
    together = torch.func.vmap(lambda k: seeds.uniform(k, (4, 3), salt=2))(keys)
    alone = torch.stack([seeds.uniform(k, (4, 3), salt=2) for k in keys])
    assert torch.equal(together, alone)


# --- form (b): steps over trees, here pFedMe and first-order Per-FedAvg ---


def _gradient(net, params, batch):
    def loss(params):
        return batch.mean(F.cross_entropy(net(params, batch.x), batch.y, reduction="none"))

    return grad(loss)(params), loss(params)


def _minus(params, gradient, rate):
    return {name: value - rate * gradient[name] for name, value in params.items()}


def per_fedavg(alpha, beta):
    """First-order Per-FedAvg: try a step on one batch, step along another's gradient there."""

    def init(net, params, kept, inputs):
        del net, inputs
        assert kept is None
        return {"w": params}

    def step(net, local, batch, noise, inputs):
        del noise, inputs
        tried = _minus(local["w"], _gradient(net, local["w"], batch["inner"])[0], alpha)
        gradient, loss = _gradient(net, tried, batch["outer"])
        return {"w": _minus(local["w"], gradient, beta)}, {"loss": loss}

    def final(net, local, inputs):
        del net, inputs
        return ClientResult(local["w"])

    streams = {"inner": Stream(batch=4, epochs=2), "outer": Stream("test", batch=3)}
    return StepProgram(init, step, final, streams)


def per_fedavg_by_hand(start, data, client, alpha, beta):
    def rows(part):
        x, y, _ = data.block(np.array([client]), part)
        return torch.from_numpy(x), torch.from_numpy(y)

    (x, y), (tx, ty) = rows("train"), rows("test")
    about = {"seed": 0, "round": 1, "client": client}
    inner = batches.steps(Stream(batch=4, epochs=2), len(y), **about)
    outer = batches.steps(Stream("test", batch=3), len(ty), **about)
    w, b = start["fc.weight"].clone(), start["fc.bias"].clone()

    def gradient(w, b, x, y):  # of the mean cross-entropy of a linear model
        error = torch.softmax(x @ w.T + b, 1) - F.one_hot(y, 3)
        return error.T @ x / len(y), error.mean(0)

    for i, rows in enumerate(inner):
        gw, gb = gradient(w, b, x[rows], y[rows])
        other = outer[i % len(outer)] if outer else []
        if len(other):
            gw, gb = gradient(w - alpha * gw, b - alpha * gb, tx[other], ty[other])
            w, b = w - beta * gw, b - beta * gb
    return {"fc.weight": w, "fc.bias": b}


def test_a_step_program_with_two_streams_equals_its_formula_both_ways():
    net, data = toys.linear(6, 3), toys.federation([14, 2, 30, 1, 9], (6,), 3)
    shared, program = net.init(0), per_fedavg(0.3, 0.2)
    tasks = mapped_tasks(net, range(5))
    looped = toys.each(net, program, tasks, data, shared)
    mapped = toys.each(net, program, tasks, data, shared, "vmap", width=3)
    for client, ((a, la, sa), (b, lb, sb)) in enumerate(zip(looped, mapped, strict=True)):
        expected = per_fedavg_by_hand(shared, data, client, 0.3, 0.2)
        assert toys.distance(a, expected) < 1e-5, client  # client 3 has no test rows at all
        assert toys.distance(b, expected) < 1e-5, client
        assert la == pytest.approx(lb, rel=1e-4) and sa == sb
    assert not toys.same_bits(looped[0][0], shared)


def test_noise_of_a_step_program_is_each_clients_and_each_steps_own():
    net, data = toys.linear(6, 3), toys.all_train([10, 4], (6,), 3)

    def init(net, params, kept, inputs):
        return {"drawn": torch.zeros(3), "last": torch.zeros(3), "w": params}

    def step(net, local, batch, noise, inputs):
        draw = noise.uniform((3,), salt=7)
        return local | {"drawn": local["drawn"] + draw, "last": draw}, {}

    def final(net, local, inputs):
        return ClientResult({"drawn": local["drawn"], "last": local["last"]})

    program = StepProgram(init, step, final, {"data": STREAM})
    tasks, shared = mapped_tasks(net, [0, 1]), net.init(0)
    ways = [toys.each(net, program, tasks, data, shared, way) for way in ("loop", "vmap")]
    for client, steps in ((0, 6), (1, 2)):
        key = seeds.key(0, "noise", round=1, client=client)
        draws = [seeds.uniform(torch.tensor(key + i), (3,), salt=7) for i in range(steps)]
        for found in ways:
            assert torch.allclose(found[client][0]["drawn"], torch.stack(draws).sum(0))
            assert torch.equal(found[client][0]["last"], draws[-1])


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_task_starts_from_the_tree_that_it_names(way):
    net, data = toys.mlp(), toys.all_train([5, 9, 6], (6,), 3)
    algorithm = toys.OneProgram(toys.setting(net), loss_program())
    trees = {4: net.init(1), 7: net.init(2)}
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")
    tasks = [replace(toys.task(net, c), shared=v) for c, v in enumerate((7, 4, 7))]
    bundle = TrainBundle(0, 1, tuple(tasks), toys.choices(tasks, way), 1.0)
    update = worker.run(bundle, trees).update
    trained = []
    for task in tasks:
        params, _ = reference.train_client(
            net,
            trees[task.shared],
            toys.FULL,
            data,
            task.client,
            RULES["sgd"],
            STREAM,
            seed=0,
            round=1,
        )
        trained.append((task, params))
    expected = reference.indexed_mean(net, trees[4], trained)
    assert toys.distance(aggregate.finish(update, net.space, trees[4]), expected) < 1e-5


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_second_stream_without_rows_for_anyone_is_empty_not_an_error(way):
    net, data = toys.linear(6, 3), toys.all_train([5, 3], (6,), 3)
    shared = net.init(0)
    found = toys.each(net, per_fedavg(0.1, 0.1), mapped_tasks(net, [0, 1]), data, shared, way)
    for params, loss, _ in found:
        assert toys.distance(params, shared) == 0 and loss == 0


def pfedme(rate, pull, *, merge_every):
    """pFedMe: a personal model pulled to w; every few steps w moves towards it instead."""

    def init(net, params, kept, inputs):
        del net, inputs
        return {"w": params, "mine": {n: kept[f"mine.{n}"] for n in params}}

    def kind(number):
        return "merge" if number % merge_every == merge_every - 1 else "train"

    def step(net, local, batch, noise, inputs, kind):
        del noise, inputs
        w, mine = local["w"], local["mine"]
        gradient, loss = _gradient(net, mine, batch["data"])
        if kind == "train":
            g = {n: gradient[n] + pull * (mine[n] - w[n]) for n in w}
            return {"w": w, "mine": _minus(mine, g, rate)}, {"loss": loss}
        return {"w": {n: 0.5 * (w[n] + mine[n]) for n in w}, "mine": mine}, {"loss": loss}

    def final(net, local, inputs):
        del net, inputs
        return ClientResult(local["w"], kept={f"mine.{n}": v for n, v in local["mine"].items()})

    return StepProgram(init, step, final, {"data": Stream(batch=4, epochs=3)}, kind)


def test_alternating_kinds_and_kept_state_equal_the_formula_both_ways():
    net, data = toys.linear(6, 3), toys.all_train([10, 4, 7], (6,), 3)
    shared = net.init(0)
    own = [{f"mine.{n}": v + 0.1 * k for n, v in shared.items()} for k in range(3)]
    program, tasks = pfedme(0.2, 1.5, merge_every=3), mapped_tasks(net, range(3))
    algorithm = toys.OneProgram(toys.setting(net), program, "collect", own=own[0])
    results = {
        way: toys.run_bundle(algorithm, tasks, data, shared, way, own=own)
        for way in ("loop", "vmap")
    }
    for k in range(3):
        w, mine = shared, {n: v + 0.1 * k for n, v in shared.items()}
        x, y, _ = data.block(np.array([k]), "train")
        schedule = batches.steps(Stream(batch=4, epochs=3), len(y), seed=0, round=1, client=k)
        for i, rows in enumerate(schedule):
            if i % 3 == 2:
                w = {n: 0.5 * (w[n] + mine[n]) for n in w}
                continue
            leaves = {n: v.clone().requires_grad_() for n, v in mine.items()}
            logits = torch.from_numpy(x[rows]) @ leaves["fc.weight"].T + leaves["fc.bias"]
            F.cross_entropy(logits, torch.from_numpy(y[rows])).backward()
            mine = {n: v - 0.2 * (leaves[n].grad + 1.5 * (v - w[n])) for n, v in mine.items()}
        for result in results.values():
            assert toys.distance(result.collected[k].result.update, w) < 1e-5
            kept = {n.removeprefix("mine."): v for n, v in result.kept[k].items()}
            assert toys.distance(kept, mine) < 1e-5


def test_a_step_program_may_write_batch_norm_statistics_without_touching_others():
    """BatchNorm updates the tensors it is given in place; clients of one map share their start."""
    net = toys.mlp(norm=True)
    data, shared = toys.all_train([8, 8, 8], (6,), 3), net.init(0)

    def step(net, local, batch, noise, inputs):
        net(local, batch["data"].x)
        return local, {}

    program = StepProgram(
        lambda net, params, kept, inputs: dict(params),
        step,
        lambda net, local, inputs: ClientResult(local),
        {"data": STREAM},
    )
    together = toys.each(net, program, mapped_tasks(net, [0, 1, 2]), data, shared)
    for client in range(3):
        alone = toys.each(net, program, [toys.task(net, client)], data, shared)
        assert toys.same_bits(together[client][0], alone[0][0])


# --- form (c): plain Python -----------


def test_a_run_program_sees_its_slice_its_data_and_its_own_generator():
    net, data = toys.mlp(), toys.federation([10, 20], (6,), 3)
    shared, map = net.init(0), IndexMap.of({"fc0": [1, 3, 4]})

    def run(context):
        assert context.kept is None and context.task.map == map
        x, y = context.data("train")
        with torch.no_grad():
            logits = functional_call(context.supernet.module(map), context.params, (x,))
        draw = context.generator("search").random()
        return ClientResult(
            {"fc0.bias": context.params["fc0.bias"] + 1},
            report={"right": int((logits.argmax(1) == y).sum()), "draw": draw},
            metrics={"loss": float(F.cross_entropy(logits, y))},
        )

    algorithm = toys.OneProgram(toys.setting(net), RunProgram(run))
    tasks = [toys.task(net, c, map, samples=int(n)) for c, n in ((0, 8), (1, 16))]
    result = toys.run_bundle(algorithm, tasks, data, shared)
    small = reference.cut(net, shared, map)
    for client in (0, 1):
        x, y, _ = data.block(np.array([client]), "train")
        hidden = F.relu(torch.from_numpy(x) @ small["fc0.weight"].T + small["fc0.bias"])
        hidden = F.relu(hidden @ small["fc1.weight"].T + small["fc1.bias"])
        logits = hidden @ small["head.weight"].T + small["head.bias"]
        truth = torch.from_numpy(y)
        assert result.reports[client]["right"] == int((logits.argmax(1) == truth).sum())
        assert result.reports[client]["draw"] == (
            seeds.generator(0, "search", round=1, client=client).random()
        )
        loss = float(F.cross_entropy(logits, truth))
        assert result.table["loss"][client] == pytest.approx(loss, rel=1e-5)
    merged = aggregate.finish(result.update, net.space, shared)["fc0.bias"]
    expected = shared["fc0.bias"].clone()
    expected[[1, 3, 4]] += 1
    assert torch.allclose(merged, expected)


# --- what a bundle returns -----------------------------------------------------------------------


def ones_like_size(start, trained, kept, inputs):
    """Uploads a tensor that says who sent it, and keeps the live buffers of the trained network."""
    del start
    count = {} if kept is None else {"seen": kept["seen"] + 1}
    return ClientResult({"fc.bias": inputs["value"]}, kept=count | {"w": trained["fc.weight"]})


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_finish_makes_the_result_and_kept_state_is_each_clients_own(way):
    net, data = toys.linear(2, 3, bias=True), toys.all_train([5, 8, 3], (2,), 3)
    program = loss_program(finish=ones_like_size)
    first = {"seen": torch.tensor(0)}
    algorithm = toys.OneProgram(toys.setting(net), program, own=first)
    tasks = [
        toys.task(net, c, weight=float(c + 1), inputs={"value": torch.full((3,), 10.0 * c)})
        for c in range(3)
    ]
    own = [None, {"seen": np.array(4)}, None]
    shared = net.init(0)
    result = toys.run_bundle(algorithm, tasks, data, shared, way, own=own)
    assert [int(k["seen"]) for k in result.kept] == [1, 5, 1]
    plain = toys.each(net, loss_program(), tasks, data, shared, way)
    for kept, (trained, *_) in zip(result.kept, plain, strict=True):
        assert torch.equal(kept["w"], trained["fc.weight"])  # not the buffers of a later client
    merged = aggregate.finish(result.update, net.space, shared)
    assert merged["fc.bias"].tolist() == pytest.approx([(0 * 1 + 10 * 2 + 20 * 3) / 6] * 3)
    assert torch.equal(merged["fc.weight"], shared["fc.weight"])  # nobody returned it
    # A 3-vector up, no map; three times the multiply-accumulates of the rows seen (2 epochs).
    assert result.table["bytes_up"].tolist() == [12] * 3
    assert result.table["flops"].tolist() == [3 * 6 * 10, 3 * 6 * 16, 3 * 6 * 6]


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
def test_a_task_may_have_steps_of_its_own(way):
    net, data = toys.linear(2, 3), toys.all_train([8, 8, 8], (2,), 3)
    tasks = [replace(toys.task(net, c, samples=8), steps=steps) for c, steps in enumerate((1, 4))]
    found = toys.run_bundle(
        toys.OneProgram(toys.setting(net), loss_program()), tasks, data, net.init(0), way
    )
    assert found.table["steps"].tolist() == [1, 4]
    # Two epochs of two steps are what the stream says, and what four steps of one's own are.
    plain = toys.each(net, loss_program(), [toys.task(net, 1)], data, net.init(0), way)
    own = toys.each(net, loss_program(), tasks[1:], data, net.init(0), way)
    assert toys.same_bits(own[0][0], plain[0][0])


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_the_local_test_is_of_the_clients_own_network(way):
    net, data = toys.linear(2, 3), toys.federation([40, 40], (2,), 3)

    def finish(start, trained, kept, inputs):
        constant = {n: torch.zeros_like(v) for n, v in trained.items()}
        constant["fc.bias"][1] = 1.0  # always says class 1
        return ClientResult(trained, local=constant)

    algorithm = toys.OneProgram(toys.setting(net), loss_program(finish=finish))
    tasks = [toys.task(net, c) for c in range(2)]
    found = toys.run_bundle(algorithm, tasks, data, net.init(0), way, local_test=True)
    block = data.block(np.arange(2), "test")
    expected = [
        (block.y[a:b] == 1).mean() for a, b in zip(block.offsets, block.offsets[1:], strict=False)
    ]
    assert found.table["acc_local"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_units_that_the_client_chose_say_where_its_update_goes(way):
    """Two clients download everything and upload the units that they chose themselves."""
    net, data = toys.mlp(hidden=(4,)), toys.all_train([6, 6], (6,), 3)
    shared = net.init(0)

    def finish(start, trained, kept, inputs):
        mask = inputs["mask"] > 0
        map = IndexMap.from_masks({"fc0": mask.numpy()})
        small = net.space.extract({n: torch.ones_like(v) for n, v in trained.items()}, map)
        return ClientResult({n: v * inputs["value"] for n, v in small.items()}, units={"fc0": mask})

    masks = ([1, 0, 1, 0], [0, 0, 1, 1])
    tasks = [
        toys.task(
            net,
            c,
            weight=w,
            inputs={"mask": torch.tensor(mask), "value": torch.tensor(v)},
        )
        for c, (mask, w, v) in enumerate(zip(masks, (1.0, 3.0), (2.0, 6.0), strict=True))
    ]
    algorithm = toys.OneProgram(toys.setting(net), loss_program(finish=finish))
    result = toys.run_bundle(algorithm, tasks, data, shared, way)
    merged = aggregate.finish(result.update, net.space, shared)
    both = (1 * 2 + 3 * 6) / 4
    assert merged["fc0.bias"].tolist() == pytest.approx([2, shared["fc0.bias"][1].item(), both, 6])
    assert merged["head.bias"].tolist() == pytest.approx([both] * 3)
    assert aggregate.coverage_counts(result.update, net.space)["fc0"].tolist() == [1, 0, 2, 1]
    # 2 of 4 units: 2*6 + 2 weights of fc0, 3*2 + 3 of the head, and ceil(4 / 8) bytes of map.
    assert result.table["bytes_map"].tolist() == [1, 1]
    assert result.table["bytes_up"].tolist() == [4 * (14 + 9) + 1] * 2
    # A row through what they return takes 6*2 + 2*3; through what they trained 6*4 + 4*3.
    assert result.table["macs"].tolist() == [18] * 2
    assert result.table["flops"].tolist() == [3 * 36 * 12] * 2


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_step_is_charged_for_each_of_its_passes(way):
    net, data = toys.linear(2, 3), toys.all_train([5, 8], (2,), 3)
    program = StepProgram(
        lambda net, params, kept, inputs: params,
        lambda net, local, batch, noise, inputs: (
            local,
            {"loss": batch["data"].mean(net(local, batch["data"].x).sum(1))},
        ),
        lambda net, local, inputs: ClientResult(local),
        {"data": Stream(batch=4, epochs=3)},
        passes=2.5,
    )
    algorithm = toys.OneProgram(toys.setting(net), program)
    tasks = [toys.task(net, client) for client in (0, 1)]
    result = toys.run_bundle(algorithm, tasks, data, net.init(0), way)
    assert result.table["flops"].tolist() == [3 * 6 * 15 * 2.5, 3 * 6 * 24 * 2.5]


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_collected_results_come_in_task_order_and_stay_what_they_were(way):
    net, data = toys.mlp(), toys.all_train([5, 9, 3, 7], (6,), 3)
    algorithm = toys.OneProgram(toys.setting(net), loss_program(), "collect")
    tasks, shared = mapped_tasks(net, [2, 0, 3, 1]), net.init(0)
    result = toys.run_bundle(algorithm, tasks, data, shared, way)
    assert result.update is None
    assert [item.task.client for item in result.collected] == [2, 0, 3, 1]
    for item, (params, *_) in zip(
        result.collected, toys.each(net, loss_program(), tasks, data, shared, way), strict=True
    ):
        assert toys.same_bits(item.result.update, params)


@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_client_that_diverged_is_left_out_of_the_sum_and_others_are_whole(way, poison):
    net = toys.mlp()
    data = toys.all_train([5, 9, 6], (6,), 3)
    data._x[data._offsets[1] : data._offsets[2]] = float(poison)
    shared, tasks = net.init(0), mapped_tasks(net, [0, 1, 2])
    finish = lambda start, trained, kept, inputs: ClientResult(  # noqa: E731
        trained, kept={"n": kept["n"] + 1}, report={"was": "here"}
    )
    algorithm = toys.OneProgram(
        toys.setting(net), loss_program(finish=finish), own={"n": torch.zeros(())}
    )
    result = toys.run_bundle(algorithm, tasks, data, shared, way)
    assert result.table["status"].tolist() == ["ok", "skipped", "ok"]
    assert result.update.clients == 2
    alone = toys.run_bundle(algorithm, [tasks[0], tasks[2]], data, shared, way)
    a, b = (aggregate.finish(r.update, net.space, shared) for r in (result, alone))
    assert toys.distance(a, b) < 1e-6
    assert result.kept[1] is None and result.kept[0] is not None
    assert sorted(result.reports) == [0, 2]


def enormous(net, statistics):
    """A bundle of three clients; the inputs of the second are finite, their variance is not."""
    data = toys.all_train([5, 9, 6], (6,), 3)
    data._x[data._offsets[1] : data._offsets[2]] *= 1e25
    fleet = toys.setting(net, rule=LocalRule(lr=1e-3), stream=STREAM)
    algorithm = FedPA(fleet, statistics=statistics)
    state = algorithm.init(net.init(0))
    return algorithm, *toys.one_round(algorithm, data, state, [0, 1, 2])


@pytest.mark.parametrize("statistics", ["indexed_mean", "local"])
def test_statistics_that_overflow_are_neither_merged_nor_kept(statistics):
    algorithm, after, result = enormous(toys.mlp(norm=True), statistics)
    assert np.isfinite(result.table["loss"]).all()  # nothing else tells
    assert result.table["status"].tolist() == ["ok", "skipped", "ok"]
    assert result.update.clients == 2
    assert all(torch.isfinite(v).all() for v in algorithm.model(after).values())
    assert result.kept[1] is None and (result.kept[0] is not None) == (statistics == "local")


@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize("where", ["update", "kept"])
def test_what_finish_makes_of_sound_weights_must_be_finite_too(way, where):
    net, data = toys.mlp(), toys.all_train([5, 9], (6,), 3)

    def finish(start, trained, kept, inputs):
        ratio = {"head.bias": trained["head.bias"] / inputs["by"]}
        count = {"n": torch.tensor(3)}  # whole numbers are finite
        if where == "update":
            return ClientResult(ratio, kept=count)
        return ClientResult(trained, kept=count | ratio)

    tasks = [toys.task(net, c, inputs={"by": torch.tensor(float(c))}) for c in (0, 1)]
    algorithm = toys.OneProgram(
        toys.setting(net), loss_program(finish=finish), own={"n": torch.tensor(0)}
    )
    result = toys.run_bundle(algorithm, tasks, data, net.init(0), way)
    assert result.table["status"].tolist() == ["skipped", "ok"]
    assert result.update.clients == 1 and result.kept[0] is None and result.kept[1] is not None


def test_kept_state_of_a_run_program_must_be_finite():
    net, data = toys.mlp(), toys.all_train([5, 9], (6,), 3)
    run = lambda context: ClientResult(  # noqa: E731
        {"head.bias": torch.zeros(3)}, kept={"v": 1 / context.inputs["by"]}
    )
    tasks = [toys.task(net, c, inputs={"by": torch.tensor(float(c))}) for c in (0, 1)]
    algorithm = toys.OneProgram(toys.setting(net), RunProgram(run), own={"v": torch.zeros(())})
    result = toys.run_bundle(algorithm, tasks, data, net.init(0))
    assert result.table["status"].tolist() == ["skipped", "ok"]


def test_networks_are_kept_for_a_bounded_number_of_variants():
    net = toys.mlp(hidden=(40, 4))
    data, shared = toys.all_train([5] * 40, (6,), 3), net.init(0)
    algorithm = toys.OneProgram(toys.setting(net), loss_program())
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")
    tasks = [
        toys.task(net, i, IndexMap.prefix({"fc0": i + 1, "fc1": k}))
        for k in (1, 2)
        for i in range(40)
    ]
    first = toys.run_bundle(algorithm, tasks[:1], data, shared, worker=worker)
    for k in range(2):
        toys.run_bundle(algorithm, tasks[40 * k : 40 * k + 40], data, shared, worker=worker)
    held = worker.engine._residents
    assert len(held) == 64 and next(reversed(held)).variant == "(40, 2)"
    assert ("(1, 1)", "contiguous") not in held
    again = toys.run_bundle(algorithm, tasks[:1], data, shared, worker=worker)
    a, b = (aggregate.finish(r.update, net.space, shared) for r in (first, again))
    assert toys.same_bits(a, b)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_the_sum_of_a_bundle_is_the_weighted_mean_of_its_clients(way):
    net, data = toys.cnn(), toys.all_train(SIZES, (1, 8, 8), 4)
    half = IndexMap.prefix({"conv1": 2, "conv2": 3, "fc1": 5})
    tasks = [
        toys.task(net, c, (toys.FULL, half)[c >= 3], weight=float(n)) for c, n in enumerate(SIZES)
    ]
    shared = net.init(2)
    algorithm = toys.OneProgram(toys.setting(net), loss_program())
    result = toys.run_bundle(algorithm, tasks, data, shared, way)
    trained = []
    for task in tasks:
        start = reference.cut(net, shared, task.map)
        params, _ = reference.train_client(
            net, start, task.map, data, task.client, RULES["sgd"], STREAM, seed=0, round=1
        )
        trained.append((task, params))
    expected = reference.indexed_mean(net, shared, trained)
    assert toys.distance(aggregate.finish(result.update, net.space, shared), expected) < 1e-5


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_bundle_run_again_gives_the_same_bits_whatever_ran_before(way):
    net = toys.cnn("none" if way == "vmap" else "batch")
    data, shared = toys.federation(SIZES, (1, 8, 8), 4), net.init(0)
    algorithm = toys.OneProgram(toys.setting(net), loss_program(RULES["momentum"]))
    tasks = mapped_tasks(net, [0, 2, 4])
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")

    def once(tasks, worker):
        found = toys.run_bundle(algorithm, tasks, data, shared, way, local_test=True, worker=worker)
        return aggregate.finish(found.update, net.space, shared), found.table

    first, table = once(tasks, worker)
    once(mapped_tasks(net, [5, 1]), worker)
    again, again_table = once(tasks, worker)
    elsewhere, _ = once(tasks, Worker(Work(net, algorithm, Scaling(), 0), data, "cpu"))
    assert toys.same_bits(first, again) and toys.same_bits(first, elsewhere)
    assert table["acc_local"].tolist() == again_table["acc_local"].tolist()


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_local_accuracy_is_the_trained_networks_own_on_the_test_part(way):
    net, data = toys.mlp(), toys.federation([15, 1, 10], (6,), 3)
    algorithm = toys.OneProgram(toys.setting(net), loss_program())
    tasks, shared = mapped_tasks(net, [0, 1, 2]), net.init(0)
    result = toys.run_bundle(algorithm, tasks, data, shared, way, local_test=True)
    for client in (0, 2):
        params, _ = reference.train_client(
            net, shared, toys.FULL, data, client, RULES["sgd"], STREAM, seed=0, round=1
        )
        x, y, _ = data.block(np.array([client]), "test")
        logits = functional_call(net.module(), params, (torch.from_numpy(x),))
        right = (logits.argmax(1) == torch.from_numpy(y)).float().mean()
        assert result.table["acc_local"][client] == pytest.approx(float(right))
    assert np.isnan(result.table["acc_local"][1])  # one sample: nothing to test on


def test_dropout_draws_are_the_clients_own_and_not_the_hosts():
    net, data = dropping(), toys.all_train([6, 9, 5], (6,), 3)
    shared, program = net.init(0), loss_program()
    together = toys.each(net, program, mapped_tasks(net, [0, 1, 2]), data, shared)
    torch.rand(17)
    alone = toys.each(net, program, [toys.task(net, 2)], data, shared)
    assert toys.same_bits(together[2][0], alone[0][0])


def test_a_mask_that_keeps_nothing_is_refused():
    net, data = toys.mlp(hidden=(4,)), toys.all_train([6], (6,), 3)
    finish = lambda *a: ClientResult({}, units={"fc0": torch.zeros(4, dtype=torch.bool)})  # noqa
    algorithm = toys.OneProgram(toys.setting(net), loss_program(finish=finish))
    with pytest.raises(InputError, match="keeps no unit"):
        toys.run_bundle(algorithm, [toys.task(net, 0)], data, net.init(0))
