from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys

from subfleet.algorithms import PFedMe
from subfleet.algorithms.pfedme import Envelope
from subfleet.core.aggregate import Update, accumulate
from subfleet.core.algorithm import RoundPlan
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, StepProgram, Stream
from subfleet.core.schedule import Schedule
from subfleet.core.units import IndexMap
from subfleet.platform import batches
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

BOTH = pytest.mark.parametrize("way", ["loop", "vmap"])
SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


def pfedme(net=None, widths=(1.0,), *, rule=None, stream=None, **options):
    return PFedMe(toys.setting(net or toys.mlp(), widths, rule, stream), **options)


def work(algorithm, round=1):
    program = algorithm.phase(round).program
    assert isinstance(program, StepProgram)
    return program


def trained(algorithm, data, tasks, shared, way="loop", *, program=None, own=None):
    """(update, kept theta) of each client."""
    collecting = toys.OneProgram(
        algorithm.setting,
        program or work(algorithm),
        "collect",
        own=algorithm.initial_kept(tasks[0]),
    )
    result = toys.run_bundle(collecting, tasks, data, shared, way, own=own)
    assert result.collected is not None
    kept = [{n.removeprefix("theta/"): v for n, v in k.items()} for k in result.kept if k]
    return [(c.result.update, theta) for c, theta in zip(result.collected, kept, strict=True)]


# --- the quadratic -------------------------------------------------------------------------------


def quadratic(a):
    def loss(net, params, batch, noise, inputs):
        # 0 * logits: the mapped way wants a loss of its batch.
        nothing = 0.0 * net(params, batch.x).sum()
        return 0.5 * (params["fc.weight"] - a).square().sum() + nothing, {}

    return loss


def on_quadratic(way, *, a=3.0, start=0.2, batches=1, **options):
    """(w_k, theta) after that many batches of L = (theta - a)^2 / 2."""
    net, data = toys.linear(1, 1, bias=False), toys.all_train([2, 2], (1,), 1)
    envelope = Envelope(quadratic(a), **options)
    streams = {"train": Stream(batch=2, steps=batches)}
    program = StepProgram(envelope.init, envelope.step, envelope.final, streams)
    algorithm = pfedme(net)
    shared = {"fc.weight": torch.full((1, 1), start)}
    tasks = [toys.task(net, client, samples=2) for client in (0, 1)]
    (w, theta), other = trained(algorithm, data, tasks, shared, way, program=program)
    assert toys.same_bits(w, other[0]) and toys.same_bits(theta, other[1])
    return w["fc.weight"].item(), theta["fc.weight"].item()


@BOTH
def test_the_quadratics_personal_model_and_envelope_gradient(way):
    """theta* = (a + lambda w) / (1 + lambda) = 6 / 16; (w - w_k) / eta = lambda (w - theta*)."""
    eta = 0.01
    w, theta = on_quadratic(way, penalty=15.0, personal_lr=0.05, inner_steps=40, eta=eta)
    assert theta == pytest.approx(0.375)
    gradient = (0.2 - w) / eta
    assert gradient == pytest.approx(-2.625, rel=1e-4)
    assert gradient == pytest.approx(15 * (0.2 - 3.0) / (1 + 15), rel=1e-4)


@BOTH
def test_inner_steps_by_hand(way):
    """theta_0 = w = 0.2;  theta <- theta - 0.05 (theta - 3 + 15 (theta - w)), K times a batch."""
    w = theta = 0.2
    for _ in range(3):
        for _ in range(2):
            theta -= 0.05 * (theta - 3.0 + 15.0 * (theta - w))
        w -= 0.01 * 15.0 * (w - theta)
    found = on_quadratic(way, batches=3, penalty=15.0, personal_lr=0.05, inner_steps=2, eta=0.01)
    assert found == pytest.approx((w, theta))


@BOTH
def test_with_eta_lambda_one_w_becomes_theta(way):
    w, theta = on_quadratic(way, penalty=10.0, personal_lr=0.05, inner_steps=3, eta=0.1, batches=4)
    assert w == pytest.approx(theta) and w != pytest.approx(0.2)


