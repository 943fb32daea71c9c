"""The round loop: who takes part, when it stops, what it remembers, what it refuses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import pytest
import torch
import toys
from torch import nn

from subfleet.algorithms import FedAvg, FedPA
from subfleet.algorithms.local import cross_entropy
from subfleet.core.algorithm import Evaluation, Phase, RoundPlan
from subfleet.core.errors import InputError, RunFailed
from subfleet.core.program import ClientResult, LocalRule, LossProgram, Stream
from subfleet.datasets.federation import split_clients
from subfleet.models import chain
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.roster import Roster
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

SIZES = [12, 7, 20, 9, 15, 5, 11, 8, 14, 6]  # 8 train, 2 are held out


def data(seed=0):
    return toys.federation(SIZES, (6,), 3, seed)


def fedavg(**options):
    return FedAvg(toys.setting(toys.mlp(), **options), width=1.0)


def cohorts(path):
    table = ClientsLog(path / "clients").read().to_pydict()
    found: dict[int, list[int]] = {}
    for round, client in zip(table["round"], table["client"], strict=True):
        found.setdefault(round, []).append(client)
    return found


def test_cohorts_come_from_the_training_clients_and_from_the_seed_alone(tmp_path):
    toys.run(toys.job(fedavg(), data()), tmp_path / "a")
    toys.run(toys.job(fedavg(), data(), bundle_clients=1), tmp_path / "b", workers=2)
    train, held = split_clients(0, 10)
    found = cohorts(tmp_path / "a")
    assert found == cohorts(tmp_path / "b")
    assert sorted(found) == [1, 2, 3, 4]
    for clients in found.values():
        assert sorted(set(clients)) == clients and len(clients) == 4
        assert not set(clients) & set(held.tolist()) and set(clients) <= set(train.tolist())
    assert len({tuple(c) for c in found.values()}) > 1
    toys.run(toys.job(fedavg(seed=1), data()), tmp_path / "c")
    assert cohorts(tmp_path / "c") != found


def test_a_cohort_larger_than_the_training_clients_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run\.cohort=9 .* 8 clients"):
        toys.run(toys.job(fedavg(), data(), cohort=9), tmp_path / "run")


def test_evaluation_is_due_every_so_often_and_in_the_last_round(tmp_path):
    toys.run(toys.job(fedavg(rounds=5), data(), eval_every=2), tmp_path / "run")
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [r["round"] for r in records if "acc_global" in r] == [2, 4, 5]
    assert [r["round"] for r in records if "acc_local" in r] == [2, 4, 5]


def test_the_global_accuracy_is_that_of_the_final_model_on_all_held_out_rows(tmp_path):
    summary = toys.run(toys.job(fedavg(), data()), tmp_path / "run")
    params = RunFolder(tmp_path / "run", "").read_final()
    _, held = split_clients(0, 10)
    x, y, _ = data().block(held, "all")
    module = toys.mlp().module().eval()
    module.load_state_dict(params)
    right = (module(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert summary["acc_global"] == pytest.approx(right)


def test_a_target_ends_the_run_and_a_resume_adds_nothing(tmp_path):
    options = {"eval_every": 2}
    fast = fedavg(rounds=9, rule=LocalRule(lr=0.5))
    toys.run(toys.job(fast, data(), **options), tmp_path / "whole")
    curve = [
        (r["round"], r["acc_global"])
        for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")
        if "acc_global" in r
    ]
    target = max(accuracy for _, accuracy in curve)
    first = next(round for round, accuracy in curve if accuracy == target)
    assert first < 9
    job = toys.job(fast, data(), **options, target_accuracy=target)
    summary = toys.run(job, tmp_path / "run")
    assert summary["rounds"] == first and summary["finished"]
    again = toys.run(job, tmp_path / "run", resume=True)
    assert again["rounds"] == first and again["params_sha256"] == summary["params_sha256"]


def test_time_runs_out_after_a_whole_round_and_the_run_can_go_on(tmp_path):
    whole = toys.run(toys.job(fedavg(), data()), tmp_path / "whole")
    short = toys.run(toys.job(fedavg(), data(), max_seconds=0.0), tmp_path / "run")
    assert short["rounds"] == 1 and not short["finished"]
    summary = toys.run(toys.job(fedavg(), data()), tmp_path / "run", resume=True)
    assert summary["finished"] and summary["params_sha256"] == whole["params_sha256"]


def poisoned(client):
    found = data()
    found._x[found._offsets[client] : found._offsets[client + 1]] = np.nan
    return found


def test_training_that_is_not_finite_names_round_client_and_tier(tmp_path):
    train, _ = split_clients(0, 10)
    bad = int(train[3])
    job = toys.job(fedavg(), poisoned(bad), cohort=8, checkpoint_every=1)
    with pytest.raises(
        RunFailed, match=rf"round 1: .* {bad} \(tier w1\.0\).*no checkpoint yet.*on_nan"
    ):
        toys.run(job, tmp_path / "run")
    assert list(read_metrics(tmp_path / "run" / "metrics.jsonl")) == []


def test_skipped_clients_are_as_if_they_had_weight_zero(tmp_path):
    train, _ = split_clients(0, 10)
    job = toys.job(fedavg(), poisoned(int(train[3])), cohort=8, on_nan="skip")
    toys.run(job, tmp_path / "run")
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [r["clients"] for r in records] == [7] * 4
    status = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()["status"]
    assert status.count("skipped") == 4
    assert all(
        bool(v.isfinite().all()) for v in RunFolder(tmp_path / "run", "").read_final().values()
    )


def test_the_last_good_checkpoint_survives_a_failed_round(tmp_path):
    """The learning rate explodes only later: rounds before it stay."""
    options = {"checkpoint_every": 1, "cohort": 8}
    with pytest.raises(RunFailed, match=r"round-0*2"):
        toys.run(
            toys.job(Explodes(toys.setting(toys.mlp(), rounds=4), at=3), data(), **options),
            tmp_path / "run",
        )
    mild = toys.job(Explodes(toys.setting(toys.mlp(), rounds=4), at=9), data(), **options)
    resumed = toys.run(mild, tmp_path / "run", resume=True)
    whole = toys.run(mild, tmp_path / "whole")
    assert resumed["params_sha256"] == whole["params_sha256"]


@dataclass(frozen=True)
class Explodes(FedAvg):
    """Training whose rate is beyond all bounds from one round on."""

    width: float | None = 1.0
    at: int = 0

    def phase(self, round):
        phase = super().phase(round)
        rule = LocalRule(lr=1e30 if round >= self.at else 0.1)
        return replace(phase, program=replace(phase.program, rule=rule))


@dataclass(frozen=True)
class Remembers(FedAvg):
    """Two phases, reports and last rounds: what a cohort sees is written into the state."""

    width: float | None = 1.0

    def init(self, params):
        return super().init(params) | {"entered": [], "seen": []}

    def phase(self, round):
        def finish(start, trained, kept, inputs):
            return ClientResult(trained, report={"times": int(inputs["times"]) + 1, "round": round})

        program = LossProgram(cross_entropy, self.setting.rule, self.setting.stream, finish)
        if round <= 2:
            return Phase("first", program, eligible=("w1.0",), wants_labels=True)
        return Phase("second", program, fraction=0.5)

    def enter(self, phase, state):
        return state | {"entered": [*state["entered"], phase.name]}

    def plan(self, state, cohort, round):
        plan = super().plan(state, cohort, round)
        before = [0 if r is None else r["times"] for r in cohort.report]
        for report, last in zip(cohort.report, cohort.last_round.tolist(), strict=True):
            assert last == (-1 if report is None else report["round"])
        assert (cohort.label_counts is not None) == (round <= 2)
        if cohort.label_counts is not None:
            assert cohort.label_counts.sum(1).tolist() == cohort.num_samples.tolist()
        tasks = [
            replace(task, inputs={"times": torch.tensor(n)})
            for task, n in zip(plan.tasks, before, strict=True)
        ]
        state["seen"].append([round, cohort.id.tolist(), before])
        return RoundPlan(tasks, plan.shared)

    def server_step(self, state, plan, reduced):
        return state | super().server_step(state, plan, reduced)


def last_state(job, path):
    folder = RunFolder.open(path, "toy")
    executor = InlineExecutor(job.work, job.federation)
    rounds = Rounds(job, executor, folder)
    rounds.run()
    return rounds.state


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_phases_reports_and_last_rounds_survive_a_crash(tmp_path, stop):
    net = toys.mlp()
    algorithm = Remembers(toys.setting(net, (1.0, 0.5), rounds=5))
    job = toys.job(algorithm, data(), checkpoint_every=1, cohort=3)
    toys.run(job, tmp_path / "whole")
    with pytest.raises(toys.Crash):
        toys.run(job, tmp_path / "run", observers=(toys.StopAfter(stop),))
    toys.run(job, tmp_path / "run", resume=True)
    whole, resumed = (last_state(job, tmp_path / name) for name in ("whole", "run"))
    assert whole["entered"] == resumed["entered"] == ["first", "second"]
    assert list(map(list, whole["seen"])) == list(map(list, resumed["seen"]))
    assert toys.same_bits(whole["params"], resumed["params"])
    strong = {c for c in range(10) if job.fleet.tier_of[c] == 0}
    train, _ = split_clients(0, 10)
    for round, ids, _ in whole["seen"]:
        assert len(ids) == (min(3, len(strong & set(train.tolist()))) if round <= 2 else 4)
        assert round > 2 or set(ids) <= strong
    assert max(n for _, _, before in whole["seen"] for n in before) >= 1
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [line["phase"] for line in lines] == ["first"] * 2 + ["second"] * 3


def test_a_damaged_checkpoint_costs_rounds_but_none_is_there_twice(tmp_path):
    """Client parts and lines beyond the checkpoint that is left are on disk already: cut off."""
    whole = toys.run(toys.job(fedavg(), data(), checkpoint_every=2), tmp_path / "run")
    before = cohorts(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("round-*"))
    for file in newest.iterdir():
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    # Checkpoints now come at other rounds, so that the new parts do not bear the old ones' names.
    job = toys.job(fedavg(), data(), checkpoint_every=1)
    told = Told()
    again = toys.run(job, tmp_path / "run", resume=True, observers=(told,))
    (warning,) = told.info["warnings"]
    assert f"{newest} is damaged" in warning
    assert again["params_sha256"] == whole["params_sha256"]
    assert cohorts(tmp_path / "run") == before
    lines = [r["round"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert lines == [1, 2, 3, 4]


class Told(toys.StopAfter):
    """An observer that remembers how the run began."""

    def __init__(self):
        super().__init__(-1)
        self.info = {}

    def on_start(self, info):
        self.info = info


class Follows(Told):
    """It also follows the rounds as they go."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def on_progress(self, done, total, doing):
        self.heard.append((doing, done, total))

    def on_round(self, record, coverage):
        self.heard.append(record["phase"])


