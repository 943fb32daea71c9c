"""Sweeps: cells are run once, taken up where they stopped, and summed up over seeds."""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_launch import tables
from typer.testing import CliRunner

from subfleet import launch as launch_module
from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.launch import Run
from subfleet.sweep import cells, check, grid_points, plus_minus, run_cells, sweep, table

GRID = {"algorithm.name": ["fedpa", "fedavg"]}


def base() -> Experiment:
    return Experiment(**tables(run__rounds=2))


def test_a_grid_is_the_product_of_its_axes() -> None:
    points = grid_points({"train.lr": [0.1, 0.2], "algorithm.name": ["fedpa", "fedavg"]})
    assert list(points.values()) == [
        {"train.lr": 0.1, "algorithm.name": "fedpa"},
        {"train.lr": 0.1, "algorithm.name": "fedavg"},
        {"train.lr": 0.2, "algorithm.name": "fedpa"},
        {"train.lr": 0.2, "algorithm.name": "fedavg"},
    ]
    assert list(grid_points({})) == ["all"]


def test_what_all_points_share_is_in_no_label(tmp_path: Path) -> None:
    grid = {"run.rounds": [3], "train.lr": [0.1, 0.2], "train.epochs": [1]}
    points = grid_points(grid)
    assert list(points) == ["lr=0.1", "lr=0.2"]
    assert points["lr=0.2"] == {"run.rounds": 3, "train.lr": 0.2, "train.epochs": 1}
    (first, _) = cells(base(), [7], points, tmp_path)
    assert first.folder.name.startswith("lr=0.1-s7-")
    assert first.experiment.run.rounds == 3
    assert list(grid_points({"run.rounds": [3]})) == ["all"]


def test_a_cell_is_found_under_whatever_label_it_was_run(tmp_path: Path) -> None:
    settings = {"run.rounds": 1, "algorithm.name": "fedpa"}
    (old,) = cells(base(), [0], {"rounds=1, name=fedpa": settings}, tmp_path)
    run_cells([old], local=True)
    (again,) = cells(base(), [0], {"all": settings}, tmp_path)
    assert again.folder == old.folder and again.done() is not None
    (other,) = cells(base(), [1], {"all": settings}, tmp_path)
    assert other.folder.name.startswith("all-s1-") and other.done() is None


def test_finished_cells_are_not_run_again_and_cut_ones_go_on(tmp_path: Path) -> None:
    todo = cells(base(), [0, 1], grid_points(GRID), tmp_path)
    assert len({cell.folder for cell in todo}) == 4
    # One cell was cut short before: only its first round is there.
    cut = todo[2].experiment.with_values({"run.max_seconds": 1e-3})
    run_cells([type(todo[2])("cut", {}, cut, todo[2].folder)], local=True)
    assert todo[2].done() is None
    runs = run_cells(todo, local=True)
    assert [run.summary["rounds"] for run in runs] == [2, 2, 2, 2]
    stamps = [(cell.folder / "summary.json").stat().st_mtime_ns for cell in todo]
    said: list[str] = []
    again = run_cells(todo, local=True, say=said.append)
    assert [(cell.folder / "summary.json").stat().st_mtime_ns for cell in todo] == stamps
    assert said == ["4 cells, 4 finished before, 0 to run"]
    assert [run.summary for run in again] == [run.summary for run in runs]


def test_the_table_has_mean_and_sample_sd_over_seeds(tmp_path: Path) -> None:
    todo = cells(base(), [0, 1, 2], grid_points(GRID), tmp_path)
    values = [0.5, 0.6, 0.7, 0.1, 0.2, 0.6]
    runs = [
        Run(cell.folder, {"acc_global": value, "params_mean": 10.0})
        for cell, value in zip(todo, values, strict=True)
    ]
    rows = table(todo, runs)
    assert [row["cell"] for row in rows] == ["name=fedpa", "name=fedavg"]
    assert rows[0]["acc_global"] == pytest.approx(0.6)
    assert rows[0]["acc_global_sd"] == pytest.approx(0.1)
    assert rows[1]["acc_global_sd"] == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]))
    assert plus_minus(rows[0], "acc_global") == "0.600 ± 0.100"
    assert plus_minus(rows[0], "acc_local") == "–"


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(base().to_toml())
    arguments = ["sweep", str(path), "--seeds", "0,1", "--local", "--out", str(tmp_path / "cells")]
    arguments += ["--set", "algorithm.name=fedpa,fedavg", "--set", "train.lr=0.1"]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 0 and "±" in plain.stdout
    assert "algorithm.name" in plain.stdout and "lr" not in plain.stdout.split("seeds")[0]
    assert [line.split()[0] for line in plain.stdout.splitlines() if "±" in line] == [
        "fedpa",
        "fedavg",
    ]
    assert "reading the data ...\ncell 1/4: name=fedpa, seed 0\n" in plain.stderr
    assert re.search(r"cell 2/4: name=fedpa, seed 1, about \d+s left\n", plain.stderr)
    assert plain.stderr.count("round 2/2 ") == 4
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [row["seeds"] for row in rows] == [2, 2]
    assert all(0 <= row["acc_global"] <= 1 for row in rows)


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        sweep(base(), seeds=[0], grid={}, out=tmp_path / "file", local=True)


def test_an_out_that_is_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(InputError, match=r"holds a run; give a folder of the sweep's own"):
        sweep(base(), seeds=[0], grid={}, out=tmp_path, local=True)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"train.lr": [0.1, -1.0]}, "cell lr=-1.0: train.lr = -1.0: must be greater than 0"),
        ({"algorithm.name": ["fedpa", "fedpq"]}, "cell name=fedpq: algorithm.name = 'fedpq'"),
        ({"run.cohort": [4, 400]}, "cell cohort=400: run.cohort=400 is more than the 16 clients"),
    ],
)
def test_a_mistake_in_the_last_cell_shows_before_the_first_runs(
    grid: dict[str, list], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        sweep(base(), seeds=[0, 1], grid=grid, out=tmp_path / "cells", local=True)
    assert not (tmp_path / "cells").exists()


def test_one_cell_is_not_cells(tmp_path: Path) -> None:
    said: list[str] = []
    run_cells(cells(base(), [0], grid_points({}), tmp_path), local=True, say=said.append)
    assert said[0] == "1 cell, 0 finished before, 1 to run"


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(base().to_toml())
    arguments = ["sweep", str(path), "--seeds", "0,1", "--local", "--out", str(tmp_path / "cells")]
    monkeypatch.setattr(sys, "argv", ["subfleet", *arguments])
    plain = launch_module.launch

    def second_is_interrupted(experiment: Experiment, **given: object) -> Run:
        if experiment.run.seed == 1:
            raise KeyboardInterrupt
        return plain(experiment, **given)  # type: ignore[arg-type]

    monkeypatch.setattr("subfleet.sweep.launch", second_is_interrupted)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert done.stderr.endswith(
        f"stopped; {tmp_path / 'cells'} holds 1 of 2 cells finished; go on with\n"
        f"  subfleet {' '.join(arguments)}\ninterrupted\n"
    )


def test_the_check_of_the_cells_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subfleet.dashboards.console.SLOW_S", 0.0)
    console = Console(file=io.StringIO())
    check(cells(base(), [0, 1], grid_points(GRID), tmp_path), console)
    assert "reading the data" in console.file.getvalue()