@BOTH
def test_an_endless_pull_leaves_theta_at_w(way):
    """theta* - w = (a - w) / (1 + lambda), about 2.8e-5 for lambda = 10^5."""
    w, theta = on_quadratic(way, penalty=1e5, personal_lr=0.9e-5, inner_steps=50, eta=1e-5)
    assert theta == pytest.approx(0.2 + 2.8e-5, abs=2e-6)
    assert w == pytest.approx(theta)


# --- the whole client against the plain formula --------------------------------------------------


def plain(net, data, client, start, theta, algorithm, round=1):
    """w_k and theta by a module, autograd and the lines of the paper."""
    given, rule = algorithm, algorithm.setting.rule.at(round)
    module = net.module().train()
    module.load_state_dict(theta)
    w = {n: v.clone() for n, v in start.items()}
    x, y, _ = data.block(np.array([client]), "train")
    schedule = batches.steps(
        given.setting.stream,
        len(y),
        seed=given.setting.seed,
        round=round,
        client=client,
        min_batch=2 if net.statistics else 1,
    )
    for rows in schedule:
        for _ in range(given.inner_steps):
            module.zero_grad()
            F.cross_entropy(module(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])).backward()
            if rule.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), rule.clip_norm)
            with torch.no_grad():
                for name, leaf in module.named_parameters():
                    g = leaf.grad + rule.weight_decay * leaf
                    leaf -= given.personal_lr * (g + given.penalty * (leaf - w[name]))
        now = {n: v.detach() for n, v in module.state_dict().items()}
        w = {n: v - given.eta * given.penalty * (v - now[n]) for n, v in w.items()}
    return w, {n: v.detach().clone() for n, v in module.state_dict().items()}


@pytest.mark.parametrize(
    ("norm", "way", "rule"),
    [
        (False, "loop", LocalRule()),
        (False, "vmap", LocalRule()),
        (True, "loop", LocalRule()),
        (False, "loop", LocalRule(weight_decay=0.1, clip_norm=0.2)),
        (False, "vmap", LocalRule(weight_decay=0.1, clip_norm=0.2)),
    ],
)
def test_clients_equal_the_formula(norm, way, rule):
    net, data = toys.mlp(norm=norm), toys.all_train([9, 4, 1], (6,), 3)
    algorithm = pfedme(net, rule=rule, stream=Stream(batch=4, epochs=2), inner_steps=3)
    shared, tasks = net.init(0), [toys.task(net, client) for client in range(3)]
    for client, (w, theta) in enumerate(trained(algorithm, data, tasks, shared, way)):
        expected = plain(net, data, client, shared, shared, algorithm)
        theta.pop("begun")
        assert toys.distance(w, expected[0]) < 1e-5
        assert toys.distance(theta, expected[1]) < 1e-5
        if not (norm and client == 2):  # one row: BatchNorm cannot train
            assert toys.distance(theta, shared) > 1e-3


@BOTH
def test_a_personal_start_goes_on_from_what_was_kept(way):
    net, data = toys.mlp(), toys.all_train([9, 4], (6,), 3)
    algorithm = pfedme(net, begin="personal")
    shared, tasks = net.init(0), [toys.task(net, client) for client in range(2)]
    mine = net.init(7)
    own = [None, {f"theta/{n}": v for n, v in mine.items()} | {"begun": torch.ones(())}]
    found = trained(algorithm, data, tasks, shared, way, own=own)
    for client, theta in enumerate((shared, mine)):  # client 0 begins at the server's model
        expected = plain(net, data, client, shared, theta, algorithm)
        found[client][1].pop("begun")
        assert toys.distance(found[client][0], expected[0]) < 1e-5
        assert toys.distance(found[client][1], expected[1]) < 1e-5
    reset = trained(replace(algorithm, begin="global"), data, tasks, shared, way, own=own)
    assert toys.same_bits(reset[0][0], found[0][0])
    assert not toys.same_bits(reset[1][0], found[1][0])


