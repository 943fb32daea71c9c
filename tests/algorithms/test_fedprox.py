from __future__ import annotations

from dataclasses import replace

import pytest
import toys

from subfleet.algorithms import FedAvg, FedProx
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, LossProgram, Stream
from subfleet.core.units import IndexMap
from subfleet.platform.metrics import ClientsLog

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("engine", ["loop", "traced", "vmap"])
def test_without_mu_it_is_fedavg_bit_for_bit(norm, engine, tmp_path):
    rule = LocalRule(lr=0.1, momentum=0.9, clip_norm=1.0 if norm else None)
    setting = toys.setting(toys.mlp(norm=norm), (1.0, 0.5), rule, Stream(batch=4, epochs=2))
    data = toys.federation(SIZES, (6,), 3)
    # Everybody in one bundle: as many side by side each round, traced but once.
    options = {"engine": engine, "cohort": 8, "bundle_clients": 8}
    digests = {
        toys.run(toys.job(algorithm, data, **options), tmp_path / name)["params_sha256"]
        for name, algorithm in (("prox", FedProx(setting, mu=0.0)), ("avg", FedAvg(setting)))
    }
    assert len(digests) == 1


def test_the_first_local_step_is_fedavgs_and_the_second_is_not():
    net, data = toys.mlp(), toys.all_train([8, 5], (6,), 3)
    for steps, differs in ((1, False), (2, True)):
        setting = toys.setting(net, stream=Stream(batch=4, steps=steps))
        states = [
            toys.one_round(algorithm, data, {"params": net.init(0)}, [0, 1])[0]["params"]
            for algorithm in (FedProx(setting, mu=1.0), FedAvg(setting))
        ]
        assert toys.same_bits(*states) != differs


@pytest.mark.parametrize("way", ["loop", "traced", "vmap"])
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0, 10.0, 1e6])
def test_a_quadratic_ends_at_the_exact_minimiser(mu, way):
    """L = a/2 (w - c)^2 from w^t: (a c + mu w^t) / (a + mu), which is w^t for an endless mu."""
    a, c, start = 2.0, 3.0, 0.5

    def quadratic(net, params, batch, noise, inputs):
        # 0 * logits: the mapped way wants a loss of its batch.
        nothing = 0.0 * net(params, batch.x).sum()
        return 0.5 * a * (params["fc.weight"] - c).square().sum() + nothing, {}

    net, data = toys.linear(1, 1, bias=False), toys.all_train([2, 2], (1,), 1)
    rule = LocalRule(lr=0.5 / (a + mu))
    algorithm = FedProx(toys.setting(net, rule=rule, stream=Stream(batch=2, steps=40)), mu=mu)
    program = algorithm.phase(1).program
    assert isinstance(program, LossProgram)
    shared = {"fc.weight": net.init(0)["fc.weight"].fill_(start)}
    tasks = [toys.task(net, 0, samples=2), toys.task(net, 1, samples=2)]
    for params, _, steps in toys.each(
        net, replace(program, loss=quadratic), tasks, data, shared, way
    ):
        assert steps == 40
        assert params["fc.weight"].item() == pytest.approx((a * c + mu * start) / (a + mu))


def test_one_network_for_all_that_the_poorest_can_run():
    algorithm = FedProx(toys.setting(toys.mlp(), (1.0, 0.25, 0.5)))
    poorest = IndexMap.prefix({"fc0": 2, "fc1": 1})
    assert {algorithm.map_of(tier, 5) for tier in range(3)} == {poorest}
    assert algorithm.views({}) == dict.fromkeys(("global", "w1.0", "w0.25", "w0.5"), poorest)


# --- stragglers --------------------------------------------------------------------------------


def fractions_of_epochs(path, epochs):
    """Epochs that each client did in each round, from its steps: 4 rows a step, epochs in all."""
    table = ClientsLog(path / "clients").read().to_pydict()
    return {
        (round, client): steps / -(-samples // 4)
        for round, client, steps, samples in zip(
            table["round"], table["client"], table["steps"], table["num_samples"], strict=True
        )
    }


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_stragglers_do_whole_epochs_but_fewer(engine, tmp_path):
    epochs = 5
    setting = toys.setting(toys.mlp(), stream=Stream(batch=4, epochs=epochs), rounds=12)
    data = toys.federation([20] * 20, (6,), 3)
    done = {}
    for share in (0.0, 0.5, 1.0):
        # One bundle: the same number of clients side by side each round, traced but once.
        options = {"cohort": 10, "bundle_clients": 10, "engine": engine}
        run = toys.job(FedProx(setting, stragglers=share), data, **options)
        toys.run(run, tmp_path / str(share))
        done[share] = fractions_of_epochs(tmp_path / str(share), epochs)
        assert set(done[share].values()) <= set(range(1, epochs + 1))
    assert set(done[0.0].values()) == {epochs}
    # 120 draws: four of five stragglers stop early, so 2/5 of all are expected to, sd 0.045.
    early = [n < epochs for n in done[0.5].values()]
    assert 0.25 < sum(early) / len(early) < 0.55
    assert set(done[1.0].values()) == set(range(1, epochs + 1))
    assert 2.5 < sum(done[1.0].values()) / len(done[1.0]) < 3.5  # 3 on average
    # A client's draw is its own: who is a straggler at 0.5 is one at 1, with the same epochs.
    assert all(done[1.0][key] == n for key, n in done[0.5].items() if n < epochs)


def test_who_stops_early_changes_from_round_to_round():
    setting = toys.setting(toys.mlp(), stream=Stream(batch=4, epochs=9))
    algorithm, data = FedProx(setting, stragglers=1.0), toys.all_train([8] * 4, (6,), 3)
    state = {"params": setting.net.init(0)}
    steps = [
        toys.one_round(algorithm, data, state, [0, 1, 2, 3], round=r)[1].table["steps"].tolist()
        for r in (1, 2, 1)
    ]
    assert steps[0] == steps[2] != steps[1]


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -0.1}, r"algorithm\.mu=-0\.1 is negative; give 0"),
        ({"mu": float("nan")}, r"algorithm\.mu=nan"),
        ({"stragglers": 1.5}, r"algorithm\.stragglers=1\.5 is outside \[0, 1\]"),
        ({"stragglers": -0.5}, r"algorithm\.stragglers=-0\.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FedProx(toys.setting(toys.mlp()), **options)


@pytest.mark.parametrize(("momentum", "bound"), [(0.0, 4.0), (0.9, 7.6)])
def test_a_mu_that_diverges_is_refused(momentum, bound):
    """The pull alone, v <- m v + mu w, w <- w - lr v, shrinks below the bound and grows above."""
    setting = toys.setting(toys.linear(2, 2), rule=LocalRule(0.5, momentum))

    def left(mu):
        w, v = 1.0, 0.0
        for _ in range(2000):
            v = momentum * v + mu * w
            w -= 0.5 * v
        return abs(w)

    assert left(0.99 * bound) < 1e-3 and left(1.01 * bound) > 1e3
    assert FedProx(setting, mu=0.99 * bound).mu < bound
    for mu in (bound, 1.01 * bound, 1e30, float("inf")):
        with pytest.raises(InputError, match=rf"set mu below {bound:g}, such as 0.01"):
            FedProx(setting, mu=mu)


def test_stragglers_need_epochs():
    setting = toys.setting(toys.mlp(), stream=Stream(batch=4, steps=3))
    with pytest.raises(InputError, match=r"train\.steps counts steps; set train\.epochs"):
        FedProx(setting, stragglers=0.5)
    assert FedProx(setting).stragglers == 0
