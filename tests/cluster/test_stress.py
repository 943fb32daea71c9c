"""The stress ladder: what its figures are made of, what it names, and a ladder of two rungs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.cli_stress import print_ladder
from subfleet.cluster.stress import (
    HOSTS,
    TRAINING,
    Measured,
    Rung,
    bottleneck,
    measured,
    parse_counts,
    parse_widths,
)
from subfleet.cluster.watch import RoundEnd, Watch, family, machine_bytes
from subfleet.core.errors import InputError
from subfleet.ladder import Ladder, Outcome, climb

ROOM = {"machine": 10_000_000_000, "object_store": 2_000_000_000}


def one(**changes: Any) -> Measured:
    """A rung whose rounds last 2 s, 1.5 of them training."""
    plain = Measured(
        hosts=2,
        rounds=3,
        startup_s=8.0,
        round_s=2.0,
        overhead_s=0.5,
        clients_per_s=50.0,
        parts={TRAINING: 1.5, HOSTS: 0.3, "planning": 0.1, "other": 0.1},
        coordinator_cpu_s=0.1,
        bytes_up=1,
        bytes_down=1,
        params_mean=1.0,
        peaks={"coordinator": 400, "hosts": 900, "object_store": 0, "all": 1500},
        room=ROOM,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1e2,x", "--clients 1e2,x: 'x' is not a whole number from 1 to 1e9"),
        ("0", "--clients 0: '0' is not a whole number from 1 to 1e9"),
        ("1e10", "'1e10' is not a whole number from 1 to 1e9"),
        ("2.5", "'2.5' is not a whole number"),
        ("nan", "'nan' is not a whole number"),
        ("", "'' is not a whole number"),
    ],
)
def test_counts_are_whole_numbers(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_counts("--clients", text)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["1.0,0", "2", "half", "0.5,0.50", "nan"])
def test_widths_are_in_bounds_and_differ(text: str) -> None:
    with pytest.raises(InputError, match=f"--tiers {text}: "):
        parse_widths(text)


def test_a_rung_that_cannot_be_says_so() -> None:
    assert Rung(100, 100).impossible is None
    assert Rung(1000, 100).impossible == ("a cohort of 1,000 cannot be drawn from 100 clients")


def test_figures_are_those_of_the_rounds_between_the_first_and_the_last() -> None:
    """By hand: two hosts, rounds of 4, 3, 5 and 9 s, of which the second and third count."""
    plans = {1: 0.9, 2: 0.25, 3: 0.5, 4: 0.9}
    records = [
        {
            "round": round,
            "seconds": {"plan": plan, "train": 2.0, "total": 3.5},
            "bytes_up": 10 * round,
            "bytes_down": 20 * round,
        }
        for round, plan in plans.items()
    ]
    ends = [RoundEnd(104.0, 1.0), RoundEnd(107.0, 1.5), RoundEnd(112.0, 2.5), RoundEnd(121.0, 9.0)]
    found = measured(
        records,
        np.array([1, 2, 2, 3, 3, 3]),
        np.array([9.0, 1.0, 2.0, 1.5, 2.0, np.nan]),
        ends,
        cohort=2,
        hosts=2,
        began_s=100.0,
        params_mean=7.0,
        peaks={"all": 5},
        room=ROOM,
    )
    assert found.rounds == 2
    assert found.startup_s == 104.0 - 100.0 - 3.5
    assert found.round_s == (3 + 5) / 2
    assert found.clients_per_s == 2 / 4
    assert found.overhead_s == ((3 - 1.5) + (5 - 1.75)) / 2
    assert found.parts[TRAINING] == (1.5 + 1.75) / 2
    assert found.parts[HOSTS] == (0.5 + 0.25) / 2
    assert found.parts["planning"] == 0.375
    assert found.parts["other"] == ((3 - 2.25) + (5 - 2.5)) / 2
    assert sum(found.parts.values()) == pytest.approx(found.round_s)
    assert found.coordinator_cpu_s == (2.5 - 1.0) / 2
    assert (found.bytes_up, found.bytes_down) == (25, 50)


@pytest.mark.parametrize(
    ("changes", "name", "figure"),
    [
        ({}, "training on the hosts", "75% of a round's 2 s"),
        (
            {"parts": {TRAINING: 0.2, HOSTS: 1.0, "planning": 0.8}},
            "reading and summing on the hosts",
            "50% of a round's 2 s",
        ),
        (
            {"parts": {TRAINING: 0.2, "merging on the coordinator": 1.6, "planning": 0.2}},
            "merging on the coordinator",
            "80% of a round's 2 s",
        ),
        (
            {"parts": {TRAINING: 0.01}, "round_s": 0.02, "startup_s": 8.0},
            "starting up",
            "8.0 s, where 100 rounds take 2.0 s",
        ),
        (
            {"peaks": {"coordinator": 1, "hosts": 2, "object_store": 0, "all": 8_100_000_000}},
            "memory of the hosts",
            "81% of 10.0 GB in use",
        ),
        (
            {"peaks": {"coordinator": 3, "hosts": 2, "object_store": 0, "all": 9_000_000_000}},
            "memory of the coordinator",
            "90% of 10.0 GB in use",
        ),
        (
            {"peaks": {"coordinator": 1, "hosts": 2, "object_store": 1_700_000_000, "all": 3}},
            "object store",
            "85% of 2.0 GB in use",
        ),
    ],
)
def test_the_first_bottleneck_is_named_with_its_figure(
    changes: dict[str, Any], name: str, figure: str
) -> None:
    assert bottleneck(one(**changes)) == (name, figure)


def test_without_an_object_store_there_is_none_to_fill() -> None:
    assert bottleneck(one(room={"machine": 10**10}))[0] == TRAINING


def test_a_rung_s_own_options_are_not_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--set run.cohort=3: .* give --cohort"):
        Ladder(tmp_path, overrides=("run.cohort=3",))
    with pytest.raises(InputError, match=r"train\.lr"):
        Ladder(tmp_path, overrides=("train.lr=-1",))


def test_another_model_comes_with_its_own_options(tmp_path: Path) -> None:
    own = Ladder(tmp_path, overrides=("model.name=leaf_cnn",)).experiment(Rung(10, 100))
    assert own.to_tables()["model"] == {"name": "leaf_cnn"}
    assert own.to_tables()["data"]["mean_samples"] == 20


def test_a_ladder_that_is_out_of_time_says_which_rungs_it_left_out(tmp_path: Path) -> None:
    ladder = Ladder(tmp_path, minutes=1e-9)
    outcomes = list(climb(ladder, [Rung(10, 5), Rung(10, 20)], lambda rung, done: None))
    assert [outcome.status for outcome in outcomes] == ["skipped", "skipped"]
    assert "from 5 clients" in (outcomes[0].why or "")
    assert outcomes[1].why == "--minutes 1e-09 were over"


def test_a_watch_sees_rounds_memory_and_processor_time(tmp_path: Path) -> None:
    """This process, and one below it that holds 50 MB."""
    metrics = tmp_path / "metrics.jsonl"
    heard: list[int] = []
    watch = Watch(metrics, ray=False, tell=heard.append)
    hold = "import sys; held = bytearray(b'x' * 50_000_000); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as below:
        assert below.stdout and below.stdout.readline()
        assert below.pid in family(os.getpid())
        watch.start()
        metrics.write_text('{"round": 1}\n')
        with metrics.open("a") as more:
            more.write('{"round": 2}\n{"round": 3}\n')
        watch.stop()
        below.communicate()
    assert heard[-1] == len(watch.ends) == 3
    assert 0 < watch.ends[0].coordinator_cpu_s <= watch.ends[2].coordinator_cpu_s
    assert watch.peaks["coordinator"] > 0
    assert 50_000_000 < watch.peaks["all"] < machine_bytes()


def test_tables_of_a_million_clients_are_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    peaks = {"coordinator": 480e6, "hosts": 965e6, "object_store": 10e6, "all": 1749e6}
    parts = {TRAINING: 18.91, HOSTS: 2.62, "planning": 0.12512, "merging on the coordinator": 0.029}
    found = one(
        round_s=21.83,
        startup_s=117.6,
        overhead_s=3.114,
        parts=parts | {"other": -0.003},
        bytes_up=274_812_345,
        bytes_down=12_345,
        peaks={role: int(size) for role, size in peaks.items()},
    )
    outcomes = [Outcome(Rung(10_000, 1_000_000), "ok", figures=found.to_json())]
    print_ladder([*outcomes, Outcome(Rung(10, 5), "failed", "it ended")], local=False)
    said = capsys.readouterr().out
    assert "…" not in said and "-0.003" not in said
    cells = ["1,000,000", "10,000", "118", "21.8", "0.125", "18.9", "2.62", "0.029", "0"]
    rows = [line.split() for line in said.splitlines() if line.startswith(" 1,000,000")]
    sizes = ["1,000,000", "10,000", "480", "965", "10", "1,749", "275", "0.0123"]
    assert rows == [cells, sizes]
    assert "hidden: overhead, clients/s (a wider terminal, or --json)" in said
    assert said.splitlines()[-2:] == [
        "  1,000,000 clients, cohort 10,000: training on the hosts, 87% of a round's 21.8 s",
        "  5 clients, cohort 10: failed: it ended",
    ]
    print_ladder(outcomes, local=True)  # of one process, which is coordinator and hosts
    said = capsys.readouterr().out
    assert "memory" in said and "coordinator " not in said


@pytest.mark.ray
def test_a_ladder_goes_on_after_a_rung_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for three times its cohort, the smaller population has not enough clients."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray writes its token
    out = tmp_path / "ladder"
    result = CliRunner().invoke(
        app,
        [
            *("stress", "--clients", "20,40", "--cohort", "10", "--tiers", "1,0.5"),
            *("--rounds", "1", "--json", "--out", str(out), "--set", "run.over_select=3"),
            *("--set", "fleet.device.flops_per_s=1e9", "--set", "run.engine=loop"),
            *("--set", "data.mean_samples=10"),
        ],
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((out / "stress.json").read_text())
    small, good = found["rungs"]
    assert (small["clients"], small["status"]) == (20, "failed")
    assert "run.over_select=3 asks 30 clients" in small["why"]
    assert good["status"] == "ok"
    assert good["round_s"] > good["overhead_s"] > 0
    assert sum(good["parts"].values()) == pytest.approx(good["round_s"])
    assert good["peaks"]["all"] > good["peaks"]["coordinator"] > 50_000_000
    assert good["peaks"]["hosts"] > 50_000_000 and good["coordinator_cpu_s"] > 0
    assert good["bottleneck"] and good["figure"]
    assert "40 clients, cohort 10: starting" in result.stderr
    assert (out / "stress.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, ["stress", "--out", str(out)])
    assert again.exit_code == 2
    assert "holds a ladder already" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0: is below 1"),
        (["--minutes", "0"], "--minutes 0: is not above 0"),
        (["--local", "--address", "a:1"], "exclude each other"),
        (["--cohort", "many"], "--cohort many: 'many' is not a whole number"),
        (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster answers there"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["stress", "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
