"""Simulated time by hand: who arrives when, who is dropped, and what that costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from subfleet.algorithms import STC, FedAvg, FedPA
from subfleet.core.errors import InputError
from subfleet.core.program import Stream
from subfleet.dashboards.console import LoggedWarnings
from subfleet.platform.job import Job
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.roster import Roster
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.simulated import ends

INF = np.inf

# A network 6-8-4-3 trained for one pass over eight rows, whole and at half the width:
#
#     MACs of a row    6*8 + 8*4 + 4*3 = 92            6*4 + 4*2 + 2*3 = 38
#     FLOPs            3 * 92 * 8 = 2208               3 * 38 * 8 = 912
#     parameters       92 + 8 + 4 + 3 = 107            38 + 4 + 2 + 3 = 47
#     bytes            4 * 107 = 428, no map           4 * 47 + 2 * 2 = 192, two uint16 counts
#
# The device at half the width is half as fast: 96 and 48 FLOPs a second.
FAST = {"flops_per_s": 96, "down_bytes_per_s": 8, "up_bytes_per_s": 4, "latency_s": 0.5}
SLOW = FAST | {"flops_per_s": 48}
FULL_S = 0.5 + 428 / 8 + 2208 / 96 + 428 / 4  # 0.5 + 53.5 + 23 + 107
HALF_S = 0.5 + 192 / 8 + 912 / 48 + 192 / 4  # 0.5 + 24 + 19 + 48
CLIENTS = 10  # two are held out


def job(*devices: dict[str, Any], algorithm: Any = FedPA, **options: Any) -> Job:
    widths = (1.0, 0.5)[: max(1, len(devices))]
    rounds = options.pop("rounds", 3)
    made = algorithm(toys.setting(toys.mlp(), widths, rounds=rounds))
    data = toys.all_train([8] * CLIENTS, (6,), 3)
    return toys.job(made, data, devices=list(devices), **({"cohort": 8} | options))


def records(path: Path) -> list[dict[str, Any]]:
    found = list(read_metrics(path / "metrics.jsonl"))
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "clients_per_s", "memory")}
        for r in found
    ]


def clients(path: Path, round: int | None = None) -> list[dict[str, Any]]:
    rows = ClientsLog(path / "clients").read().to_pylist()
    return [row for row in rows if round in (None, row["round"])]


def statuses(path: Path, round: int = 1) -> dict[str, list[str]]:
    """By tier."""
    found: dict[str, list[str]] = {}
    for row in clients(path, round):
        found.setdefault(row["tier"], []).append(row["status"])
    return found


# --- by hand -------------------------------------------------------------------------------------


def test_durations_match_a_hand_computation_exactly(tmp_path: Path) -> None:
    assert (FULL_S, HALF_S) == (184.0, 91.5)
    toys.run(job(FAST, SLOW), tmp_path / "run")
    for row in clients(tmp_path / "run"):
        whole = row["tier"] == "w1.0"
        assert row["sim_seconds"] == (184.0 if whole else 91.5)
        assert row["flops"] == (2208 if whole else 912)
        assert row["bytes_up"] == row["bytes_down"] == (428 if whole else 192)
    found = records(tmp_path / "run")
    assert [r["sim_seconds"] for r in found] == [184.0] * 3
    assert [r["sim_time"] for r in found] == [184.0, 368.0, 552.0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["total_sim_seconds"] == summary["sim_time"] == 552.0


@pytest.mark.parametrize(
    ("deadline", "in_time", "lasts"),
    [(184.0, {"w1.0", "w0.5"}, 184.0), (183.0, {"w0.5"}, 183.0), (91.5, {"w0.5"}, 91.5)],
)
def test_a_deadline_drops_exactly_those_who_would_arrive_after_it(
    tmp_path: Path, deadline: float, in_time: set[str], lasts: float
) -> None:
    toys.run(job(FAST, SLOW, deadline=deadline), tmp_path / "run")
    for tier, found in statuses(tmp_path / "run").items():
        assert set(found) == {"ok" if tier in in_time else "late"}, tier
    (first, *_) = records(tmp_path / "run")
    late = sum(s == "late" for found in statuses(tmp_path / "run").values() for s in found)
    assert (first["clients"], first["late"], first["dropped"]) == (8 - late, late, 0)
    assert first["straggler_rate"] == late / 8 and first["drop_rate"] == 0
    assert first["sim_seconds"] == lasts


def test_late_clients_are_charged_for_what_they_did_until_then(tmp_path: Path) -> None:
    # At 65.5 s a client of the whole network has received (54 s) and computed half: 11.5 of 23 s.
    toys.run(job(FAST, SLOW, deadline=65.5, rounds=1), tmp_path / "half")
    (one, *_) = [row for row in clients(tmp_path / "half") if row["tier"] == "w1.0"]
    assert (one["flops"], one["steps"], one["bytes_up"], one["bytes_down"]) == (1104, 1, 0, 428)
    assert one["sim_seconds"] == 65.5 and one["loss"] is None
    # At 97.5 s it has sent 20.5 of 107 s: 82 of 428 bytes.
    toys.run(job(FAST, SLOW, deadline=97.5, rounds=1), tmp_path / "sent")
    (one, *_) = [row for row in clients(tmp_path / "sent") if row["tier"] == "w1.0"]
    assert (one["flops"], one["steps"], one["bytes_up"]) == (2208, 2, 82)
    (record,) = records(tmp_path / "sent")
    rows = clients(tmp_path / "sent")
    for key in ("flops", "bytes_up", "bytes_down"):
        assert record[key] == sum(row[key] for row in rows)


def test_energy_is_that_of_the_flops_and_bytes(tmp_path: Path) -> None:
    joules = {"joules_per_flop": 0.25, "joules_per_byte": 0.5}
    toys.run(job(FAST | joules, SLOW, rounds=1), tmp_path / "run")
    rows = clients(tmp_path / "run")
    assert {(row["tier"], row["energy_j"]) for row in rows} == {
        ("w1.0", 2208 / 4 + (428 + 428) / 2),
        ("w0.5", 0.0),
    }
    assert records(tmp_path / "run")[0]["energy_j"] == sum(row["energy_j"] for row in rows)
    toys.run(job(FAST, SLOW, rounds=1), tmp_path / "none")
    assert "energy_j" not in records(tmp_path / "none")[0]
    assert {row["energy_j"] for row in clients(tmp_path / "none")} == {None}


def test_several_passes_and_batches_of_their_own_are_planned_as_they_are_charged(
    tmp_path: Path,
) -> None:
    made = job(FAST, SLOW, rounds=1)
    algorithm = made.work.algorithm
    stream = Stream(batch=5, epochs=3, take=0.9)
    setting = replace(algorithm.setting, stream=stream)
    work = replace(made.work, algorithm=replace(algorithm, setting=setting))
    toys.run(replace(made, work=work), tmp_path / "run")
    for row in clients(tmp_path / "run"):
        speed, fixed = (96, 0.5 + 53.5 + 107) if row["tier"] == "w1.0" else (48, 0.5 + 24 + 48)
        assert row["sim_seconds"] == pytest.approx(fixed + row["flops"] / speed, rel=1e-12)


# --- who counts ----------------------------------------------------------------------------------


def test_the_first_to_arrive_count_and_end_the_round() -> None:
    takes = np.array([5.0, 1.0, 3.0, 3.0, 9.0])
    never = np.full(5, INF)
    found = ends(takes, never, never, wanted=3)
    assert found.status.tolist() == ["late", "ok", "ok", "ok", "late"]
    assert found.seconds == 3 and found.until.tolist() == [3, 1, 3, 3, 3]
    found = ends(takes, never, never, wanted=2)
    assert found.status.tolist() == ["late", "ok", "ok", "late", "late"], "of equals the first"


def test_failures_are_waited_for_only_until_they_happen() -> None:
    takes, never = np.array([5.0, 1.0, 8.0]), np.full(3, INF)
    fails = np.array([INF, INF, 6.0])
    found = ends(takes, fails, never, wanted=3)
    assert found.status.tolist() == ["ok", "ok", "failed"] and found.seconds == 6
    found = ends(takes, fails, never, wanted=3, deadline=5.5)
    assert found.status.tolist() == ["ok", "ok", "late"] and found.seconds == 5.5
    found = ends(takes, fails, never, wanted=2)
    assert found.status.tolist() == ["ok", "ok", "late"] and found.seconds == 5
    found = ends(takes, never, np.array([5.0, 0.5, INF]), wanted=3)
    assert found.status.tolist() == ["ok", "unavailable", "ok"] and found.seconds == 8
    found = ends(np.zeros(2), np.array([0.0, INF]), np.full(2, INF), wanted=2)
    assert found.status.tolist() == ["failed", "ok"] and found.seconds == 0


@given(
    takes=st.lists(st.floats(0, 10), min_size=1, max_size=8),
    data=st.data(),
    deadline=st.none() | st.floats(0.1, 12),
)
def test_every_client_ends_by_the_end_of_the_round(takes, data, deadline) -> None:
    many = len(takes)
    some = st.lists(st.just(INF) | st.floats(0, 10), min_size=many, max_size=many)
    fails, leaves = (np.array(data.draw(some)) for _ in range(2))
    wanted = data.draw(st.integers(1, many))
    found = ends(np.array(takes), fails, leaves, wanted, deadline)
    ok = found.status == "ok"
    assert ok.sum() <= wanted and found.seconds <= (deadline or INF)
    assert (found.until <= found.seconds).all()
    assert (found.until[ok] == np.array(takes)[ok]).all()
    if ok.sum() == wanted:
        assert found.seconds == found.until[ok].max()


def test_more_are_asked_than_wanted_and_the_fastest_are_trained(tmp_path: Path) -> None:
    made = job(FAST, SLOW, cohort=4, over_select=1.75)
    toys.run(made, tmp_path / "run")
    for number in (1, 2, 3):
        found = statuses(tmp_path / "run", number)
        assert sum(map(len, found.values())) == 7
        slow = len(found["w1.0"])
        assert found["w0.5"].count("ok") == min(4, 7 - slow)
        record = records(tmp_path / "run")[number - 1]
        assert record["clients"] == 4 and record["late"] == 3
        assert record["sim_seconds"] == (91.5 if 7 - slow >= 4 else 184.0)


def test_more_than_there_are_cannot_be_asked() -> None:
    with pytest.raises(InputError, match=r"over_select=2 asks 16 .* cohort of 8, and 8 .* most 1"):
        job(FAST, SLOW, over_select=2.0)


def test_weights_come_from_those_who_arrive(tmp_path: Path) -> None:
    """As if the late had never been asked: the round of the low tier's clients alone."""
    late = job(FAST, SLOW, deadline=100.0, rounds=1)
    toys.run(late, tmp_path / "late")
    ok = [row["client"] for row in clients(tmp_path / "late") if row["status"] == "ok"]
    tiers = [late.fleet.tier_of[client] for client in ok]
    assert set(tiers) == {1}
    algorithm = late.work.algorithm
    state = algorithm.init(late.work.net.init(0))
    state, _ = toys.one_round(algorithm, late.federation, state, ok, [1] * len(ok))
    want = RunFolder(tmp_path / "late", "").read_final()
    for name, value in state["params"].items():
        assert value.allclose(want[name]), name


