"""One battery for every algorithm in the registry: a new one is tested by being there."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
import toys

from subfleet import registry
from subfleet.algorithms.local import IndexedAveraging
from subfleet.core.program import LocalRule, RunProgram, Stream
from subfleet.datasets.vectors import SyntheticVectors
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.record import possible
from subfleet.platform.roster import Roster
from subfleet.platform.runfolder import RunFolder

NAMES = sorted(registry.algorithms())
PHASED = {"fedcs"}  # its rounds are not all alike
DENSE = [
    n for n in NAMES if issubclass(registry.algorithms()[n], IndexedAveraging) and n not in PHASED
]
NETS = {"plain": False, "norm": True}
SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6, 30, 4, 8, 5, 10]  # 12 train, 3 are held out
WIDTHS = (1.0, 0.5, 0.25)
# What learns a toy in ten rounds where the defaults, made for longer runs, do not.
LEARNS = {
    "centralised": {"fraction": 1.0},  # of clients that are no pool each does all its epochs
    "pfedme": {"width": 1.0, "penalty": 1.0, "personal_lr": 0.2, "eta": 0.5},
    "stc": {"width": 1.0, "rule": LocalRule(lr=0.3)},
}

# What toys need that are narrower than any network worth searching.
TOY = {
    "fedcs": {"warm_up": 1, "min_units": 1, "searchers": 7 / 12},
    "feduniform": {"widths": WIDTHS},
}

each_algorithm = pytest.mark.parametrize("name", NAMES)
each_net = pytest.mark.parametrize("net", NETS)


def data():
    return toys.federation(SIZES, (6,), 3, seed=1)


def algorithm(name, net="plain", *, rounds=4, **options):
    rule = options.pop("rule", LocalRule(lr=0.1, momentum=0.5))
    setting = toys.setting(
        toys.mlp(norm=NETS[net]), WIDTHS, rule, Stream(batch=4, epochs=2), seed=3, rounds=rounds
    )
    return registry.algorithms()[name](setting, **TOY.get(name, {}) | options)


def job(name, net="plain", *, rounds=4, **options):
    return toys.job(algorithm(name, net, rounds=rounds), data(), **{"cohort": 7} | options)


def final(path):
    return RunFolder(path, "").read_final()


def rows(path):
    """The client rows without what the clock says; NaN as None, so that rows can be compared."""
    table = ClientsLog(path / "clients").read().to_pydict()
    return {
        name: [value if value == value else None for value in values]
        for name, values in table.items()
        if name != "seconds"
    }


def records(path):
    """The rounds' records without what the clock says."""
    timed = ("seconds", "clients_per_s", "memory")
    found = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timed} for record in found]


@each_algorithm
@each_net
def test_side_by_side_equals_one_by_one(name, net, tmp_path):
    # Batch norms of two rows amplify rounding: short steps.
    made = algorithm(name, net, rule=LocalRule(lr=0.01, momentum=0.5))
    ways = [possible(made.setting.net, made.phase(r).program) for r in range(1, 5)]
    # Everybody, in two bundles: the same numbers side by side each round, traced but once.
    options = {"cohort": 12, "bundle_clients": 6}
    for way in ("loop", "traced", "vmap"):
        toys.run(toys.job(made, data(), engine=way, **options), tmp_path / way)
        choices = json.loads((tmp_path / way / "engine.json").read_text())["choices"]
        wanted = {way if way in each else "loop" for each in ways}
        assert {choice["way"] for choice in choices} <= wanted
        assert toys.distance(final(tmp_path / way), final(tmp_path / "loop")) < 1e-5


@each_algorithm
@each_net
def test_the_same_bits_for_any_number_of_workers(name, net, tmp_path):
    digests = {
        toys.run(
            job(name, net, bundle_clients=2, rounds=3), tmp_path / str(workers), workers=workers
        )["params_sha256"]
        for workers in (1, 2, 3)
    }
    assert len(digests) == 1
    assert rows(tmp_path / "1") == rows(tmp_path / "3")


@each_algorithm
@each_net
def test_another_cut_into_bundles_changes_rounding_only(name, net, tmp_path):
    for clients in (1, 3, 100):
        toys.run(job(name, net, bundle_clients=clients, rounds=3), tmp_path / str(clients))
    for a, b in pairwise(("1", "3", "100")):
        assert toys.distance(final(tmp_path / a), final(tmp_path / b)) < 1e-5