def test_the_schedule_scales_both_rates():
    net = toys.mlp()
    rule = LocalRule(schedule=Schedule("step", milestones=(3,), decay=0.5))
    inits = [work(pfedme(net, rule=rule), round).init for round in (1, 4)]
    rates = [(i.__self__.personal_lr, i.__self__.eta) for i in inits]  # pyright: ignore
    assert rates == [(0.05, 0.01), (0.025, 0.005)]


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_the_server_moves_by_beta_to_the_weighted_mean(beta):
    """n = 1 and 3 upload 1s and 5s, the server holds 2s: mean 4, 2 + 2 beta."""
    net = toys.mlp(norm=True)
    algorithm = pfedme(net, beta=beta)
    twos = {n: torch.full_like(v, 2.0) for n, v in net.init(0).items()}
    update = Update()
    for value, weight in ((1.0, 1), (5.0, 3)):
        small = {n: torch.full_like(v, value) for n, v in twos.items()}
        accumulate(update, net.space, toys.FULL, small, weight)
    after = algorithm.server_step({"params": twos}, RoundPlan([], {}), update)["params"]
    for name, value in after.items():
        # Statistics never leave the hull: a variance stays a variance.
        moved = min(beta, 1.0) if name in net.statistics else beta
        assert value.unique().tolist() == [2 + 2 * moved]


def test_beta_zero_leaves_the_server_as_it_was(tmp_path):
    net = toys.mlp(norm=True)
    run = toys.job(pfedme(net, beta=0.0), toys.federation(SIZES, (6,), 3))
    toys.run(run, tmp_path / "run")
    final = RunFolder(tmp_path / "run", "").read_final()
    assert toys.distance(final, net.init(0)) < 1e-7


def test_uploads_are_whole_networks(tmp_path):
    """MLP 6-8-4-3 has 107 numbers; personal models do not travel."""
    data = toys.federation(SIZES, (6,), 3)
    toys.run(toys.job(pfedme(), data, cohort=4), tmp_path / "run")
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["bytes_up"] == record["bytes_down"] == 4 * 428
        assert record["bytes_map"] == 0


def test_flops_count_every_inner_step():
    """Two epochs over 9 rows, four inner steps each; the MACs of 6-8-4-3 are 48 + 32 + 12."""
    algorithm = pfedme(stream=Stream(batch=4, epochs=2), inner_steps=4)
    data = toys.all_train([9], (6,), 3)
    work = toys.OneProgram(algorithm.setting, algorithm.phase(1).program)
    net = algorithm.setting.net
    result = toys.run_bundle(work, [toys.task(net, 0)], data, net.init(0))
    assert result.table["flops"].tolist() == [3 * (48 + 32 + 12) * 18 * 4]


def test_a_clients_own_network_is_its_personal_model():
    algorithm = pfedme()
    cut = algorithm.setting.net.init(0)
    assert algorithm.client_params(cut, None) is cut
    none_yet = algorithm.initial_kept(toys.task(algorithm.setting.net, 0))
    assert algorithm.client_params(cut, none_yet) is cut
    theta = algorithm.setting.net.init(7)
    kept = {f"theta/{n}": v for n, v in theta.items()} | {"begun": torch.ones(())}
    assert toys.same_bits(algorithm.client_params(cut, kept), theta)


# --- personal models -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_the_local_accuracy_is_the_personal_models(norm, tmp_path):
    net, data = toys.mlp(norm=norm), toys.federation(SIZES, (6,), 3)
    # eta = 0: w never moves, so that only theta can be any better than the start.
    algorithm = PFedMe(
        toys.setting(net, stream=Stream(batch=4, epochs=10), rounds=1),
        penalty=0.5,
        personal_lr=0.3,
        eta=0.0,
    )
    job = toys.job(algorithm, data, cohort=8, eval_every=1)
    rounds = Rounds(job, InlineExecutor(job.work, data), RunFolder.create(tmp_path, "", "toy"))
    rounds.run()
    table = ClientsLog(rounds.folder.clients).read().to_pydict()
    kept = dict(zip(table["client"], rounds.kept.read(np.array(table["client"])), strict=True))
    better = 0
    for client, accuracy in zip(table["client"], table["acc_local"], strict=True):
        row = kept[client]
        assert row is not None and row["begun"] == 1
        module = net.module().eval()
        x, y, _ = data.block(np.array([client]), "test")
        scores = []
        for tree in (
            {n.removeprefix("theta/"): torch.as_tensor(v) for n, v in row.items() if "/" in n},
            net.init(0),
        ):
            module.load_state_dict(tree)
            right = module(torch.from_numpy(x)).argmax(1).numpy() == y
            scores.append(right.mean() if len(y) else None)
        assert accuracy == pytest.approx(scores[0])
        better += len(y) > 0 and scores[0] > scores[1]
    assert better >= 3
    assert toys.distance(rounds.state["params"], net.init(0)) < 1e-7


