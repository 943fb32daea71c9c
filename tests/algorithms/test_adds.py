"""ADDS: what a client learns, sends and is charged, against numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys

from subfleet.algorithms.adds import ADDS
from subfleet.algorithms.fedavg import FedAvg
from subfleet.core import masks, seeds
from subfleet.core.algorithm import Cohort, TierSize
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.unit_rows import UnitRows
from subfleet.core.units import IndexMap
from subfleet.models import adds_mobilenet, sent_lstm, small_cnn, vgg
from subfleet.platform import batches
from subfleet.platform.evaluation import score
from subfleet.platform.metrics import ClientsLog
from subfleet.platform.record import Choice
from subfleet.platform.resident import Resident

SIZES = [30, 24, 41, 28, 36, 22, 33]


def images(sizes=SIZES, seed=1, **options):
    return toys.federation(sizes, (1, 8, 8), 4, seed=seed, **options)


def adds(net=None, rule=None, stream=None, widths=(1.0,), **options):
    setting = toys.setting(
        net or toys.cnn(norm="batch"), widths, rule, stream or Stream(batch=5, epochs=2)
    )
    return ADDS(setting, **options)


def one_round(algorithm, data, ids, params=None, way="loop"):
    net = algorithm.setting.net
    params = net.init(0) if params is None else params
    return toys.one_round(algorithm, data, algorithm.init(params), ids, way=way)


# --- the architecture's steps --------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_the_penalty_alone_shrinks_the_ratio_geometrically(way):
    """Where the classifier reads nothing, F_val has no slope: alpha <- (1 - 2 eta lambda) alpha."""
    algorithm = adds(toys.mlp(), LocalRule(lr=0.0), penalty=1.3, arch_lr=0.01)
    data = toys.federation(SIZES, (6,), 3)
    params = algorithm.setting.net.init(0)
    params["head.weight"].zero_()
    _, result = one_round(algorithm, data, [0, 2], params, way)
    for client in (0, 2):
        trained = Stream(skip=0.1, take=0.9).rows(int(data.sizes(np.array([client]), "train")[0]))
        steps = 2 * math.ceil(trained / 5)
        expected = (1 - 2 * 0.01 * 1.3) ** steps
        ratios = result.reports[client]["ratio"]
        assert list(ratios) == ["fc0", "fc1"]
        assert list(ratios.values()) == pytest.approx([expected] * 2, rel=1e-5)
        assert result.reports[client]["units"] == {
            g: int(expected * c + 0.5) for g, c in {"fc0": 8, "fc1": 4}.items()
        }


def test_the_ratio_stays_within_its_bounds():
    algorithm = adds(penalty=30.0, arch_lr=0.5, least_ratio=0.2)
    _, result = one_round(algorithm, images(), [0, 1])
    ratios = [r for c in (0, 1) for r in result.reports[c]["ratio"].values()]
    assert ratios == pytest.approx([0.2] * 6)


def test_the_task_pulls_against_the_penalty():
    """Without one, and from one half, learning alone moves ratios: not all by the same."""
    algorithm = adds(ratio=0.5, penalty=0.0, arch_lr=0.5, rule=LocalRule(lr=0.1))
    _, result = one_round(algorithm, images(), [0, 1, 2])
    found = {round(r, 4) for c in range(3) for r in result.reports[c]["ratio"].values()}
    assert len(found) > 3 and 0.5 not in found


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_frozen_at_one_it_is_fedavg_bit_for_bit(norm):
    net = small_cnn(input_shape=(1, 8, 8), num_classes=4, channels=(4, 6), hidden=10, norm=norm)
    rule = LocalRule(lr=0.05, momentum=0.9, weight_decay=0.01, clip_norm=1.0)
    frozen = adds(net, rule, arch_lr=0.0, weighting="samples")
    setting = replace(frozen.setting, stream=replace(frozen.setting.stream, skip=0.1, take=1 - 0.1))
    state, _ = one_round(frozen, images(), [0, 1, 2])
    expected, _ = one_round(FedAvg(setting), images(), [0, 1, 2])
    assert toys.same_bits(state["params"], expected["params"])


def test_a_dropped_units_weights_do_not_move():
    """One step with few units kept: the coordinates of the others keep every bit."""
    rule = LocalRule(lr=0.1, momentum=0.9, weight_decay=0.1)
    algorithm = adds(
        toys.mlp(), rule, Stream(batch=None, epochs=1), ratio=0.25, architecture="drawn"
    )
    net, params = algorithm.setting.net, algorithm.setting.net.init(0)
    _, result = one_round(algorithm, toys.federation([40], (6,), 3), [0], params)
    (report,) = result.reports.values()
    assert report["units"]["fc0"] < 8
    state, _ = one_round(algorithm, toys.federation([40], (6,), 3), [0], params)
    moved = (state["params"]["fc0.weight"] != params["fc0.weight"]).any(1)
    assert int(moved.sum()) == report["units"]["fc0"]
    assert net.space.size("fc0") == 8


def test_persistent_ratios_go_on_where_the_client_stopped():
    algorithm = adds(penalty=1.0, persist=True)
    cohort = Cohort(
        np.array([4, 9]),
        np.array([10, 10]),
        np.zeros(2, np.int16),
        np.ones((2, 4), int),
        np.array([1, -1]),
        [{"ratio": {"conv1": 0.3, "conv2": 0.4, "fc1": 0.5}}, None],
    )
    tasks = algorithm.plan(algorithm.init(algorithm.setting.net.init(0)), cohort, 2).tasks
    assert tasks[0].inputs["ratio"].tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert tasks[1].inputs["ratio"].tolist() == [1, 1, 1]
    assert float(tasks[0].inputs["epsilon"]) == pytest.approx(0.98)


def test_the_penalty_follows_the_labels():
    cohort = Cohort(
        np.arange(3),
        np.full(3, 12),
        np.zeros(3, np.int16),
        np.array([[3, 3, 3, 3], [12, 0, 0, 0], [6, 6, 0, 0]]),
        np.full(3, -1),
        [None] * 3,
    )
    algorithm = adds()
    tasks = algorithm.plan(algorithm.init(algorithm.setting.net.init(0)), cohort, 1).tasks
    assert [float(t.inputs["lambda"]) for t in tasks] == pytest.approx([0.5, 1.5, 1.0672], abs=1e-4)
    assert [t.weight for t in tasks] == [1.0] * 3


# --- a whole client against the plain formulas --------------------------------------------------


class Plain:
    """A client of a VGG with three convolutions and two hidden FC layers, by torch alone.

    It shares the order of its rows and the uniform numbers with the platform, and nothing
    else: beta by bisection, masks on what is read, gradients by autograd.
    """

    layers = ("conv1", "conv2", "conv3", "fc1", "fc2")

    def __init__(self, algorithm, data, client, round=1):
        self.given, self.rule, self.round = algorithm, algorithm.setting.rule, round
        ids = np.array([client])
        block = data.block(ids, "train")
        self.x, self.y = torch.from_numpy(block.x), torch.from_numpy(block.y)
        self.rows = {
            name: batches.steps(
                stream, len(block.y), seed=0, round=round, client=client, min_batch=2
            )
            for name, stream in algorithm.phase(round).program.streams.items()
        }
        self.key = seeds.key(0, "noise", round=round, client=client)
        self.sizes = [algorithm.setting.net.space.size(name) for name in self.layers]

    def scores(self, p, x, omega, statistics=True, seen=None):
        for i in (1, 2, 3):
            x = F.relu(x) if i == 1 else F.relu(x) * omega[i - 2].view(1, -1, 1, 1)
            x = F.conv2d(x, p[f"conv{i}.weight"], padding=1)
            held = [p[f"norm{i}.running_mean"], p[f"norm{i}.running_var"]]
            held = held if statistics else [value.clone() for value in held]
            x = F.batch_norm(x, *held, p[f"norm{i}.weight"], p[f"norm{i}.bias"], True, 0.1, 1e-5)
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = (F.relu(x) * omega[2].view(1, -1, 1, 1)).flatten(1)
        for i in (1, 2):
            x = F.relu(F.linear(x, p[f"fc{i}.weight"], p[f"fc{i}.bias"]))
            if seen is not None:
                seen.append(x.detach().mean(0).double())
            x = x * omega[2 + i].view(1, -1)
        return F.linear(x, p["fc3.weight"], p["fc3.bias"])

    def probabilities(self, b, ratio, epsilon):
        if ratio >= 1 - 1e-6:
            return torch.ones_like(b), torch.zeros_like(b)
        low, high = float(b.min()) - 50 * epsilon, float(b.max()) + 50 * epsilon
        for _ in range(200):
            beta = (low + high) / 2
            more = float(torch.sigmoid((b - beta) / epsilon).sum()) > ratio * len(b)
            low, high = (beta, high) if more else (low, beta)
        p = torch.sigmoid((b - beta) / epsilon)
        return p, len(b) * p * (1 - p) / (p * (1 - p)).sum()

    def run(self, start, penalty):
        given, rule = self.given, self.rule
        epsilon = given.epsilon * given.epsilon_decay ** (self.round - 1)
        p = {name: value.clone() for name, value in start.items()}
        velocity = {n: torch.zeros_like(v) for n, v in p.items() if "running" not in n}
        ratio, active = [given.ratio] * 5, [torch.zeros(s) for s in self.sizes[3:]]
        for step, rows in enumerate(self.rows["train"]):
            b = [p[f"norm{i}.weight"].abs().double() for i in (1, 2, 3)]
            b = [v / v.max().clamp(min=1e-30) for v in (*b, *(a.double() for a in active))]
            uniform = seeds.uniform(torch.tensor(self.key + step), (5, max(self.sizes)))
            omega, slopes = [], []
            for g, size in enumerate(self.sizes):
                keep, slope = self.probabilities(b[g], ratio[g], epsilon)
                drawn = (uniform[g, :size] < keep).float()
                if not drawn.any():
                    drawn[keep.argmax()] = 1
                omega.append(drawn.requires_grad_())
                slopes.append(slope)
            some = self.rows["val"][step % len(self.rows["val"])]
            loss = F.cross_entropy(self.scores(p, self.x[some], omega, False), self.y[some])
            for g, grad in enumerate(torch.autograd.grad(loss, omega)):
                slope = float((grad.double() * slopes[g]).sum()) + 2 * penalty * ratio[g]
                ratio[g] = min(1.0, max(given.least_ratio, ratio[g] - given.arch_lr * slope))
            omega = [drawn.detach() for drawn in omega]
            seen = []
            leaves = {n: v.clone().requires_grad_() for n, v in p.items() if n in velocity}
            scores = self.scores(p | leaves, self.x[rows], omega, seen=seen)
            grads = torch.autograd.grad(F.cross_entropy(scores, self.y[rows]), [*leaves.values()])
            # The mean with weights 1, 0.9, 0.81, ... from the newest on.
            share = 0.1 / (1 - 0.9 ** (step + 1))
            active = [a + (s - a) * share for a, s in zip(active, seen, strict=True)]
            left = masks.coverage(
                leaves, dict(zip(self.layers, omega, strict=True)), given.setting.net.space
            )
            for (name, w), grad in zip(leaves.items(), grads, strict=True):
                v = rule.momentum * velocity[name] + grad + rule.weight_decay * w
                velocity[name] = v.detach()
                p[name] = (w - rule.lr * v * left.get(name, 1.0)).detach()
        return ratio, p


@pytest.mark.parametrize("round", [1, 30])
def test_a_client_equals_the_plain_formulas(round):
    net = vgg(width=0.125, input_shape=(1, 12, 12), num_classes=5)
    rule = LocalRule(lr=0.05, momentum=0.9, weight_decay=0.01)
    options = {"penalty": 0.7, "arch_lr": 0.05, "ratio": 0.8, "epsilon": 0.5}
    algorithm = adds(net, rule, Stream(batch=7, epochs=2), **options)
    data, start = toys.federation([50], (1, 12, 12), 5, seed=3), net.init(0)
    state, result = toys.one_round(algorithm, data, algorithm.init(start), [0], round=round)
    ratio, expected = Plain(algorithm, data, 0, round).run(start, 0.7)
    assert list(result.reports[0]["ratio"].values()) == pytest.approx(ratio, abs=1e-5)
    assert len({round_(r) for r in ratio}) > 3  # the task moved them apart
    for name, value in state["params"].items():
        moved = value != start[name]  # what the client kept and so what was merged
        assert torch.allclose(value[moved], expected[name][moved], atol=1e-5), name


def round_(value):
    return round(value, 3)


# --- what is sent, charged and tested -----------------------------------------------------------


def test_units_that_can_be_sampled_are_the_papers():
    assert int(UnitRows(vgg()).real.sum()) == 2496
    assert int(UnitRows(adds_mobilenet()).real.sum()) == 3520
    assert UnitRows(sent_lstm()).groups == ("fc1",)  # recurrent units are never dropped


def test_bytes_are_the_parameters_kept_and_a_bit_for_each_unit(tmp_path):
    algorithm = adds(penalty=1.5, arch_lr=0.05)
    net = algorithm.setting.net
    toys.run(toys.job(algorithm, images(), cohort=4, rounds=2), tmp_path / "run")
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    everything = net.space.slice_numel(toys.FULL)
    assert set(table["bytes_down"]) == {4 * everything + 4}
    for params, macs in zip(table["params"], table["macs"], strict=True):
        assert params < net.stored_params(toys.FULL, "local") and macs < net.cost().macs
    _, result = one_round(algorithm, images(), [0, 1, 2])
    for client in range(3):
        (up, units) = result.table["bytes_up"][client], result.reports[client]["units"]
        c1, c2, f = units["conv1"], units["conv2"], units["fc1"]
        convs = (9 * c1 + c1) + (9 * c1 * c2 + c2) + 4 * (c1 + c2)  # norms: four each
        entries = convs + (4 * c2 * f + f) + (f * 4 + 4)
        assert up == 4 * entries + math.ceil((4 + 6 + 10) / 8)


@pytest.mark.parametrize(("importance", "passes"), [("slim", 2), ("lrp", 3)])
def test_flops_are_those_of_the_whole_network_as_often_as_it_is_passed(importance, passes):
    """30 rows: 3 validate, 27 train, twice. The MACs of 6-8-4-3 are 48 + 32 + 12."""
    algorithm = adds(toys.mlp(), penalty=1.5, arch_lr=0.05, importance=importance)
    data = toys.federation([30, 30], (6,), 3, train=np.ones(60, bool))
    _, result = one_round(algorithm, data, [0, 1])
    assert result.table["flops"].tolist() == [3 * (48 + 32 + 12) * 54 * passes] * 2
    for macs, client in zip(result.table["macs"], (0, 1), strict=True):
        units = result.reports[client]["units"]
        a, b = units["fc0"], units["fc1"]
        assert macs == 6 * a + a * b + 3 * b < 92


def test_a_report_tells_the_kept_units_in_a_digit_for_four():
    algorithm = adds(penalty=1.5, arch_lr=0.05)
    _, result = one_round(algorithm, images(), [0, 1, 2])
    for client in range(3):
        report = result.reports[client]
        assert {g: len(d) for g, d in report["kept"].items()} == {"conv1": 2, "conv2": 2, "fc1": 4}
        map = algorithm.client_map(toys.FULL, report)
        assert {g: len(kept) for g, kept in map.kept.items()} == report["units"]
    report = {"ratio": {}, "kept": {"conv1": "50", "conv2": "84", "fc1": "8040"}}
    assert algorithm.client_map(toys.FULL, report) == IndexMap.of(
        {"conv1": [1, 3], "conv2": [0, 5], "fc1": [0, 9]}
    )
    assert algorithm.client_map(toys.FULL, None) == toys.FULL


def test_the_map_of_a_report_is_what_was_sent():
    """Of one client, the server's weights are its own: those on its map and no others moved."""
    algorithm = adds(toys.mlp(), penalty=1.5, arch_lr=0.05)
    params = algorithm.setting.net.init(0)
    state, result = one_round(algorithm, toys.federation(SIZES, (6,), 3), [2], params)
    map = algorithm.client_map(toys.FULL, result.reports[2])
    assert len(map.kept["fc0"]) < 8
    moved = (state["params"]["fc0.weight"] != params["fc0.weight"]).any(1)
    assert torch.nonzero(moved).flatten().tolist() == map.kept["fc0"].tolist()