@each_algorithm
@each_net
def test_a_crash_and_a_resume_equal_an_uninterrupted_run(name, net, tmp_path):
    """Checkpoints come every second round: after round 1 there is none, after 3 one is lost."""
    options = {"checkpoint_every": 2, "eval_every": 2, "rounds": 4}
    whole = toys.run(job(name, net, **options), tmp_path / "whole")
    expected, table = records(tmp_path / "whole"), rows(tmp_path / "whole")
    pairs = list(zip(table["round"], table["client"], strict=True))
    assert len(set(pairs)) == len(pairs) == sum(record["clients"] for record in expected)
    assert name in PHASED or len(pairs) == 4 * 7
    for stop in (1, 3):
        path = tmp_path / str(stop)
        with pytest.raises(toys.Crash):
            toys.run(job(name, net, **options), path, observers=(toys.StopAfter(stop),))
        resumed = toys.run(job(name, net, **options), path, resume=True)
        assert resumed["params_sha256"] == whole["params_sha256"]
        assert [record["round"] for record in records(path)] == [1, 2, 3, 4]
        assert records(path) == expected
        assert rows(path) == table


@each_algorithm
@each_net
def test_a_longer_run_begins_like_a_shorter_one(name, net, tmp_path):
    toys.run(job(name, net, rounds=2), tmp_path / "run")
    longer = toys.run(job(name, net, rounds=3), tmp_path / "run", resume=True)
    whole = toys.run(job(name, net, rounds=3), tmp_path / "whole")
    assert longer["params_sha256"] == whole["params_sha256"]


@each_algorithm
@each_net
def test_parameters_keep_names_shapes_and_dtypes(name, net, tmp_path):
    made = algorithm(name, net)
    start = made.model(made.init(made.setting.net.init(3)))
    toys.run(toys.job(made, data()), tmp_path / "run")
    end = final(tmp_path / "run")
    assert {n: (v.shape, v.dtype) for n, v in end.items()} == {
        n: (v.shape, v.dtype) for n, v in start.items()
    }
    assert not toys.same_bits(start, end)


@each_algorithm
def test_wide_parameters_stay_wide(name):
    made = algorithm(name)
    wide = {n: v.double() for n, v in made.setting.net.init(3).items()}
    state, _ = toys.one_round(made, data(), made.init(wide), [0, 2, 4], [0, 1, 2])
    assert {v.dtype for v in made.model(state).values()} == {torch.float64}


@each_algorithm
@each_net
def test_a_client_whose_training_is_not_finite_is_left_out(name, net):
    """Its rows hold an infinity; the others are merged as if it had not been there."""
    sick = data()
    healthy = sick.block

    def block(ids, part):
        found = healthy(ids, part)
        x, at = found.x.copy(), ids.tolist().index(2)
        x[found.offsets[at] : found.offsets[at + 1]] = np.inf
        return found._replace(x=x)

    sick.block = block
    made = algorithm(name, net)
    state, result = toys.one_round(made, sick, made.init(made.setting.net.init(3)), [0, 2, 4])
    found = dict(zip(result.table["client"].tolist(), result.table["status"].tolist(), strict=True))
    assert found == {0: "ok", 2: "skipped", 4: "ok"}
    assert all(torch.isfinite(value).all() for value in made.model(state).values())


@each_algorithm
@each_net
def test_a_toy_is_learned(name, net, tmp_path):
    made = algorithm(name, net, rounds=10, **LEARNS.get(name, {}))
    toys.run(toys.job(made, data(), eval_every=1, cohort=12), tmp_path / "run")
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert records[-1]["loss_train"] < 0.8 * records[0]["loss_train"]
    assert records[-1]["loss_global"] < records[0]["loss_global"]
    assert sorted(records[-1]["acc_tier"]) == sorted(f"w{w}" for w in WIDTHS)


@each_algorithm
def test_many_clients_drawn_on_the_fly(name, tmp_path):
    few = {"searchers": 30 / 4000} if name == "fedcs" else {}
    made = algorithm(name, rounds=6, rule=LocalRule(lr=0.2), **few)
    vectors = SyntheticVectors(5_000, seed=1, samples=15, dim=6, num_classes=3, signal=1.5)
    toys.run(toys.job(made, vectors, cohort=30, eval_clients=40, eval_every=3), tmp_path / "run")  # type: ignore
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert records[-1]["loss_train"] < records[0]["loss_train"]
    assert {r["clients"] for r in records} == {30} and {r["samples"] for r in records} == {30 * 12}


@each_algorithm
def test_the_cohort_sees_its_own_plan(name):
    """Tasks name each client once, in any order, with maps that fit the network."""
    work = job(name).work
    made = work.algorithm
    state = made.init(work.net.init(3))
    cohort = Roster(job(name)).cohort(made.phase(1), 1)
    plan = made.plan(state, cohort, 1)
    assert sorted(t.client for t in plan.tasks) == cohort.id.tolist()
    for task in plan.tasks:
        work.net.space.validate(task.map)
        assert task.shared in plan.shared and task.weight >= 0
    assert set(made.views(state)) == {"global"} | {f"w{w}" for w in WIDTHS}


