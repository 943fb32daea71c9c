"""Norms, dropout and rates by round: the same numbers by every way of computing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.func import grad_and_value

from subfleet.core import seeds
from subfleet.core.budget import width_map
from subfleet.core.program import ClientResult, LocalRule, Noise, StepProgram, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.schedule import Schedule
from subfleet.models import chain, supernet
from subfleet.platform import batches
from subfleet.platform.engine import Work
from subfleet.platform.layers import FIRST_SALT, Step, adopt
from subfleet.platform.record import Choice, possible
from subfleet.platform.resident import Resident
from subfleet.platform.worker import Worker

SIZES = [13, 4, 9, 1, 22, 8]  # 4, 1, 3, 1, 6, 2 batches of 4: uneven steps and part batches
RULES = {
    "sgd": LocalRule(lr=0.2),
    "decay": LocalRule(lr=0.2, momentum=0.5, weight_decay=0.05),
    "clip": LocalRule(lr=0.2, momentum=0.3, clip_norm=0.4),
    "proximal": LocalRule(lr=0.2, proximal=0.7),
}
STREAM = Stream(batch=4, epochs=2)


def loss_program(rule=RULES["sgd"], stream=STREAM):
    return toys.loss_program(rule, stream)


def tasks_of(net, count, map=toys.FULL):
    return [toys.task(net, client, map) for client in range(count)]


def dropping_images(norm):
    """Whole channels and single units are dropped, by layers that are no chain's alone."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)]
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    kept = [layer for layer in layers if norm == "batch" or not isinstance(layer, norms)]
    return chain("dropping", nn.Sequential(*kept, nn.Linear(8, 4)), (1, 8, 8))