def test_an_observer_hears_of_the_phases_and_of_the_clients_that_are_done(tmp_path):
    algorithm = Remembers(toys.setting(toys.mlp(), rounds=4))
    job = toys.job(algorithm, data(), cohort=3, bundle_clients=1, checkpoint_every=1)
    watching = Follows()
    toys.run(job, tmp_path / "run", observers=(watching,))
    assert watching.info["phases"] == [("first", 1, 2), ("second", 3, 4)]
    assert [said for said in watching.heard if isinstance(said, str)] == [
        *("first", "first", "second", "second"),
    ]
    of_round = []
    for said in watching.heard:
        if said not in ("first", "second"):
            if said[0] == "train":
                of_round.append(said)
            continue
        clients = 3 if said == "first" else 4
        done = [count for _, count, of in of_round if of == clients]
        assert len(done) == len(of_round) > 2  # more than the begin and the end
        assert done == sorted(set(done)) and (done[0], done[-1]) == (0, clients)
        of_round = []
    again = Follows()
    toys.run(job, tmp_path / "run", resume=True, observers=(again,))
    assert (again.info["start"], again.info["phases"]) == (4, watching.info["phases"])
    assert again.heard == []


def test_an_observer_hears_of_what_is_tried_and_of_the_clients_that_are_evaluated(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))
    twice = toys.federation([*SIZES, *SIZES], (6,), 3, 0)  # four are held out
    watching = Follows()
    job = toys.job(fedavg(rounds=2), twice, engine="auto", eval_every=2)
    toys.run(job, tmp_path / "run", observers=(watching,))
    doing = [said if isinstance(said, str) else said[0] for said in watching.heard]
    # The last is the phase's name, of a round that is done.
    assert [name for name, _ in groupby(doing)] == ["try", "train", "evaluate", "train"]
    assert watching.heard[0] == ("try", 0, 1)
    assert [said[1:] for said in watching.heard if said[0] == "evaluate"] == [
        (done, 4) for done in range(5)
    ]


