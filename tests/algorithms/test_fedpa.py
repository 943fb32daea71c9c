from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import toys

from subfleet.algorithms import FedAvg, FedPA
from subfleet.core import aggregate
from subfleet.core.algorithm import RoundPlan
from subfleet.core.program import LocalRule, Stream
from subfleet.core.units import IndexMap
from subfleet.datasets.federation import split_clients
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]


@pytest.mark.parametrize("norm", [False, True])
def test_with_full_maps_it_is_fedavg_bit_for_bit(norm, tmp_path):
    setting = toys.setting(toys.mlp(norm=norm), (1.0, 1.0), LocalRule(lr=0.1, momentum=0.9))
    data = toys.federation(SIZES, (6,), 3)
    options = {"statistics": "indexed_mean"}
    partial = toys.run(toys.job(FedPA(setting, **options), data), tmp_path / "fedpa")
    plain = toys.run(toys.job(FedAvg(setting, **options), data), tmp_path / "fedavg")
    assert partial["params_sha256"] == plain["params_sha256"]


NARROW = IndexMap.prefix({"fc0": 2})


@pytest.mark.parametrize(
    ("normaliser", "sampled", "bias"),
    [
        ("count", "AB", [2.5, 2.5, 1, 1]),
        ("count", "B", [3, 3, 0, 0]),
        ("count", "", [0, 0, 0, 0]),
        ("all", "AB", [2.5, 2.5, 0.25, 0.25]),
        ("all", "B", [3, 3, 0, 0]),
    ],
)
def test_nested_widths_by_hand(normaliser, sampled, bias):
    """A has 4 units, uploads 1s, n = 1; B has 2 units, uploads 3s, n = 3; the server holds 0s."""
    net = toys.mlp(hidden=(4,))
    algorithm = FedPA(toys.setting(net, (1.0, 0.5)), normaliser=normaliser)
    zeros = {n: torch.zeros_like(v) for n, v in net.init(0).items()}
    update = aggregate.Update()
    for name, map, value, weight in (("A", toys.FULL, 1.0, 1), ("B", NARROW, 3.0, 3)):
        if name in sampled:
            small = {n: torch.full_like(v, value) for n, v in net.space.extract(zeros, map).items()}
            aggregate.accumulate(update, net.space, map, small, weight)
    state = algorithm.server_step({"params": zeros}, RoundPlan([], {}), update)
    assert state["params"]["fc0.bias"].tolist() == bias
    # The head's inputs are units of fc0 too; its bias belongs to everybody.
    assert state["params"]["head.weight"][0].tolist() == bias
    shared = {"AB": 2.5, "B": 3.0, "": 0.0}[sampled]
    assert state["params"]["head.bias"].tolist() == [shared] * 3


def test_each_tier_trains_its_first_units_and_the_rest_stays():
    net, data = toys.mlp(), toys.all_train([9, 6], (6,), 3)
    algorithm = FedPA(toys.setting(net, (1.0, 0.5, 0.25)))
    params = net.init(0)
    state, result = toys.one_round(algorithm, data, {"params": params}, [0, 1], [1, 2])
    changed = (state["params"]["fc0.weight"] != params["fc0.weight"]).any(1).tolist()
    assert changed == [True] * 4 + [False] * 4
    counts = aggregate.coverage_counts(result.update, net.space)
    assert counts["fc0"].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]


# --- BatchNorm's running statistics ------------------------------------------------------------


def test_statistics_are_in_no_payload_and_not_on_the_server():
    net, data = toys.cnn("batch"), toys.all_train([9, 6], (1, 8, 8), 4)
    algorithm = FedPA(toys.setting(net, (1.0, 0.5)))
    state = algorithm.init(net.init(0))
    after, result = toys.one_round(algorithm, data, state, [0, 1], [0, 1])
    num, _ = aggregate.sums(result.update, net.space)
    for tree in (state["params"], after["params"], num):
        assert not [n for n in tree if "running" in n or "num_batches" in n]
        assert "norm1.weight" in tree and "norm1.bias" in tree
    assert [sorted(kept) for kept in result.kept] == [sorted(net.statistics)] * 2


