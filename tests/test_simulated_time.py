"""Simulated time from an experiment's file on: tables, traces, resumes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from test_launch import tables, write
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.launch import assemble, launch
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.roster import Roster
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.simulated import simulate

TIERS = [
    {"name": "high", "share": 0.5, "width": 1.0, "device": {"flops_per_s": 2e6, "latency_s": 1}},
    {"name": "low", "share": 0.5, "width": 0.5},
]
DEVICE = {"flops_per_s": 1e6, "up_bytes_per_s": {"uniform": [1e3, 2e3]}}


def devices(**changes: Any) -> Experiment:
    return Experiment(**tables(fleet__tiers=TIERS, fleet__device=DEVICE, **changes))


def traced(folder: Path, rows: str) -> Path:
    trace = folder / "phones.csv"
    trace.write_text(f"flops_per_s,up_bytes_per_s\n{rows}")
    return trace


# --- tables --------------------------------------------------------------------------------------


def test_a_tiers_device_replaces_the_fleets_key_by_key() -> None:
    high, low = devices().fleet.devices()
    assert high == DEVICE | {"flops_per_s": 2e6, "latency_s": 1} and low == DEVICE
    assert Experiment(**tables()).fleet.devices() == []


def test_devices_survive_toml() -> None:
    experiment = devices(run__deadline=3.0, run__over_select=1.5)
    again = Experiment.from_toml(experiment.to_toml())
    assert again == experiment and again.fingerprint() == experiment.fingerprint()
    slower = experiment.with_values({"fleet.device.flops_per_s": 1e5})
    assert slower.fingerprint() != experiment.fingerprint()


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({"flops_per_s": -1}, r"fleet\.device\.flops_per_s: -1 is not above 0; give FLOPs a sec"),
        ({"flop_per_s": 1}, r"fleet\.device\.flop_per_s: unknown key; did you mean 'flops_per_s'"),
        ({"latency_s": {"unform": [1, 2]}}, r"fleet\.device\.latency_s: unform: unknown; did you"),
        ({"available": [[5, 4]], "period_s": 4}, r"fleet\.device: available: \[5, 4\] is not a w"),
        ({"period_s": 0}, r"fleet\.device\.period_s = 0: must be greater than 0; set the seconds"),
        ({"trace": ""}, r"fleet\.device\.trace = '': must not be empty; give a CSV or Parquet"),
        ({}, r"fleet\.device: is empty; give flops_per_s, say, or remove the table"),
    ],
)
def test_a_wrong_key_is_named_with_value_bound_and_remedy(device: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Experiment(**tables() | {"fleet": {"device": device}})


def test_one_tier_alone_cannot_have_a_device() -> None:
    with pytest.raises(InputError, match="tier 'low' has no device and others have; give it one"):
        Experiment(**tables(fleet__tiers=TIERS))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run.deadline", 0.0, "run.deadline = 0.0: must be greater than 0; set the simulated"),
        ("run.over_select", 0.5, "run.over_select = 0.5: must be at least 1; set how many times"),
    ],
)
def test_bounds_of_the_rounds_keys(key: str, value: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        devices().with_values({key: value})


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_says_what_its_devices_took(tmp_path: Path) -> None:
    run = launch(devices(run__over_select=1.5), out=tmp_path / "run", local=True)
    times = [record["sim_time"] for record in run.metrics]
    assert all(record["late"] == 2 for record in run.metrics)
    assert times == sorted(times) and times[0] > 0
    assert run.summary["total_sim_seconds"] == pytest.approx(times[-1])
    status = run.clients().to_pydict()["status"]
    assert status.count("ok") == 16 and status.count("late") == 8


def test_a_run_shows_its_devices_time_and_warns_once_that_nobody_arrives(tmp_path: Path) -> None:
    changed = {"fleet.device": {"flops_per_s": 1e6, "joules_per_flop": 1e-3}}
    path = write(tmp_path, **changed, **{"run.deadline": 0.01, "run.rounds": 2})
    arguments = ["run", str(path), "--local", "--out", str(tmp_path / "late")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("warning: round ") == 1
    assert "round 1: none of 4 clients arrived by run.deadline = 0.01" in said
    fastest = re.search(r"the fastest needs (\S+) simulated seconds", said)
    assert fastest is not None
    assert "round 2/2" in said and "sim 0s 4 late" in said
    line = done.stdout.splitlines()[-2]
    assert line.startswith("simulated: 0s, 8 clients late, 0 dropped, ") and line.endswith(" J")
    # What it names is enough for one.
    later = ["--set", f"run.deadline={float(fastest[1]) * 1.01}", "--set", "run.rounds=1"]
    arguments[-1] = str(tmp_path / "enough")
    done = CliRunner().invoke(app, [*arguments, *later])
    assert done.exit_code == 0 and "arrived" not in done.stderr, done.stderr


def test_deadlines_without_devices_are_doubted(tmp_path: Path) -> None:
    experiment = Experiment(**tables(run__deadline=2.0, run__over_select=1.5, run__rounds=1))
    arguments = ["run", str(write(tmp_path, **{"run.deadline": 2.0, "run.over_select": 1.5}))]
    done = CliRunner().invoke(
        app, [*arguments, "--set", "run.rounds=1", "--local", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 0, done.stderr
    words = " ".join((done.stderr + done.stdout).split())
    assert "run.deadline = 2 has no effect: no device has a profile" in words
    assert "run.over_select = 1.5 has no effect" in words
    assert assemble(experiment).devices is None


def test_a_bad_trace_ends_with_status_2_and_leaves_nothing(tmp_path: Path) -> None:
    trace = traced(tmp_path, "1e9,1e5\n1e9,-7\n")
    path = write(tmp_path, **{"fleet.device": {"trace": str(trace)}})
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    words = " ".join(done.stderr.split())
    assert "line 3: up_bytes_per_s = -7 is not above 0; give bytes sent a second" in words
    assert "phones.csv" in words and not (tmp_path / "run").exists()


def test_a_resume_with_another_trace_is_refused(tmp_path: Path) -> None:
    trace = traced(tmp_path, "1e6,1e3\n2e6,2e3\n")
    experiment = Experiment(**tables(fleet__device={"trace": str(trace)}, run__rounds=2))
    whole = launch(experiment, out=tmp_path / "run", local=True)
    before = whole.metrics
    longer = experiment.with_values({"run.rounds": 3})
    traced(tmp_path, "1e6,1e3\n2e6,9e3\n")
    with pytest.raises(InputError, match=r"with another trace of devices .*phones.csv.*give the"):
        launch(longer, out=whole.path, local=True, resume=True)
    traced(tmp_path, "1e6,1e3\n2e6,2e3\n")
    run = launch(longer, out=whole.path, local=True, resume=True)
    assert run.summary["rounds"] == 3 and run.metrics[:2] == before


def test_a_million_clients_cost_a_round_no_more_than_ten_thousand() -> None:
    device = {"flops_per_s": {"lognormal": [1e9, 0.5]}, "failure_rate": 0.1}
    windows = {"available": [[0, 30_000]], "shift_s": {"uniform": [0, 86_400]}}

    def seconds(clients: int) -> float:
        """Of choosing who is asked, planning, and saying who arrives."""
        changes = {"data__clients": clients, "fleet__device": device | windows}
        job = assemble(Experiment(**tables(run__cohort=100, run__over_select=1.3, **changes)))
        roster, made = Roster(job), job.work.algorithm
        state, phase = made.init(job.work.net.init(0)), made.phase(1)
        took = []
        for round in range(1, 10):
            now, started = 1e4 * round, process_time()
            asked, wait = roster.present(phase, round, now)
            plan = made.plan(state, roster.cohort(phase, round, asked), round)
            found = simulate(job, phase, plan, round, time=now, wait=wait, wanted=100)
            took.append(process_time() - started)
            assert found is not None and len(found.tasks) == 130
        return min(took)

    assert seconds(1_000_000) < 2 * seconds(10_000) + 1e-3


def test_rows_are_announced_only_where_who_comes_is_known_ahead(tmp_path: Path) -> None:
    for name, device, announced in (("always", {}, 4), ("window", {"available": [[0, 9]]}, 0)):
        job = assemble(Experiment(**tables(fleet__device={"latency_s": 1} | device)))
        folder = RunFolder.create(tmp_path / name, "", "none")
        rounds = Rounds(job, InlineExecutor(job.work, job.federation), folder)
        assert len(rounds._upcoming(1).ids) == announced