def test_no_client_in_time_leaves_the_model_and_the_run_goes_on(tmp_path: Path) -> None:
    for algorithm in (FedPA, STC):
        path = tmp_path / algorithm.__name__
        made = job(FAST, SLOW, algorithm=algorithm, deadline=1.0, cohort=3)
        toys.run(made, path)
        for record in records(path):
            assert (record["clients"], record["late"], record["loss_train"]) == (0, 3, None)
            assert record["sim_seconds"] == 1.0 and record["straggler_rate"] == 1.0
        start, end = made.work.net.init(0), RunFolder(path, "").read_final()
        assert all(bool((start[name] == end[name]).all()) for name in end)


def test_messages_of_idle_rounds_keep_their_place(tmp_path: Path) -> None:
    made = job(FAST, algorithm=STC, deadline=1.0)
    algorithm = made.work.algorithm
    state = algorithm.idle(algorithm.init(made.work.net.init(0)))
    assert state["messages"].tolist() == [0]
    toys.run(made, tmp_path / "run")  # bytes_down looks rounds up by their number


# --- failures and windows ------------------------------------------------------------------------


def test_failures_are_counted_at_their_rate_and_charged(tmp_path: Path) -> None:
    rate = {"failure_rate": 0.3}
    toys.run(job(FAST | rate, SLOW | rate, rounds=40, checkpoint_every=0), tmp_path / "run")
    found = records(tmp_path / "run")
    rows = clients(tmp_path / "run")
    failed = [row for row in rows if row["status"] == "failed"]
    assert sum(r["dropped"] for r in found) == len(failed) and len(rows) == 320
    assert 96 - 41 < len(failed) < 96 + 41, "binomial: sd 8.2, five of them"
    assert {row["bytes_down"] for row in failed} == {428, 192}
    for row in failed:
        assert 0 < row["sim_seconds"] < (184.0 if row["tier"] == "w1.0" else 91.5)
        assert row["flops"] < 2208 or row["bytes_up"] < 428
    assert all(r["drop_rate"] == r["dropped"] / 8 for r in found)