def test_what_nobody_kept_stays_as_it_was():
    algorithm = adds(penalty=1.5, arch_lr=0.08)
    params = algorithm.setting.net.init(0)
    state, result = one_round(algorithm, images(), [3], params)
    kept = result.reports[3]["units"]
    assert kept["fc1"] < 10
    same = (state["params"]["fc1.weight"] == params["fc1.weight"]).all(1)
    assert int((~same).sum()) == kept["fc1"]


def test_the_local_test_is_of_the_sub_network():
    algorithm = adds(penalty=1.5, arch_lr=0.05, rule=LocalRule(lr=0.1))
    net, data = algorithm.setting.net, images([60])
    program = algorithm.phase(1).program
    cohort = Cohort(
        np.array([0]),
        data.sizes(np.array([0]), "train"),
        np.zeros(1, np.int16),
        data.label_counts(np.array([0])),
        np.array([-1]),
        [None],
    )
    (task,) = algorithm.plan(algorithm.init(net.init(0)), cohort, 1).tasks
    own = Resident(net, toys.FULL, Choice("v", "cpu", "loop", 1))
    local = program.init(own, net.init(0), None, task.inputs)
    local["ratio"] = torch.tensor([0.5, 0.5, 0.3])
    result = program.final(own, local, task.inputs)
    map = IndexMap.from_masks({g: m.numpy() for g, m in result.units.items()})
    assert {g: len(i) for g, i in map.kept.items()} == {"conv1": 2, "conv2": 3, "fc1": 3}
    small = Resident(net, map, Choice("s", "cpu", "loop", 1))
    block = data.block(np.array([0]), "all")
    found = score(own, result.local, block.x, block.y, data.scale)
    expected = score(small, result.update, block.x, block.y, data.scale)
    assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("options", [{"resample": True}, {"normalise": "none"}])