class SeesClients(toys.StopAfter):
    """An observer that remembers the rows of each round's clients."""

    def __init__(self):
        super().__init__(-1)
        self.heard = []

    def on_clients(self, round, columns):
        self.heard.append((round, {name: list(values) for name, values in columns.items()}))

    def on_round(self, record, coverage):
        assert self.heard[-1][0] == record["round"]  # the clients come first


def test_an_observer_sees_the_rows_that_are_written(tmp_path):
    seen = SeesClients()
    toys.run(toys.job(fedavg(rounds=2), data(), cohort=4), tmp_path / "run", observers=(seen,))
    written = ClientsLog(tmp_path / "run" / "clients").read()
    assert [round for round, _ in seen.heard] == [1, 2]
    for name in ("client", "tier", "num_samples", "bytes_up", "status"):
        heard = [value for _, columns in seen.heard for value in columns[name]]
        assert heard == written[name].to_pylist() and len(heard) == 8


def test_rows_of_clients_do_not_wait_for_the_end_without_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("subfleet.platform.rounds.FLUSH_ROUNDS", 2)
    job = toys.job(fedavg(rounds=5), data(), checkpoint_every=0)
    toys.run(job, tmp_path / "run")
    parts = sorted(p.name for p in (tmp_path / "run" / "clients").iterdir())
    assert [p.removesuffix(".parquet")[-6:] for p in parts] == ["000002", "000004", "000005"]
    assert sorted(cohorts(tmp_path / "run")) == [1, 2, 3, 4, 5]
    # A crash after a flush: nothing is there twice.
    with pytest.raises(toys.Crash):
        toys.run(job, tmp_path / "cut", observers=(toys.StopAfter(3),))
    toys.run(job, tmp_path / "cut", resume=True)
    assert cohorts(tmp_path / "cut") == cohorts(tmp_path / "run")