def test_statistics_are_the_clients_own_round_after_round(tmp_path):
    """Untouched by aggregation: what a client kept is what it starts with the next time."""
    data = toys.federation(SIZES, (6,), 3)
    setting = toys.setting(
        toys.mlp(norm=True), (1.0, 0.5), LocalRule(lr=0.1), Stream(batch=4), rounds=3
    )
    job = toys.job(FedPA(setting), data, cohort=5)
    folder = RunFolder.create(tmp_path / "run", "", "toy")
    rounds = Rounds(job, InlineExecutor(job.work, data), folder)
    rounds.run()
    table = ClientsLog(folder.clients).read().to_pydict()
    cohorts: dict[int, list[tuple[int, int]]] = {}
    for round, client in zip(table["round"], table["client"], strict=True):
        cohorts.setdefault(round, []).append((client, int(job.fleet.tier_of[client])))
    times = np.unique(np.array(table["client"]), return_counts=True)[1]
    assert times.max() > 1  # somebody came back
    expected, own = reference.federated(job.work.algorithm, data, cohorts)
    assert toys.distance(rounds.state["params"], expected) < 1e-5
    for client, row in zip(own, rounds.kept.read(np.array(list(own))), strict=True):
        kept = {name: torch.as_tensor(np.asarray(value)) for name, value in row.items()}
        assert toys.distance(kept, own[client]) < 1e-5
    (never,) = rounds.kept.read(np.array([int(rounds.roster.evaluated[0][0])]))
    assert not never


def test_the_mean_of_statistics_travels_when_asked_for():
    net, data = toys.mlp(norm=True), toys.all_train([8, 8], (6,), 3)
    algorithm = FedPA(toys.setting(net, (1.0, 0.5)), statistics="indexed_mean")
    state = algorithm.init(net.init(0))
    assert net.statistics <= set(state["params"])
    after, result = toys.one_round(algorithm, data, state, [0, 1], [0, 1])
    assert not algorithm.keeps and result.kept == [None, None]
    assert not torch.equal(
        after["params"]["norm0.running_mean"], state["params"]["norm0.running_mean"]
    )


# --- bytes on the wire -------------------------------------------------------------------------


def test_wire_bytes_by_hand(tmp_path):
    """Every message: 4 bytes a number, and 2 bytes a group where the map keeps first units.

    MLP 6-8-4-3, whole:  6*8+8 + 8*4+4 + 4*3+3 = 56 + 36 + 15 = 107 numbers, 428 bytes, no map
    half of each layer:  6*4+4 + 4*2+2 + 2*3+3 = 28 + 10 +  9 =  47 numbers, 188 bytes + 2*2
    """
    net = toys.mlp(6, (8, 4), 3)
    job = toys.job(FedPA(toys.setting(net, (1.0, 0.5))), toys.federation(SIZES, (6,), 3), cohort=8)
    toys.run(job, tmp_path / "run")
    train, _ = split_clients(job.work.seed, job.federation.num_clients)
    rich = int((job.fleet.tier_of[train] == 0).sum())
    poor = 8 - rich
    assert rich and poor
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):  # all 8 train in each round
        assert record["bytes_up"] == 428 * rich + 192 * poor
        assert record["bytes_down"] == 428 * rich + 192 * poor
        assert record["bytes_map"] == 2 * 4 * poor  # up and down
        assert record["coverage_min"] == rich  # nobody else trains the last units
        assert record["coverage"] == {group: rich for group in net.space.groups}
        # The first half of the units is everyone's, the rest that of the rich.
        assert record["keep"] == {group: (8 + rich) / 16 for group in net.space.groups}
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    for client, units in zip(table["client"], table["units"], strict=True):
        assert units == ("8 4" if job.fleet.tier_of[client] == 0 else "4 2")
    for client, up, down in zip(
        table["client"], table["bytes_up"], table["bytes_down"], strict=True
    ):
        assert up == down == (428 if job.fleet.tier_of[client] == 0 else 192)


def test_statistics_that_stay_local_cost_no_bytes(tmp_path):
    """With BatchNorm a scale and a shift a unit travel: 4 * 2 * (8 + 4) = 96 bytes more."""
    job = toys.job(
        FedPA(toys.setting(toys.mlp(norm=True))), toys.federation(SIZES, (6,), 3), rounds=1
    )
    toys.run(job, tmp_path / "run")
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["bytes_up"] == record["bytes_down"] == 4 * (428 + 96)
    assert record["bytes_map"] == 0
