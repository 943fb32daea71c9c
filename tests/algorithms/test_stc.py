from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from subfleet.algorithms import STC, FedAvg
from subfleet.algorithms.stc import RESIDUAL, largest
from subfleet.core import aggregate
from subfleet.core.algorithm import Cohort, RoundPlan
from subfleet.core.errors import InputError
from subfleet.core.golomb import rice_bits
from subfleet.core.program import LocalRule, Stream
from subfleet.options import check_options
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


def vector(*values):
    return np.array(values, np.float32)


def one_tensor():
    """A network whose only tensor is "fc.weight", 2 x 10."""
    return toys.linear(10, 2, bias=False)


def stc(net=None, **options):
    return STC(toys.setting(net or one_tensor()), **options)


def tree(flat):
    return {"fc.weight": torch.tensor(flat, dtype=torch.float32).reshape(2, 10)}


def at(values):
    flat = np.zeros(20, np.float32)
    for place, value in values.items():
        flat[place] = value
    return tree(flat)


def upload(algorithm, start, trained, kept=None):
    """What a client sends and what it keeps; it begins with nothing kept."""
    if kept is None:
        kept = algorithm.initial_kept(toys.task(algorithm.setting.net, 0))
    result = algorithm.upload(start, trained, kept, {})
    assert result.kept is not None
    return result, result.kept


# --- the operator ----------------------------------------------------------------------------


def test_the_two_largest_of_six():
    chosen = largest(vector(0.1, -0.9, 0.3, 0.05, -0.4, 0.7), 2 / 6)
    assert chosen.positions.tolist() == [1, 5] and chosen.negative.tolist() == [True, False]
    assert chosen.dense() == pytest.approx([0, -0.8, 0, 0, 0, 0.8])


@pytest.mark.parametrize(
    ("size", "p", "k"), [(10, 0.01, 1), (10, 0.11, 2), (100, 0.07, 7), (3, 1, 3), (400, 1 / 400, 1)]
)
def test_how_many_are_sent(size, p, k):
    assert len(largest(np.ones(size, np.float32), p).positions) == k


def test_of_equal_entries_the_first():
    chosen = largest(vector(1, -2, 2, -1, 1, 2), 0.5)
    assert chosen.positions.tolist() == [1, 2, 5]
    chosen = largest(vector(1, -2, 2, -1, 1, 2), 0.75)
    assert chosen.positions.tolist() == [0, 1, 2, 3, 5]


def test_zeros_among_the_largest_are_positive():
    chosen = largest(vector(0, 0, -3, 0), 0.5)
    assert chosen.dense().tolist() == [1.5, 0, -1.5, 0]


def test_without_ternary_each_keeps_its_magnitude():
    chosen = largest(vector(0.1, -0.9, 0.3, 0.05, -0.4, 0.7), 2 / 6, ternary=False)
    assert np.array_equal(chosen.dense(), vector(0, -0.9, 0, 0, 0, 0.7))


def test_what_is_not_a_number_is_sent_as_such():
    chosen = largest(vector(1, np.nan, 2, 3), 0.5)
    assert chosen.positions.tolist() == [1, 3] and np.isnan(chosen.dense()[[1, 3]]).all()


# --- a client ----------------------------------------------------------------------------------


def test_an_upload_by_hand():
    """+ at 3, - at 4, + at 11 of 20 take 13 bits, so 2 bytes, and 9 of header."""
    algorithm = stc(p_up=0.15)
    start, change = at({}), at({3: 3.0, 4: -2.0, 11: 1.0, 12: 0.5})
    result, kept = upload(algorithm, start, change)
    assert result.wire_bytes == 11
    assert toys.same_bits(result.update, at({3: 2.0, 4: -2.0, 11: 2.0}))
    left = at({3: 1.0, 11: -1.0, 12: 0.5})
    assert toys.same_bits(kept, {RESIDUAL + "fc.weight": left["fc.weight"]})

    # Nothing changed since: what was left is sent. 3 (+), 11 (-), 12 (+): again 13 bits.
    again, _ = upload(algorithm, start, start, kept)
    mu = np.float32(2.5 / 3)
    assert toys.same_bits(again.update, at({3: mu, 11: -mu, 12: mu}))
    assert again.wire_bytes == 11


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.001, 1),
    st.booleans(),
    st.booleans(),
)
def test_all_that_was_sent_and_what_is_left_are_all_updates(seed, p, per_tensor, ternary):
    net = toys.mlp()
    algorithm = stc(net, p_up=p, per_tensor=per_tensor, ternary=ternary)
    draw = torch.Generator().manual_seed(seed)
    start = net.init(0)
    kept = None
    sent, updates = ({n: torch.zeros_like(v) for n, v in start.items()} for _ in range(2))
    for _ in range(6):
        trained = {n: v + torch.randn(v.shape, generator=draw) for n, v in start.items()}
        result, kept = upload(algorithm, start, trained, kept)
        for n in start:
            sent[n] += result.update[n]
            updates[n] += trained[n] - start[n]
    assert kept is not None
    whole = {n: sent[n] + kept[RESIDUAL + n] for n in sent}
    assert toys.distance(whole, updates) < 1e-5