# --- simulated time ------------------------------------------------------------------------


@each_algorithm
@each_net
def test_what_is_planned_is_what_is_charged_and_uploads_are_no_longer(name, net, tmp_path):
    """A device of one FLOP a second takes its FLOPs, one of a byte a second its bytes at most."""
    made = algorithm(name, net)
    for number, path in (("flops_per_s", "flops"), ("up_bytes_per_s", "bytes_up")):
        toys.run(job(name, net, devices=[{number: 1}] * 3), tmp_path / path)
        table = rows(tmp_path / path)
        assert set(table["status"]) == {"ok"}
        if path == "flops":
            searches = {
                r for r in range(1, 5) if isinstance(made.phase(r).program, RunProgram)
            }  # of which the plan has an estimate
            takes = zip(table["round"], table["sim_seconds"], table["flops"], strict=True)
            assert all(planned == spent for r, planned, spent in takes if r not in searches)
        else:
            assert (np.array(table["sim_seconds"]) >= np.array(table["bytes_up"])).all()


@each_algorithm
def test_late_and_failed_clients_are_in_nobodys_way(name, tmp_path):
    devices = [{"up_bytes_per_s": {"lognormal": [100, 1.0]}, "failure_rate": 0.2}] * 3
    options = {"cohort": 6, "over_select": 1.5, "deadline": 8.0, "devices": devices}
    if registry.algorithms()[name].pools:
        options |= {"cohort": 12, "over_select": 1.0}
    made = job(name, "norm", **options)
    digest = toys.run(made, tmp_path / "one")["params_sha256"]
    assert toys.run(made, tmp_path / "three", workers=3)["params_sha256"] == digest
    status = rows(tmp_path / "one")["status"]
    assert {"ok", "late", "failed"} <= set(status)
    seen = list(read_metrics(tmp_path / "one" / "metrics.jsonl"))
    assert sum(r["clients"] for r in seen) == status.count("ok")
    assert sum(r["late"] for r in seen) == status.count("late")
    assert sum(r["dropped"] for r in seen) == status.count("failed")


# --- what indexed averaging has in common --------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
@each_net
def test_rounds_equal_the_plain_way(name, net, tmp_path):
    run = job(name, net, cohort=7)
    toys.run(run, tmp_path / "run")
    table = rows(tmp_path / "run")
    cohorts: dict[int, list[tuple[int, int]]] = {}
    for round, client in zip(table["round"], table["client"], strict=True):
        cohorts.setdefault(round, []).append((client, int(run.fleet.tier_of[client])))
    expected, _ = reference.federated(run.work.algorithm, data(), cohorts)
    assert toys.distance(final(tmp_path / "run"), expected) < 1e-5


def entries(a, b, *, norm, statistics):
    """Numbers in an MLP 6-a-b-3: weights and biases; scales and shifts; means and variances."""
    plain = (6 * a + a) + (a * b + b) + (b * 3 + 3)
    return plain + norm * 2 * (a + b) + norm * statistics * 2 * (a + b)


def map_bytes(fc0, fc1):
    """Nothing for all, 2 bytes a group for first units, else a bit for each of the 12 units."""
    if (len(fc0), len(fc1)) == (8, 4):
        return 0
    prefix = list(fc0) == list(range(len(fc0))) and list(fc1) == list(range(len(fc1)))
    return 2 * 2 if prefix else 2


@pytest.mark.parametrize("name", DENSE)
@each_net
def test_bytes_and_coverage_follow_from_the_maps(name, net, tmp_path):
    run = job(name, net)
    toys.run(run, tmp_path / "run")
    made, table = run.work.algorithm, rows(tmp_path / "run")
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        up = down = maps = 0
        seen = {"fc0": np.zeros(8, int), "fc1": np.zeros(4, int)}
        for i, round in enumerate(table["round"]):
            if round != record["round"]:
                continue
            map = made.map_of(int(run.fleet.tier_of[table["client"][i]]), round)
            kept = {g: map.kept.get(g, np.arange(len(seen[g]))) for g in seen}
            for group, units in kept.items():
                seen[group][units] += 1
            numbers = entries(
                len(kept["fc0"]),
                len(kept["fc1"]),
                norm=NETS[net],
                statistics=not made.local_statistics,
            )
            words = map_bytes(**kept)
            assert table["bytes_up"][i] == table["bytes_down"][i] == 4 * numbers + words
            up, down, maps = up + 4 * numbers + words, down + 4 * numbers + words, maps + 2 * words
        assert (record["bytes_up"], record["bytes_down"], record["bytes_map"]) == (up, down, maps)
        assert record["coverage_min"] == min(int(c.min()) for c in seen.values())