def test_personal_models_survive_a_crash(tmp_path):
    def job():
        setting = toys.setting(toys.mlp(norm=True), rounds=5)
        data = toys.federation(SIZES, (6,), 3)
        return toys.job(PFedMe(setting, begin="personal"), data, cohort=5, checkpoint_every=2)

    def rows(path):
        run = job()
        folder = RunFolder.open(path, "toy")
        rounds = Rounds(run, InlineExecutor(run.work, run.federation), folder)
        rounds.run()  # nothing is left to do
        return rounds.kept.read(np.arange(len(SIZES)))

    toys.run(job(), tmp_path / "whole")
    with pytest.raises(toys.Crash):
        toys.run(job(), tmp_path / "run", observers=(toys.StopAfter(3),))
    toys.run(job(), tmp_path / "run", resume=True)
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert sum(row is not None for row in whole) >= 5
    for a, b in zip(whole, resumed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert all(np.array_equal(a[name], b[name]) for name in a | b)


def test_statistics_follow_the_data():
    """After enough steps both models' running means are those of the data they saw."""
    net, data = toys.mlp(norm=True), toys.all_train([40], (6,), 3)
    algorithm = pfedme(net, stream=Stream(batch=10, epochs=20), eta=0.05)
    ((w, theta),) = trained(algorithm, data, [toys.task(net, 0)], net.init(0))
    x = torch.from_numpy(data.block(np.array([0]), "train").x)
    for tree in (w, theta):
        seen = x @ theta["fc0.weight"].T + theta["fc0.bias"]
        assert torch.allclose(tree["norm0.running_mean"], seen.mean(0), atol=0.25)
        assert torch.allclose(tree["norm0.running_var"], seen.var(0), rtol=0.5)
        assert not torch.allclose(tree["norm0.running_var"], torch.ones(8), rtol=0.1)
    assert not toys.same_bits(w, {n: theta[n] for n in w})


def test_one_network_for_all_that_the_poorest_can_run():
    algorithm = pfedme(widths=(1.0, 0.25, 0.5))
    poorest = IndexMap.prefix({"fc0": 2, "fc1": 1})
    assert algorithm.views({}) == dict.fromkeys(("global", "w1.0", "w0.25", "w0.5"), poorest)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, r"algorithm\.penalty=-1\.0 is outside \[0, inf\)"),
        ({"eta": -0.1}, r"algorithm\.eta=-0\.1 is outside \[0, inf\)"),
        ({"beta": float("nan")}, r"algorithm\.beta=nan"),
        ({"inner_steps": 0}, r"algorithm\.inner_steps=0 is below 1"),
        ({"personal_lr": 0.1}, r"personal_lr=0\.1 times .*=15\.0 is 1\.5.*below 0\.0666667"),
        ({"personal_lr": 0.1, "penalty": 10.0}, r"is 1, not below 1"),
        ({"eta": 0.1}, r"eta=0\.1 times .*=15\.0 is 1\.5, above 1.*at most 0\.0666667"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        pfedme(**options)


def test_options_at_their_bounds_are_taken():
    assert pfedme(penalty=10.0, eta=0.1).eta == 0.1
    assert pfedme(penalty=0.0, personal_lr=3.0, eta=5.0).penalty == 0