def test_each_tensor_by_itself_or_all_together():
    net = toys.linear(4, 2)  # 8 weights and 2 biases
    start = {n: torch.zeros_like(v) for n, v in net.init(0).items()}
    trained = {"fc.weight": torch.full((2, 4), 1.0), "fc.bias": torch.tensor([0.1, -0.2])}
    each, whole = (stc(net, p_up=0.4, per_tensor=way) for way in (True, False))
    one, _ = upload(each, start, trained)
    assert one.update["fc.bias"].tolist() == pytest.approx([0, -0.2])
    assert int(one.update["fc.weight"].count_nonzero()) == 4
    # k = 4 of 8, b* = 0: four gaps of 1 are "0" and a sign, 1 byte. k = 1 of 2: at most 1 byte.
    assert rice_bits(0.5) == 0 and one.wire_bytes == 9 + 1 + 9 + 1
    both, _ = upload(whole, start, trained)
    assert not both.update["fc.bias"].any()
    assert both.update["fc.weight"].flatten().tolist() == [1] * 4 + [0] * 4
    # k = 4 of 10, b* = 0: 8 bits.
    assert rice_bits(0.4) == 0 and both.wire_bytes == 9 + 1


def test_batch_norms_statistics_travel_as_they_are():
    net = toys.mlp(hidden=(4,), norm=True)
    algorithm = stc(net)
    start = net.init(0)
    trained = {n: v + 1 for n, v in start.items()}
    result, kept = upload(algorithm, start, trained)
    assert result.wire_bytes is not None and net.statistics == {
        "norm0.running_mean",
        "norm0.running_var",
    }
    for name in net.statistics:
        assert torch.equal(result.update[name], trained[name])
    # Six tensors send one entry each: a word of at most 16 bits; the statistics are 8 numbers.
    words = result.wire_bytes - 6 * 9 - 4 * 8
    assert 6 <= words <= 6 * 2
    assert sorted(kept) == sorted(RESIDUAL + n for n in net.parameters)


def test_clients_train_without_momentum(tmp_path):
    digests = set()
    for momentum in (0.0, 0.9):
        given = toys.setting(toys.mlp(), rule=LocalRule(lr=0.1, momentum=momentum))
        data = toys.federation(SIZES, (6,), 3)
        run = toys.run(toys.job(STC(given), data), tmp_path / str(momentum))
        digests.add(run["params_sha256"])
    assert len(digests) == 1


def test_a_client_that_diverged_is_left_out_with_its_residual():
    """The rate is far too high: nothing is merged, and the residual stays what it was."""
    net, data = toys.mlp(), toys.all_train([9, 6], (6,), 3)
    algorithm = STC(toys.setting(net, rule=LocalRule(lr=1e38)))
    state = algorithm.init(net.init(0))
    after, result = toys.one_round(algorithm, data, state, [0, 1])
    assert result.table["status"].tolist() == ["skipped"] * 2 and result.kept == [None, None]
    assert toys.same_bits(after["params"], state["params"])
    assert not any(a.any() for a in after["residual"].values())


# --- the server --------------------------------------------------------------------------------


def reduced(net, *updates):
    total = aggregate.Update()
    for update in updates:
        aggregate.accumulate(total, net.space, toys.FULL, update, 1.0)
    return total


def test_two_server_steps_by_hand():
    net = one_tensor()
    algorithm = stc(net, p_down=0.1)  # 2 of 20
    state = algorithm.init(at({0: 1.0, 1: 1.0}))
    one, other = at({1: 4.0, 5: -2.0}), at({1: 2.0, 7: 1.0})
    state = algorithm.server_step(state, RoundPlan([], {}), reduced(net, one, other))
    # Mean change 3 at 1, -1 at 5, 1/2 at 7; sent +-2 at 1 and 5.
    assert toys.same_bits(state["params"], at({0: 1.0, 1: 3.0, 5: -2.0}))
    assert toys.same_bits(state["residual"], at({1: 1.0, 5: 1.0, 7: 0.5}))
    # b* = 3: "0" 001 "1" and "0" 011 "0" are 10 bits.
    assert rice_bits(0.1) == 3 and state["messages"].tolist() == [9 + 2]

    state = algorithm.server_step(state, RoundPlan([], {}), reduced(net, at({1: -1.0, 7: 1.5})))
    # 0 at 1, 1 at 5, 2 at 7: sent 3/2 at 5 and 7.
    assert toys.same_bits(state["params"], at({0: 1.0, 1: 3.0, 5: -0.5, 7: 1.5}))
    assert toys.same_bits(state["residual"], at({5: -0.5, 7: 0.5}))
    assert state["messages"].tolist() == [11, 11]