def open_files(folder):
    links = (
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{number}")
    )
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize("norm", [False, True])
def test_a_run_closes_what_it_opened_and_keeps_only_what_is_kept(tmp_path, norm):
    net = toys.mlp(norm=norm)
    job = toys.job(FedPA(toys.setting(net, (1.0, 0.5), rounds=2)), data())
    assert job.work.algorithm.keeps == norm
    toys.run(job, tmp_path / "run")
    assert (tmp_path / "run" / "kept").exists() == norm
    with pytest.raises(toys.Crash):
        toys.run(job, tmp_path / "cut", observers=(toys.StopAfter(1),))
    assert open_files(tmp_path) == []


@dataclass(frozen=True)
class Collects(FedAvg):
    """FedAvg over collected results, planned in an order of its own."""

    width: float | None = 1.0

    def phase(self, round):
        return replace(super().phase(round), reduction="collect")

    def plan(self, state, cohort, round):
        plan = super().plan(state, cohort, round)
        return RoundPlan(sorted(plan.tasks, key=lambda t: (-(t.client % 3), t.client)), plan.shared)

    def server_step(self, state, plan, reduced):
        assert [item.task.client for item in reduced] == [task.client for task in plan.tasks]
        total = sum(item.task.weight for item in reduced)
        params = {
            name: sum(i.result.update[name].double() * (i.task.weight / total) for i in reduced)
            for name in state["params"]
        }
        return {"params": {name: value.float() for name, value in params.items()}}


