"""The benchmarks: that they start, compare like with like, and give their figures as JSON."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of `benchmarks/sides` by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"sides.{name}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_tells_what_it_does(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("leaf_cnn", 6_603_710), ("small_cnn", 55_518), ("cifar_cnn", 1_626_442), ("logreg", 48_670)],
)
def test_both_sides_train_networks_of_the_same_shapes(
    side: Any, name: str, parameters: int
) -> None:
    workload = side("workloads").WORKLOADS[name]
    plain = [tuple(value.shape) for value in workload.plain_module().parameters()]
    own = [tuple(value.shape) for value in side("engine_alone").network(workload).init(0).values()]
    assert sorted(plain) == sorted(own)
    assert sum(value.numel() for value in workload.plain_module().parameters()) == parameters


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clients", "0"], "--clients: '0' is not a whole number from 1 up"),
        (["--repeats", "0"], "--repeats: '0' is not a whole number from 1 up"),
        (["--rows", "x"], "--rows: 'x' is not a whole number from 1 up"),
        (["--width", "0"], "--width: '0' is not in (0, 1]"),
        (["--algorithms", "sct"], "--algorithms: unknown sct; known: fedavg"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("client_cost").parsed(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_rows_of_a_client_are_the_same_wherever_they_are_drawn(side: Any) -> None:
    workload = side("workloads").WORKLOADS["cifar_cnn"]
    block = side("engine_alone")._block(workload, np.array([7, 3]))
    x, y = workload.rows(3)
    assert (block.x[block.offsets[1] :] == x.numpy()).all()
    assert (block.y[block.offsets[1] :] == y.numpy()).all()


def test_a_side_stands_beside_the_plain_loop_before_and_after_it(side: Any) -> None:
    rates = iter([2.0, 9.0, 4.0, 10.0, 6.0])
    pairs = side("measure").in_turn(lambda: next(rates), lambda: next(rates), 2)
    assert pairs == [(3.0, 9.0), (5.0, 10.0)]
    assert side("measure").summary(pairs, flops=10.0)["ratio"] == 2.5


def test_what_hosts_do_beside_training_is_overhead(side: Any) -> None:
    seconds = {"plan": 0.1, "train": 2.0, "total": 2.2}
    phases = side("end_to_end").breakdown([seconds, seconds], 1.8)
    assert phases["train"] == 1.8
    assert phases[side("end_to_end").SUMS] == pytest.approx(0.2)
    assert phases["other"] == pytest.approx(0.1)
    assert phases["overhead"] == pytest.approx(0.4 / 2.2, abs=1e-4)


# The script as it is, on one short round of few clients, beside small matrix products.
FEW_CLIENTS = """
import dataclasses, runpy, sys

from sides import matmul
from sides.workloads import WORKLOADS

