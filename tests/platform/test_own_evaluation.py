"""Clients' own networks: their part of the server's model with what they keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch.func import functional_call

from subfleet.algorithms import FedAvg, FedPA
from subfleet.config import Experiment
from subfleet.core.algorithm import Evaluation
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.units import IndexMap
from subfleet.datasets.memory import InMemory
from subfleet.fitted import Target, fitted
from subfleet.launch import launch
from subfleet.platform.bundles import BundleResult, EvalBundle, Own, cut_evaluation
from subfleet.platform.engine import Work
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.roster import Roster
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.worker import Worker
from subfleet.trained import TrainedRun

SIZES = [12, 6, 20, 9, 15, 1, 11, 2, 14, 6]
KEYS = ("acc_own", "acc_own_sd", "acc_own_worst10", "acc_own_tier", "loss_own")
OWN = Evaluation(own=True)


def nobody_held_out(sizes, dim=6, classes=3) -> InMemory:
    """Clients who all train, so that those who train are evaluated."""
    data = toys.federation(sizes, (dim,), classes)
    data.held_out = np.array([], np.int64)  # type: ignore[attr-defined]
    return data


def measured(algorithm, data, params, own, *, views=None, ids=None):
    """The table of one evaluation bundle, run as a host would."""
    worker = Worker(Work(algorithm.setting.net, algorithm, Scaling(), 0), data, "cpu")
    ids = np.arange(len(own)) if ids is None else np.array(ids)
    views = views or {"global": toys.FULL}
    return worker.run(EvalBundle(0, 1, ids, views, "test", 1.0, tuple(own)), {0: params}).table


# --- one bundle ----------------------------------------------------------------------------------


def test_a_personal_network_is_right_where_the_servers_is_wrong():
    """The server answers the larger coordinate; client 1's labels are the smaller one's."""
    x = np.tile(np.eye(2, dtype=np.float32), (6, 1))
    y = np.tile([0, 1], 6)
    y[6:] = 1 - y[6:]
    data = InMemory(x, y, np.array([0, 6, 12]), train=np.tile([True, True, False], 4))
    net = toys.linear(2, 2, bias=False)
    algorithm = toys.OneProgram(toys.setting(net), None, evaluates=OWN)
    same, flipped = torch.eye(2), np.array([[0, 1], [1, 0]], np.float32)
    own = [Own(toys.FULL, None), Own(toys.FULL, {"fc.weight": flipped, "momentum": flipped})]
    table = measured(algorithm, data, {"fc.weight": same}, own)
    assert table["global/correct"].tolist() == [2, 0] and table["own_correct"].tolist() == [2, 2]
    assert table["own_count"].tolist() == [2, 2]
    each = float(F.cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([0])))
    assert table["own_loss"].tolist() == pytest.approx([2 * each, 2 * each])


def test_each_is_tested_on_its_own_map_and_leaves_the_next_no_trace():
    net, data = toys.mlp(), toys.federation([20, 30, 25, 1], (6,), 3)
    params = net.init(3)
    maps = [IndexMap.prefix({"fc0": 4, "fc1": 2}), IndexMap.of({"fc0": [1, 5, 7]}), toys.FULL]
    maps.append(IndexMap.prefix({"fc0": 4, "fc1": 2}))  # equal to the first, another object
    algorithm = toys.OneProgram(toys.setting(net), None, evaluates=OWN)
    bias = {"head.bias": np.array([3.0, 0.0, -3.0], np.float32)}
    own = [Own(maps[0], bias), *(Own(map, None) for map in maps[1:])]
    table = measured(algorithm, data, params, own)
    for client, (map, kept) in enumerate(own):
        x, y, _ = data.block(np.array([client]), "test")
        tree = net.space.extract(params, map)
        tree |= {name: torch.from_numpy(value) for name, value in (kept or {}).items()}
        with torch.no_grad():
            logits = functional_call(net.module(map).eval(), tree, (torch.from_numpy(x),))
        truth = torch.from_numpy(y)
        assert table["own_correct"][client] == int((logits.argmax(1) == truth).sum())
        loss = float(F.cross_entropy(logits, truth, reduction="sum"))
        assert table["own_loss"][client] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert table["own_count"][3] == 0
    alone = measured(algorithm, data, params, own[2:3], ids=[2])
    assert alone["own_loss"][0] == table["own_loss"][2]


def test_statistics_that_nobody_gives_are_named():
    net, data = toys.mlp(norm=True), toys.federation([20], (6,), 3)
    params = {n: v for n, v in net.init(0).items() if n not in net.statistics}
    kept = {n: v.numpy() for n, v in net.fresh_statistics(toys.FULL).items()}
    algorithm = toys.OneProgram(toys.setting(net), None, evaluates=OWN)
    bundle = EvalBundle(0, 1, np.array([0]), {}, "test", 1.0, (Own(toys.FULL, None),))
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")
    with pytest.raises(InputError, match=r"client 0's own network lacks 'norm0\.running_mean'"):
        worker.run(bundle, {0: params})
    given = replace(bundle, own=(Own(toys.FULL, kept),))
    assert worker.run(given, {0: params}).table["own_count"].tolist() == [4]


def test_bundles_are_cut_by_what_own_networks_cost():
    ids = np.array([3, 5, 8, 9])
    own = [Own(toys.FULL, {"k": np.array([i])}) for i in ids]
    made = cut_evaluation(
        *(ids, np.array([10, 10, 10, 0]), {}, np.array([1.0, 1.0, 2.0, 20.0]), 3),
        **{"round": 1, "part": "test", "own": own},
    )
    assert [bundle.ids.tolist() for bundle in made] == [[3, 5], [8], [9]]
    assert [bundle.predicted for bundle in made] == [20.0, 20.0, 20.0]
    for bundle in made:
        kept = [one.kept or {} for one in bundle.own]
        assert [int(row["k"][0]) for row in kept] == bundle.ids.tolist()


# --- whole runs ----------------------------------------------------------------------------------


def fedpa(rounds=3, **options):
    net = toys.mlp(hidden=(5,), norm=True)
    setting = toys.setting(net, (1.0, 0.5), LocalRule(lr=0.3), Stream(batch=4), rounds=rounds)
    return FedPA(setting, **options)


def own_job(**options):
    return toys.job(fedpa(), nobody_held_out(SIZES), **{"cohort": 3, "eval_every": 1} | options)


def last(path: Path) -> dict:
    return list(read_metrics(path / "metrics.jsonl"))[-1]


def calibrated(params, x):
    """Statistics of one batch of training rows; those before the first where it is too small."""
    hidden = x @ params["fc0.weight"].T + params["fc0.bias"]
    units = len(params["fc0.bias"])
    if len(x) < 2:
        return {"norm0.running_mean": torch.zeros(units), "norm0.running_var": torch.ones(units)}
    return {"norm0.running_mean": hidden.mean(0), "norm0.running_var": hidden.var(0)}


def by_hand(rounds: Rounds, job) -> tuple[list[tuple[int, float, int, str]], int]:
    """(Right, summed loss, rows, tier) of each client by plain modules; how many never trained."""
    net, data = job.work.net, job.federation
    found, never = [], 0
    for client in range(data.num_clients):
        tier = job.fleet.tiers[int(job.fleet.tier_of[client])]
        (kept,) = rounds.kept.read([client])
        tree = net.space.extract(rounds.state["params"], tier.map)
        if kept is None:
            never += 1
            x = torch.from_numpy(data.block(np.array([client]), "train").x)
            tree |= calibrated(tree, x)
        else:
            tree |= {name: torch.from_numpy(value) for name, value in kept.items()}
        module = net.module(tier.map).eval()
        module.load_state_dict(tree)
        x, y, _ = data.block(np.array([client]), "test")
        with torch.no_grad():
            logits, truth = module(torch.from_numpy(x)), torch.from_numpy(y)
        loss = float(F.cross_entropy(logits, truth, reduction="sum")) if len(y) else 0.0
        found.append((int((logits.argmax(1) == truth).sum()), loss, len(y), tier.name))
    return found, never


def test_a_run_measures_what_plain_modules_give(tmp_path):
    """With the statistics of this very round, and calibrated where a client never trained."""
    job = own_job()
    folder = RunFolder.create(tmp_path / "run", "", "toy")
    rounds = Rounds(job, InlineExecutor(job.work, job.federation), folder)
    summary = rounds.run()
    found, never = by_hand(rounds, job)
    trained = set(ClientsLog(folder.clients).read()["client"].to_pylist())
    assert never == len(SIZES) - len(trained) > 0
    record = last(tmp_path / "run")
    tested = [one for one in found if one[2]]
    total = sum(n for _, _, n, _ in tested)
    assert record["acc_own"] == pytest.approx(sum(right for right, _, _, _ in tested) / total)
    assert record["loss_own"] == pytest.approx(sum(loss for _, loss, _, _ in tested) / total)
    each = np.array([right / n for right, _, n, _ in tested])
    assert record["acc_own_sd"] == pytest.approx(each.std(ddof=1))
    assert record["acc_own_worst10"] == pytest.approx(each.min())
    for tier in ("w1.0", "w0.5"):
        mine = [one for one in tested if one[3] == tier]
        share = sum(one[0] for one in mine) / sum(one[2] for one in mine)
        assert record["acc_own_tier"][tier] == pytest.approx(share)
    assert summary["acc_own"] == record["acc_own"] and summary["best_acc_own"] >= record["acc_own"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Records of a run in one process."""
    path = tmp_path_factory.mktemp("whole") / "run"
    toys.run(own_job(checkpoint_every=1), path)
    return list(read_metrics(path / "metrics.jsonl"))