def test_a_round_in_which_everybody_fails_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toys.run(
        job(FAST | {"failure_rate": 1}, rounds=2), tmp_path / "run", observers=(LoggedWarnings(),)
    )
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith("round 1: none of 8 clients arrived, and the model stays as it was: ")
    assert "8 failed or left, 0 were late" in said


def test_only_clients_in_their_window_are_asked_and_time_goes_on_to_it(tmp_path: Path) -> None:
    # The fast are there in the first 400 s of 1,000, the slow from 500 to 700.
    fast = FAST | {"available": [[0, 400]], "period_s": 1000}
    slow = SLOW | {"available": [[500, 700]], "period_s": 1000}
    toys.run(job(fast, slow, rounds=5, cohort=2), tmp_path / "run")
    found = records(tmp_path / "run")
    tiers = [set(statuses(tmp_path / "run", r["round"])) for r in found]
    # Rounds begin at 0, 184, 368 (the window closes at 400: nobody can finish), 500, 591.5.
    assert tiers == [{"w1.0"}, {"w1.0"}, {"w1.0"}, {"w0.5"}, {"w0.5"}]
    assert [r["sim_time"] for r in found] == [184, 368, 400, 591.5, 683]
    assert [r["sim_seconds"] for r in found] == [184, 184, 32, 191.5, 91.5]
    assert statuses(tmp_path / "run", 3) == {"w1.0": ["unavailable"] * 2}
    assert found[2]["dropped"] == 2 and found[3]["dropped"] == 0
    assert {row["sim_seconds"] for row in clients(tmp_path / "run", 4)} == {91.5}