def test_collected_results_reach_the_server_in_the_order_of_the_plan(tmp_path):
    net = toys.mlp()
    for cls, name in ((Collects, "collected"), (FedAvg, "summed")):
        job = toys.job(cls(toys.setting(net), width=1.0), data(), bundle_clients=1, cohort=8)
        toys.run(job, tmp_path / name, workers=3)
    a, b = (RunFolder(tmp_path / name, "").read_final() for name in ("collected", "summed"))
    assert toys.distance(a, b) < 1e-6
    (record, *_) = read_metrics(tmp_path / "collected" / "metrics.jsonl")
    assert "coverage_min" not in record and record["clients"] == 8


def test_a_phase_for_a_tier_that_no_training_client_has_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Nobody(FedAvg):
        def phase(self, round):
            return replace(super().phase(round), eligible=("w0.5",))

    setting = toys.setting(toys.mlp(), (1.0, 0.5))
    tiers = (replace(setting.tiers[0], share=1.0), replace(setting.tiers[1], share=0.0))
    job = toys.job(Nobody(replace(setting, tiers=tiers)), data())
    with pytest.raises(InputError, match=r"no training client is in the tiers w0\.5"):
        toys.run(job, tmp_path / "run")


def test_dropout_draws_do_not_depend_on_the_number_of_workers(tmp_path):
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)]
    net = chain("dropping", layers, (6,))
    algorithm = FedPA(toys.setting(net, (1.0, 0.5), rounds=2))
    job = toys.job(algorithm, data(), cohort=8, bundle_clients=1, engine="vmap")
    digests = [
        toys.run(job, tmp_path / f"{workers}-{again}", workers=workers)["params_sha256"]
        for workers, again in ((1, False), (1, True), (3, False))
    ]
    assert len(set(digests)) == 1


@dataclass(frozen=True)
class Adapts(FedAvg):
    """FedAvg whose clients take a step before they test."""

    width: float | None = 1.0
    how: Evaluation = field(
        default_factory=lambda: Evaluation(
            prepare=LossProgram(cross_entropy, LocalRule(lr=0.1), Stream(batch=None))
        )
    )

    @property
    def evaluation(self):
        return self.how


def test_clients_that_adapt_are_not_tested_on_what_they_adapted_on(tmp_path):
    job = toys.job(Adapts(toys.setting(toys.mlp())), data())
    rounds = Rounds(job, InlineExecutor(job.work, job.federation), None)  # type: ignore
    ids, part = rounds.roster.evaluated
    assert part == "test" and ids.tolist() == split_clients(0, 10)[1].tolist()
    summary = toys.run(job, tmp_path / "run")
    assert 0 <= summary["acc_global"] <= 1


def test_evaluated_clients_are_a_fixed_draw(tmp_path):
    job = toys.job(fedavg(), data(), eval_clients=1)
    picked = [Roster(job).evaluated[0].tolist() for _ in range(2)]
    assert picked[0] == picked[1] and len(picked[0]) == 1
    assert set(picked[0]) <= set(split_clients(0, 10)[1].tolist())


def test_means_of_cost_are_of_the_last_rounds_clients(tmp_path):
    net = toys.mlp(6, (8, 4), 3)
    job = toys.job(FedPA(toys.setting(net, (1.0, 0.5))), data(), cohort=8)
    summary = toys.run(job, tmp_path / "run")
    full = (6 * 8 + 8) + (8 * 4 + 4) + (4 * 3 + 3)
    half = (6 * 4 + 4) + (4 * 2 + 2) + (2 * 3 + 3)
    train, _ = split_clients(0, 10)
    strong = int((job.fleet.tier_of[train] == 0).sum())
    assert summary["params_mean"] == pytest.approx((strong * full + (8 - strong) * half) / 8)
    macs_full, macs_half = 48 + 32 + 12, 24 + 8 + 6
    assert summary["flops_mean"] == pytest.approx(
        (strong * macs_full + (8 - strong) * macs_half) / 8
    )