def test_statistics_are_averaged_alike_and_kept_where_nobody_sends():
    net = toys.mlp(hidden=(2,), norm=True)
    algorithm = stc(net)
    state = algorithm.init(net.init(0))
    still = {n: torch.zeros_like(v) for n, v in state["params"].items()}
    sends = [still | {"norm0.running_mean": torch.tensor([a, 0.0])} for a in (1.0, 5.0)]
    after = algorithm.server_step(state, RoundPlan([], {}), reduced(net, *sends))
    assert after["params"]["norm0.running_mean"].tolist() == [3.0, 0.0]
    nobody = algorithm.server_step(state, RoundPlan([], {}), aggregate.Update())
    assert toys.same_bits(nobody["params"], state["params"])


# --- what is downloaded --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_who_missed_rounds_downloads_their_messages(norm):
    """Before round 5: who trained in round l needs the messages of l, ..., 4."""
    net = toys.mlp(hidden=(2,), norm=norm)
    numbers = 6 * 2 + 2 + 2 * 3 + 3 + norm * 4
    statistics = 4 * norm * 4
    algorithm = stc(net)
    state = algorithm.init(net.init(0))
    cohort = Cohort(
        id=np.arange(5),
        num_samples=np.array([9, 1, 5, 7, 3]),
        tier=np.zeros(5, np.int16),
        label_counts=None,
        last_round=np.array([-1, 1, 2, 3, 4], np.int32),
        report=[None] * 5,
    )
    state["messages"] = np.array([60, 20, 19, 18])
    plan = algorithm.plan(state, cohort, 5)
    dense = 4 * numbers
    assert 57 < dense < 117
    by_hand = [dense, dense, 20 + 19 + 18, 19 + 18, 18]
    assert [t.bytes_down for t in plan.tasks] == [b + statistics for b in by_hand]
    assert [t.weight for t in plan.tasks] == [1.0] * 5
    assert [t.num_samples for t in plan.tasks] == [9, 1, 5, 7, 3]


# --- whole runs --------------------------------------------------------------------------------


def plain_stc(values, p):
    """The operator on a NumPy vector: a stable sort, largest first."""
    k = max(1, int(np.ceil(p * len(values) - 1e-9)))
    chosen = np.argsort(-np.abs(values), kind="stable")[:k]
    sent = np.zeros(len(values), np.float32)
    sent[chosen] = np.abs(values[chosen]).mean() * np.where(values[chosen] < 0, -1, 1)
    return sent


def plain_compressed(tensors, p):
    return {
        n: torch.from_numpy(plain_stc(v.numpy().reshape(-1), p)).reshape(v.shape)
        for n, v in tensors.items()
    }


def plain_run(algorithm, data, cohorts, p):
    """Client by client, in NumPy and float32: the server's parameters and all residuals."""
    given, net = algorithm.setting, algorithm.setting.net
    params = net.init(given.seed)
    zeros = {n: torch.zeros_like(params[n]) for n in net.parameters}
    server, own = zeros, {}
    for round in sorted(cohorts):
        sent, statistics = [], []
        for client in cohorts[round]:
            trained, _ = reference.train_client(
                *(net, params, toys.FULL, data, client, given.rule, given.stream),
                **{"seed": given.seed, "round": round},
            )
            left = own.get(client, zeros)
            change = {n: left[n] + trained[n] - params[n] for n in zeros}
            sent.append(plain_compressed(change, p))
            own[client] = {n: change[n] - sent[-1][n] for n in zeros}
            statistics.append({n: trained[n] for n in net.statistics})
        change = {n: server[n] + sum(s[n] for s in sent) / len(sent) for n in zeros}
        down = plain_compressed(change, p)
        server = {n: change[n] - down[n] for n in zeros}
        params = {n: params[n] + down[n] for n in zeros} | {
            n: torch.stack([s[n] for s in statistics]).mean(0) for n in net.statistics
        }
    return params, own