def test_of_many_clients_few_are_looked_at_and_all_who_are_there_alike() -> None:
    """A client's chance to be asked, given that it is there, is that of the others."""
    tables = [FAST | {"available": [[0, 100]], "period_s": 1000, "shift_s": {"uniform": [0, 1000]}}]
    made = toys.setting(toys.mlp(), rounds=1)
    data = toys.all_train([2] * 300, (6,), 3)
    whole = toys.job(FedAvg(made), data, devices=tables, cohort=4)
    roster, phase = Roster(whole), whole.work.algorithm.phase(1)
    assert whole.devices is not None
    pool = whole.split[0]
    opens, _ = whole.devices.presence(pool, whole.fleet.tier_of[pool], 50.0)
    there = pool[opens == 0]
    asked = [roster.present(phase, r, 50.0) for r in range(1, 401)]
    assert all(len(ids) == 4 and wait == 0 for ids, wait in asked)
    counts = np.bincount(np.concatenate([ids for ids, _ in asked]), minlength=300)
    assert counts[np.setdiff1d(np.arange(300), there)].sum() == 0
    mean = 1600 / len(there)
    assert np.abs(counts[there] - mean).max() < 5 * np.sqrt(mean)


def test_a_fleet_that_never_comes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("available,latency_s\n,1\n")
    made = job({"trace": str(tmp_path / "t.csv")})
    with pytest.raises(InputError, match="none of 8 training clients is ever available"):
        toys.run(made, tmp_path / "run")


# --- same bits -----------------------------------------------------------------------------------

RICH = {
    "flops_per_s": {"lognormal": [96, 0.5]},
    "up_bytes_per_s": {"uniform": [2, 8]},
    "failure_rate": 0.1,
    "available": [[0, 600]],
    "shift_s": {"uniform": [0, 1000]},
    "period_s": 1000,
    "joules_per_flop": 1e-3,
}


def test_the_same_bits_for_any_number_of_hosts_and_after_a_resume(tmp_path: Path) -> None:
    made = job(RICH, RICH, rounds=6, cohort=3, over_select=1.5, deadline=150.0, checkpoint_every=2)
    whole = toys.run(made, tmp_path / "one")
    found = records(tmp_path / "one")
    assert sum(r["late"] for r in found) and sum(r["dropped"] for r in found)
    three = toys.run(made, tmp_path / "three", workers=3)
    with pytest.raises(toys.Crash):
        toys.run(made, tmp_path / "resumed", observers=(toys.StopAfter(3),))
    resumed = toys.run(made, tmp_path / "resumed", resume=True)
    assert whole["params_sha256"] == three["params_sha256"] == resumed["params_sha256"]
    for other in ("three", "resumed"):
        assert records(tmp_path / other) == found
        same = [
            {**row, "seconds": 0, "loss": 0, "acc_local": 0} for row in clients(tmp_path / other)
        ]
        assert same == [
            {**row, "seconds": 0, "loss": 0, "acc_local": 0} for row in clients(tmp_path / "one")
        ]


def test_ideal_devices_change_no_bit_and_no_profile_writes_no_key(tmp_path: Path) -> None:
    bare = toys.run(job(rounds=2), tmp_path / "bare")
    ideal = toys.run(job({"latency_s": 0}, rounds=2), tmp_path / "ideal")
    assert bare["params_sha256"] == ideal["params_sha256"]
    keys = {key for record in records(tmp_path / "bare") for key in record}
    assert not keys & {"sim_seconds", "sim_time", "energy_j", "drop_rate", "straggler_rate"}
    assert records(tmp_path / "bare")[0]["late"] == 0
    assert {row["sim_seconds"] for row in clients(tmp_path / "bare")} == {None}
    assert {row["sim_seconds"] for row in clients(tmp_path / "ideal")} == {0.0}