matmul.SIZE["cpu"] = 64
WORKLOADS["logreg"] = dataclasses.replace(WORKLOADS["logreg"], cohort=20, rounds=1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_engine_alone_is_measured_without_ray(tmp_path: Path) -> None:
    for package in ("ray", "pyarrow", "pydantic"):
        (tmp_path / f"{package}.py").write_text('raise ImportError("not here")\n')
    command = [sys.executable, "-c", FEW_CLIENTS, str(BENCHMARKS / "throughput.py")]
    command += ["--workload", "logreg", "--kinds", "engine", "--repeats", "1", "--json", "-"]
    folders = [tmp_path, BENCHMARKS.parent, BENCHMARKS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)["workloads"]["logreg"]["engine"]
    assert figures["ratio"] > 0
    assert figures["choice"]["way"] in ("loop", "traced", "vmap")


def test_a_report_over_large_runs_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    size = ["--runs", "2", "--rounds", "10", "--clients", "30", "--out", str(page)]
    command = [sys.executable, str(BENCHMARKS / "report.py"), *size]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["runs"] == 2 and found["build_s"] > 0
    assert found["megabytes"] == pytest.approx(page.stat().st_size / 1e6, abs=0.01)
    assert "timeline-fedpa" in page.read_text() and "units-fedavg" in page.read_text()


def test_what_the_engine_cannot_do_is_said(side: Any) -> None:
    from subfleet.core.errors import InputError

    alone = side("engine_alone")
    workload = side("workloads").WORKLOADS["logreg"]
    with pytest.raises(InputError, match="dtype='int8'"):
        alone.choice_for(workload, "cpu", alone.How(dtype="int8"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of `benchmarks` by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("reduce", ["--partials", "8,x"], "--partials 8,x: give whole numbers from 1 up"),
        ("reduce", ["--rounds", "0"], "--rounds 0: give 1 or more"),
        ("plan", ["a", "b", "--gpus", "0"], "--gpus 0: give whole numbers from 1 up"),
        ("plan", ["a", "b", "--cohort", "-1"], "--cohort -1: give a number above 0"),
    ],
)
def test_a_wrong_option_of_a_script_is_named(
    name: str, words: list[str], said: str, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark(name).parsed(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_sums_that_are_merged_are_of_a_million_parameters(benchmark: Any) -> None:
    from subfleet.launch import assemble
    from subfleet.platform.merging import pays

    reduce = benchmark("reduce")
    net = assemble(reduce.experiment(8, 2)).work.net
    assert sum(value.numel() for value in net.init(0).values()) == 999_923
    assert pays([net.init(0)]), "large enough to be merged on hosts"


STRESS = {
    "rungs": [
        {"status": "ok", "clients": 100, "cohort": 1000, "coordinator_cpu_s": 99.0},
        {"status": "ok", "clients": 1000, "cohort": 1000, "coordinator_cpu_s": 0.2},
        {"status": "failed", "clients": 2000, "cohort": 100},
        {"status": "ok", "clients": 1000, "cohort": 100, "coordinator_cpu_s": 0.11},
    ]
}
REDUCE = {
    "parameters": 1_000_000,
    "rows": [
        {"partials": 8, "tree": {"coordinator_cpu_s": 0.1, "merging_s": 9.0, "server_s": 9.0}},
        # 512 sums and 72 merges of them: 576 calls more than 8
        {
            "partials": 512,
            "tree": {"coordinator_cpu_s": 0.1 + 0.576, "merging_s": 0.056, "server_s": 0.016},
        },
    ],
}


def test_unit_costs_are_slopes_of_what_was_measured(benchmark: Any) -> None:
    costs = benchmark("plan").Costs.of(STRESS, REDUCE)
    assert costs.client_s == pytest.approx(1e-4)
    assert costs.round_s == pytest.approx(0.1)
    assert costs.bundle_s == pytest.approx(1e-3 - 1e-4)
    assert costs.byte_s == pytest.approx(1e-9), "seven additions of 8 MB"
    assert costs.server_byte_s == pytest.approx(2e-9)


def test_one_cohort_gives_no_slope(benchmark: Any) -> None:
    with pytest.raises(ValueError, match="1 rungs at 1,000 clients; measure two cohorts"):
        benchmark("plan").Costs.of({"rungs": STRESS["rungs"][:2]}, REDUCE)


def test_a_plan_is_that_of_the_formulas_by_hand(benchmark: Any) -> None:
    plan = benchmark("plan")
    costs = plan.Costs(round_s=0.1, client_s=1e-4, bundle_s=1e-3, byte_s=1e-9, server_byte_s=2e-9)
    site = plan.Site(
        clients=1000,
        cohort=100,
        rows=100,
        row_bytes=10,
        params=1_000_000,
        macs=2_200_000,
        gpus=16,
        node_gpus=8,
        rate=10.0,
        network=1e9,
    )
    found = plan.needs(site, costs)
    # 7 nominal seconds: 16 bundles, two merges of eight, two sums left, of 8 MB each.
    assert (found["bundles"], found["merges"], found["nodes"]) == (16, 2, 2)
    assert found["tree_to_node_bytes"] == 4_000_000
    assert found["sums_made_on_node_bytes"] == 64_000_000
    assert found["sums_into_node_bytes"] == 32_000_000
    assert found["sums_to_coordinator_bytes"] == 16_000_000
    assert found["rows_from_head_bytes"] == 50_000
    assert found["dormant_bytes"] == 14_000
    assert found["training_s"] == pytest.approx(0.625)
    # 0.1 a round, 0.01 clients, 0.018 calls, 0.008 one addition, 0.016 the server step
    assert found["coordinator_s"] == pytest.approx(0.152)
    # training; a merge of fetched sums, 0.032 + 0.056; what the coordinator does alone
    assert found["round_s"] == pytest.approx(0.625 + 0.088 + 0.134)
    assert found["breaks_first"] == "the coordinator's processor"
    assert found["gpus_that_pay"] == pytest.approx(100 / (10 * 0.152))
    assert "16 GPUs, 10/s each" in plan.table([found])