@pytest.mark.parametrize("norm", [False, True])
def test_a_run_equals_the_plain_way_and_charges_its_messages(norm, tmp_path):
    """Residuals are there when a client returns, however long it was not drawn."""
    given = toys.setting(
        toys.mlp(norm=norm), (1.0,), LocalRule(lr=0.1), Stream(batch=4, epochs=2), rounds=6
    )
    data = toys.federation(SIZES, (6,), 3)
    job = toys.job(STC(given, p_up=0.2, p_down=0.2), data, cohort=3)
    folder = RunFolder.create(tmp_path / "run", "", "toy")
    rounds = Rounds(job, InlineExecutor(job.work, data), folder)
    rounds.run()
    table = ClientsLog(folder.clients).read().to_pydict()
    cohorts: dict[int, list[int]] = {}
    for round, client in zip(table["round"], table["client"], strict=True):
        cohorts.setdefault(round, []).append(client)

    expected, own = plain_run(job.work.algorithm, data, cohorts, 0.2)
    assert toys.distance(rounds.state["params"], expected) < 1e-5
    for client, row in zip(own, rounds.kept.read(np.array(list(own))), strict=True):
        assert row is not None
        kept = {n.removeprefix(RESIDUAL): torch.as_tensor(v) for n, v in row.items()}
        assert toys.distance(kept, own[client]) < 1e-5

    net, messages = given.net, rounds.state["messages"].tolist()
    statistics = 4 * sum(expected[n].numel() for n in net.statistics)
    dense = 4 * sum(expected[n].numel() for n in net.parameters)
    last: dict[int, int] = {}
    gaps = set()
    for round, client, down in zip(
        table["round"], table["client"], table["bytes_down"], strict=True
    ):
        owed = dense
        if client in last:
            owed = min(dense, sum(messages[last[client] - 1 : round - 1]))
            gaps.add(round - last[client])
        assert down == owed + statistics
        last[client] = round
    assert len(gaps) > 1  # some came back at once, some missed rounds


@pytest.mark.parametrize("norm", [False, True])
def test_dense_and_not_ternary_it_is_fedavg(norm, tmp_path):
    given = toys.setting(toys.mlp(norm=norm), (1.0,), LocalRule(lr=0.1))
    data = toys.all_train([8] * 6, (6,), 3)
    made = STC(given, p_up=1.0, p_down=1.0, ternary=False)
    toys.run(toys.job(made, data), tmp_path / "stc")
    toys.run(toys.job(FedAvg(given), data), tmp_path / "fedavg")
    a, b = (RunFolder(tmp_path / name, "").read_final() for name in ("stc", "fedavg"))
    assert toys.distance(a, b) < 1e-6


def test_outside_a_narrow_network_nothing_changes():
    net, data = toys.mlp(), toys.all_train([9, 6], (6,), 3)
    algorithm = STC(toys.setting(net, (1.0, 0.5)), p_up=1.0, p_down=1.0)
    state = algorithm.init(net.init(0))
    after, _ = toys.one_round(algorithm, data, state, [0, 1], [0, 1])
    changed = after["params"]["fc0.weight"] != state["params"]["fc0.weight"]
    assert changed.any(1).tolist() == [True] * 4 + [False] * 4
    assert after["residual"]["fc0.weight"].shape == (4, 6)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["p_up", "p_down"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
def test_a_sparsity_outside_its_bounds(key, value):
    with pytest.raises(InputError, match=rf"algorithm\.{key}={value} is outside \(0, 1\]; give"):
        stc(**{key: value})


def test_sparsities_by_name():
    options = {"p_up": "adds_celeba", "p_down": 0.5}
    known = check_options("algorithm", STC, options, frozenset({"setting"}))
    algorithm = stc(**known)
    change = {"fc.weight": torch.arange(20.0).reshape(2, 10)}
    received, _ = algorithm.compress(change, algorithm.p_up)
    assert int(received["fc.weight"].count_nonzero()) == 4  # 0.1582 * 20 = 3.2
    with pytest.raises(InputError, match=r"algorithm\.p_up = 'adds'"):
        check_options("algorithm", STC, {"p_up": "adds"}, frozenset({"setting"}))


@pytest.mark.parametrize("options", [{}, {"per_tensor": False}, {"ternary": False, "p_up": 0.1}])
def test_uploads_are_planned_within_a_tenth_and_never_too_short(options, tmp_path):
    algorithm = STC(toys.setting(toys.mlp(64, (64, 64), norm=True), rounds=2), **options)
    job = toys.job(algorithm, toys.federation(SIZES, (64,), 3), devices=[{"up_bytes_per_s": 1}])
    toys.run(job, tmp_path / "run")
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    for planned, sent in zip(table["sim_seconds"], table["bytes_up"], strict=True):
        assert sent <= planned <= 1.1 * sent