def test_the_same_bits_on_two_hosts_and_after_a_resume(whole, tmp_path):
    toys.run(own_job(), tmp_path / "two", workers=2)
    with pytest.raises(toys.Crash):
        toys.run(own_job(checkpoint_every=1), tmp_path / "cut", observers=(toys.StopAfter(2),))
    toys.run(own_job(checkpoint_every=1), tmp_path / "cut", resume=True)
    for name in ("two", "cut"):
        records = list(read_metrics(tmp_path / name / "metrics.jsonl"))
        assert [[r[k] for k in KEYS] for r in records] == [[r[k] for k in KEYS] for r in whole]
    assert len({r["loss_own"] for r in whole}) == 3


def test_only_the_drawn_clients_are_measured(tmp_path):
    """Of one client: its tier alone, no spread, and whole samples."""
    job = own_job(eval_clients=1)
    (client,), part = Roster(job).evaluated
    assert part == "test"
    toys.run(job, tmp_path / "run")
    record = last(tmp_path / "run")
    name = job.fleet.tiers[int(job.fleet.tier_of[client])].name
    assert record["acc_own_tier"] == {name: record["acc_own"]} and record["acc_own_sd"] == 0
    (rows,) = job.federation.sizes(np.array([client]), "test")
    assert (record["acc_own"] * rows) % 1 == pytest.approx(0)