@pytest.mark.parametrize("rule", ["sgd", "decay", "clip"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_all_ways_draw_the_same_dropout(norm, rule):
    """Of single units and of whole channels, with part batches and uneven steps."""
    net, data = dropping_images(norm), toys.all_train(SIZES, (1, 8, 8), 4)
    tasks, shared = tasks_of(net, len(SIZES)), net.init(0)
    assert possible(net, loss_program()) == {"loop", "traced", "vmap"}
    rule = replace(RULES[rule], lr=0.05)  # norms of two rows amplify rounding
    looped, *others = (
        toys.each(net, loss_program(rule), tasks, data, shared, way)
        for way in ("loop", "traced", "vmap")
    )
    for other in others:
        for (a, loss_a, _), (b, loss_b, _) in zip(other, looped, strict=True):
            assert toys.distance(a, b) < 1e-5
            assert loss_a == pytest.approx(loss_b, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
def test_dropout_by_hand(way):
    """Units are kept where the step's draws reach p, and scaled by 1 / (1 - p)."""
    layers = nn.Sequential(nn.Dropout(0.25), nn.Linear(6, 3), nn.Dropout(0.5))
    net, data = chain("dropped", layers, (6,)), toys.all_train([4], (6,), 3)
    shared, stream = net.init(0), Stream(batch=None)
    ((params, *_),) = toys.each(
        net, loss_program(stream=stream), tasks_of(net, 1), data, shared, way
    )
    (rows,) = batches.steps(stream, 4, seed=0, round=1, client=0)
    x, y, _ = data.block(np.array([0]), "train")
    noise = Noise(seeds.key(0, "noise", round=1, client=0))
    first = (noise.uniform((4, 6), salt=FIRST_SALT) >= 0.25) / 0.75
    second = (noise.uniform((4, 3), salt=FIRST_SALT + 1) >= 0.5) / 0.5
    assert 0 < int((first == 0).sum()) < 24 and 0 < int((second == 0).sum()) < 12
    leaves = {name: value.clone().requires_grad_() for name, value in shared.items()}
    logits = second * F.linear(torch.from_numpy(x[rows]) * first, *leaves.values())
    F.cross_entropy(logits, torch.from_numpy(y[rows])).backward()
    expected = {name: leaf.detach() - 0.2 * leaf.grad for name, leaf in leaves.items()}
    assert toys.distance(params, expected) < 1e-6


def test_a_layer_that_is_used_twice_draws_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(64, 2)

        def forward(self, x):
            return self.fc(self.drop(x) * self.drop(x))

    net = supernet(Twice(), torch.zeros(1, 64))
    choice = Choice("()", "cpu", "loop")
    resident = Resident(net, toys.FULL, choice)
    resident.load({"fc.weight": torch.eye(2, 64), "fc.bias": torch.zeros(2)})
    x = torch.ones(500, 64)
    with resident.step.entered(Noise(3)):
        once = resident(resident.params, x)
        again = resident(resident.params, x)
    assert float((once > 0).float().mean()) == pytest.approx(0.25, abs=0.03)  # not 0.5
    assert not torch.equal(once, again)
    with resident.step.entered(Noise(3)):
        assert torch.equal(resident(resident.params, x), once)


def sgd_steps(rate):
    """SGD as a step program."""

    def step(net, local, batch, noise, inputs):
        def loss(params):
            x, y, _ = batch["data"]
            return batch["data"].mean(F.cross_entropy(net(params, x), y, reduction="none"))

        slopes, value = grad_and_value(loss)(local)
        return {n: w - rate * slopes[n] for n, w in local.items()}, {"loss": value}

    return StepProgram(
        lambda net, params, kept, inputs: dict(params),
        step,
        lambda net, local, inputs: ClientResult(local),
        {"data": STREAM},
    )


def test_step_programs_drop_the_same_units_both_ways():
    net, data = dropping_images("none"), toys.all_train([10, 4, 7], (1, 8, 8), 4)
    shared, program = net.init(0), sgd_steps(0.2)
    assert possible(net, program) == {"loop", "vmap"}
    ways = [
        toys.each(net, program, tasks_of(net, 3), data, shared, way) for way in ("loop", "vmap")
    ]
    for (a, *_), (b, *_) in zip(*ways, strict=True):
        assert toys.distance(a, b) < 1e-5


SCHEDULE = Schedule("exponential", warmup=2, decay=0.5)  # 1/3, 2/3, 1, 1/2, 1/4, ...


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
@pytest.mark.parametrize("rule", ["decay", "clip"])
@pytest.mark.parametrize(("round", "factor"), [(1, 1 / 3), (3, 1.0), (5, 0.25)])
def test_the_rate_is_that_of_the_round(way, rule, round, factor):
    net, data = toys.mlp(norm=True), toys.all_train(SIZES, (6,), 3)
    tasks, shared = tasks_of(net, len(SIZES)), net.init(0)
    rule = RULES[rule]
    scheduled, plain = (
        toys.each(net, loss_program(given), tasks, data, shared, way, round=round)
        for given in (replace(rule, schedule=SCHEDULE), replace(rule, lr=rule.lr * factor))
    )
    for (a, *_), (b, *_) in zip(scheduled, plain, strict=True):
        assert toys.distance(a, b) < 1e-7


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_a_round_of_another_rate_is_not_traced_anew(way):
    net, data = toys.mlp(), toys.all_train([12, 8], (6,), 3)
    program = loss_program(replace(RULES["sgd"], schedule=SCHEDULE))
    algorithm, shared = toys.OneProgram(toys.setting(net), program), net.init(0)
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")
    tasks, traces = tasks_of(net, 2), []
    for round in (1, 2, 3):
        toys.run_bundle(algorithm, tasks, data, shared, way, round=round, worker=worker)
        (resident,) = worker.engine._residents.values()
        traces.append(list(resident.traces._held.values()))
    assert traces[0] and traces[0] == traces[1] == traces[2]


@pytest.mark.parametrize(
    ("norm", "rule"), [*(("batch", rule) for rule in RULES), ("group", "sgd"), ("group", "clip")]
)
def test_norms_side_by_side_equal_the_loop(rule, norm):
    """Running statistics too, of which padded rows and finished clients are no part."""
    net, data = toys.cnn(norm), toys.all_train(SIZES, (1, 8, 8), 4)
    tasks = tasks_of(net, len(SIZES), width_map(net, 0.5))
    shared, program = net.init(1), loss_program(RULES[rule])
    looped = toys.each(net, program, tasks, data, shared)
    for width in (16, 4):
        mapped = toys.each(net, program, tasks, data, shared, "vmap", width=width)
        for (a, loss_a, steps_a), (b, loss_b, steps_b) in zip(mapped, looped, strict=True):
            assert toys.distance(a, b) < 1e-5
            assert loss_a == pytest.approx(loss_b, rel=1e-4, nan_ok=True) and steps_a == steps_b


def test_batch_norm_of_a_part_batch_by_hand():
    """Two clients of 3 and 2 rows in one mapped batch of 3; no weight moves."""
    net, data = toys.mlp(hidden=(4,), norm=True), toys.all_train([3, 2], (6,), 3)
    shared, program = net.init(0), loss_program(LocalRule(lr=0.0), Stream(batch=4))
    found = toys.each(net, program, tasks_of(net, 2), data, shared, "vmap")
    for client, (params, *_) in enumerate(found):
        x, _, _ = data.block(np.array([client]), "train")
        seen = F.linear(torch.from_numpy(x), shared["fc0.weight"], shared["fc0.bias"])
        # momentum 0.1 from mean 0 and variance 1; the variance divides by n - 1
        torch.testing.assert_close(params["norm0.running_mean"], 0.1 * seen.mean(0))
        torch.testing.assert_close(params["norm0.running_var"], 0.9 + 0.1 * seen.var(0))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("affine", [True, False])
def test_weighted_batch_norm_is_that_of_the_real_rows(kind, affine):
    axes = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 2, 3)}[kind]
    plain, ours = kind(5, affine=affine), kind(5, affine=affine)
    for norm in (plain, ours):
        norm.num_batches_tracked = None
    step = Step()
    assert adopt(ours, step)
    x = torch.randn(6, 5, *axes, generator=torch.Generator().manual_seed(0))
    real, padded = (x[:4].clone().requires_grad_(), x.clone().requires_grad_())
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    with step.entered(Noise(0), weight):
        out = ours(padded)
    expected = plain(real)
    torch.testing.assert_close(out[:4], expected, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))
    (out[:4] ** 3).sum().backward()
    (expected**3).sum().backward()
    assert real.grad is not None and padded.grad is not None
    torch.testing.assert_close(padded.grad[:4], real.grad, rtol=1e-4, atol=1e-4)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with step.entered(Noise(0), torch.zeros(6)):
        ours(x)
    assert toys.same_bits(ours.state_dict(), before), "a finished client's"
    with step.entered(Noise(0), weight), pytest.raises(ValueError, match="3 rows of a batch of 6"):
        ours(x[:3])