def test_options_change_what_is_learnt(options):
    default, other = (
        one_round(adds(penalty=1.5, arch_lr=0.05, **given), images(), [0, 1])[0]["params"]
        for given in ({}, options)
    )
    assert not toys.same_bits(default, other)
    assert all(torch.isfinite(value).all() for value in other.values())


@pytest.mark.parametrize("limit", ["flops", "params"])
def test_a_budget_caps_what_a_client_returns(limit, tmp_path):
    algorithm = adds(penalty=0.0)
    net = algorithm.setting.net
    most = {"flops": net.cost().macs // 3, "params": net.cost().params // 3}[limit]
    tier = TierSize("low", 1.0, toys.FULL, **{limit: most})
    capped = ADDS(replace(algorithm.setting, tiers=(tier,)), penalty=0.0)
    toys.run(toys.job(capped, images(), cohort=3, rounds=1), tmp_path / "run")
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    if limit == "flops":
        assert max(table["macs"]) <= most and min(table["macs"]) > 0.6 * most
    else:
        assert max(table["params"]) < 1.2 * most  # biases and norms come on top


def test_relevance_and_scales_choose_other_units():
    data, units = images(), {}
    for importance in ("slim", "lrp"):
        algorithm = adds(importance=importance, penalty=1.5, arch_lr=0.05)
        state, _ = one_round(algorithm, data, [0])
        units[importance] = state["params"]
    assert not toys.same_bits(units["slim"], units["lrp"])


# --- small clients and bad input ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_tiny_clients_take_part(size, norm):
    """One row both trains and validates; BatchNorm cannot train on one row and leaves it."""
    net = small_cnn(input_shape=(1, 8, 8), num_classes=4, channels=(4, 6), hidden=10, norm=norm)
    algorithm = adds(net, penalty=1.0, arch_lr=0.05)
    data = images([size, 30], train=np.ones(size + 30, bool))
    state, result = one_round(algorithm, data, [0, 1])
    assert result.table["status"].tolist() == ["ok", "ok"]
    assert all(torch.isfinite(v).all() for v in state["params"].values())
    if norm == "batch" and size < 3:
        assert result.table["steps"][0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty": -1.0}, r"algorithm.penalty=-1.0 is outside \[0, inf\)"),
        ({"epsilon": 0.0}, r"algorithm.epsilon=0.0 is outside \[1e-06, inf\); give 1.0, say"),
        ({"epsilon_decay": 1.5}, r"epsilon_decay=1.5 is outside \(0, 1\]"),
        (
            {"ratio": 1.5},
            r"algorithm.ratio=1.5 is outside \[0.05, 1\], from algorithm.least_ratio on; give 1.0",
        ),
        ({"ratio": 0.01}, r"algorithm.ratio=0.01 is outside \[0.05, 1\]"),
        ({"least_ratio": 0.0}, r"least_ratio=0.0 is outside \(0, 1\]"),
        ({"arch_lr": -0.1}, r"arch_lr=-0.1 is outside"),
        ({"validation": 1.0}, r"validation=1.0 is outside \(0, 1\)"),
        ({"epsilon": float("nan")}, r"epsilon=nan is outside"),
        ({"arch_lr": float("inf")}, r"arch_lr=inf is outside \[0, inf\)"),
    ],
)
def test_bad_options_are_named_with_their_bounds(options, words):
    with pytest.raises(InputError, match=words):
        adds(**options)


def test_a_budget_that_not_even_one_unit_a_layer_meets_is_refused():
    setting = replace(adds().setting, tiers=(TierSize("tiny", 1.0, toys.FULL, flops=100),))
    with pytest.raises(InputError, match=r"tier 'tiny': flops=100 is below .* give it at least"):
        ADDS(setting)


def test_models_that_cannot_be_sampled_are_refused():
    with pytest.raises(InputError, match="'linear' has no units to sample"):
        adds(toys.linear(6, 3))
    with pytest.raises(InputError, match="layer 'norm1': GroupNorm"):
        adds(toys.cnn(norm="group"))
    from torch import nn

    from subfleet.models import chain

    strange = chain("strange", nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    assert adds(strange).importance == "slim"
    assert adds(strange, importance="lrp").importance == "lrp"  # the last layer tells of unit 0
    deep = chain(
        "deep",
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        (6,),
    )
    with pytest.raises(InputError, match=r"cannot tell how much units of 0 matter .* \"slim\""):
        adds(deep, importance="lrp")