def test_held_out_clients_have_the_calibrated_network_of_their_tier(tmp_path):
    algorithm = FedPA(replace(fedpa().setting, tiers=toys.setting(toys.mlp()).tiers))
    job = toys.job(algorithm, toys.federation(SIZES, (6,), 3))
    toys.run(job, tmp_path / "run")
    record = last(tmp_path / "run")
    assert record["acc_own"] == record["acc_global"]
    assert record["loss_own"] == pytest.approx(record["loss_global"], rel=1e-12)


@pytest.mark.parametrize(
    "algorithm", [FedAvg(fedpa().setting), fedpa(statistics="indexed_mean")], ids=["fedavg", "mean"]
)
def test_where_the_server_holds_the_statistics_nothing_is_added(algorithm, tmp_path):
    assert not algorithm.evaluation.own
    toys.run(toys.job(algorithm, nobody_held_out(SIZES)), tmp_path / "run")
    assert not [key for key in last(tmp_path / "run") if "_own" in key]


@dataclass(frozen=True)
class Chooses(FedPA):
    """Clients report how many units they want."""

    def client_map(self, view, report):
        return view if report is None else IndexMap.prefix({"fc0": report["units"]})


def test_the_newest_report_says_which_units_are_a_clients_own():
    job = toys.job(Chooses(fedpa().setting), nobody_held_out(SIZES))
    roster = Roster(job)
    nobody = {"clients": np.array([], np.int64), "last_round": np.array([], np.int32)}
    roster.restore(nobody | {"reports": {1: {"units": 4}, 2: {"units": 3}}})
    views = job.work.algorithm.views({})
    result = BundleResult(0, {}, {}, reports={2: {"units": 2}})
    maps = roster.own_maps(np.array([0, 1, 2]), views, [result])
    tier = job.fleet.tiers[int(job.fleet.tier_of[0])].name
    assert maps == [views[tier], IndexMap.prefix({"fc0": 4}), IndexMap.prefix({"fc0": 2})]


DATA = """
import numpy as np
from subfleet.datasets import InMemory

def stripes():
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 200)
    x = (0.7 * draw.normal(size=(200, 1, 8, 8)) + y[:, None, None, None]).astype(np.float32)
    data = InMemory(x, y, np.arange(0, 201, 25), num_classes=3, name="stripes")
    data.held_out = np.array([], np.int64)
    return data
"""


def test_what_is_exported_is_what_was_measured(tmp_path, monkeypatch):
    (tmp_path / "own_stripes.py").write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment = Experiment(
        data={"name": "own_stripes:stripes"},
        model={"name": "small_cnn", "norm": "batch", "channels": [4, 6], "hidden": 8},
        fleet={
            "tiers": [
                {"name": "high", "share": 0.5, "width": 1.0},
                {"name": "low", "share": 0.5, "width": 0.5},
            ]
        },
        algorithm={"name": "fedpa"},
        train={"lr": 0.1, "batch_size": 5, "epochs": 1},
        run={"rounds": 2, "cohort": 3, "eval_every": 1, "engine": "loop"},
    )
    run = launch(experiment, out=tmp_path / "run", local=True)
    opened = TrainedRun.open(run.path)
    networks = [fitted(opened, Target("client", client)) for client in range(8)]
    found = [network.accuracy["measured"] for network in networks]
    rows = np.array([one["rows"] for one in found])
    assert rows.tolist() == [5] * 8 and 0 < len(opened.trained) < 8
    assert {bool(network.own) for network in networks} == {True, False}
    assert run.summary["acc_own"] == pytest.approx(np.mean([one["accuracy"] for one in found]))
    assert run.summary["loss_own"] == pytest.approx(np.mean([one["loss"] for one in found]))
