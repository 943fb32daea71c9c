"""The harness that makes papers' tables scaled down: cells that are kept, and their figures."""

from __future__ import annotations

import doctest
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_launch import tables

from subfleet.config import Experiment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks/papers` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module


def toy(common: Any) -> Any:
    """A table of two rows that takes seconds."""
    changes = {"run__rounds": 2, "run__eval_every": 1, "run__engine": "loop"}
    rows = (
        common.Row("fedavg", "FedAvg", {"algorithm.name": "fedavg"}, {"acc_global": "81.36"}),
        common.Row("fedpa", "FedPA", {"algorithm.name": "fedpa"}),
    )
    experiment = Experiment(**tables(**changes))
    return common.Table("toy", "A toy", experiment, rows, targets=(0.0, 0.999))


def test_an_interrupted_table_goes_on_and_finished_cells_are_not_run_again(
    papers: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = papers("common")
    monkeypatch.setattr(common, "PROBE_S", 1e-3)  # stops after one round
    todo = toy(common).cells([0], tmp_path / "cells")
    began: list[tuple[str, float | None]] = []
    plain = common.launch

    def second_cell_is_interrupted(experiment: Experiment, **given: Any) -> Any:
        began.append((experiment.algorithm.name, experiment.run.max_seconds))
        if len(began) == 4:
            raise KeyboardInterrupt
        return plain(experiment, **given)

    monkeypatch.setattr(common, "launch", second_cell_is_interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        common.run(todo, jobs=0, minutes=5, say=said.append)
    # Each row was tried, for one round that counts; then one cell ran to its end.
    assert began[:2] == [("fedavg", 1e-3), ("fedpa", 1e-3)]
    assert sorted(began[2:]) == [("fedavg", None), ("fedpa", None)]
    (finished,) = [cell for cell in todo if cell.done() is not None]
    (cut,) = [cell for cell in todo if cell.done() is None]
    assert any(text.startswith("about 0 minutes, 1 cells at a time") for text in said)
    stamp = (finished.folder / "summary.json").stat().st_mtime_ns

    assert common.run(todo, jobs=0, minutes=5, say=said.append) == {}
    assert began[4:] == [(cut.label, None)]
    assert "2 cells, 1 finished before, 1 to run" in said
    assert (finished.folder / "summary.json").stat().st_mtime_ns == stamp
    assert common.run(todo, jobs=0, minutes=0, say=said.append) == {}

    # The rounds are those of a run that nothing stopped.
    whole = plain(cut.experiment, out=tmp_path / "whole", local=True)
    assert cut.done().summary["params_sha256"] == whole.summary["params_sha256"]
    assert list(cut.folder.glob("checkpoints/*")) == [], "cells keep only what is reported"


def test_no_cell_begins_that_would_end_too_late(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    common = papers("common")
    todo = toy(common).cells([0, 1], tmp_path)
    missing = common.run(todo, jobs=0, minutes=0, say=lambda text: None)
    assert sorted(missing) == sorted(common.name(cell) for cell in todo)
    assert not any(tmp_path.iterdir())
    assert papers("measured").results(toy(common), todo) is None


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The toy's table and cells of one seed, run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
        common = importlib.import_module("common")
        table = toy(common)
        todo = table.cells([0], tmp_path_factory.mktemp("cells"))
        for cell in todo:
            common.train(cell)
        return table, todo


def test_figures_are_those_of_the_run_folders(papers: Callable[[str], Any], cells: Any) -> None:
    table, todo = cells
    found = papers("measured").results(table, todo).to_json()
    assert list(found["rows"]) == ["fedavg", "fedpa"]
    for cell in todo:
        lines = [json.loads(text) for text in (cell.folder / "metrics.jsonl").open()]
        rows = pq.read_table(cell.folder / "clients").to_pylist()
        row, last = found["rows"][cell.label], {r["client"]: r for r in rows}  # rounds in order
        accuracies = [one["acc_global"] for one in lines]
        assert row["acc_global"] == [pytest.approx(100 * accuracies[-1])]
        assert row["acc_global_last_5"] == [pytest.approx(100 * statistics.fmean(accuracies))]
        assert row["acc_global_best"] == [pytest.approx(100 * statistics.fmean(accuracies))]
        own = [r["acc_local"] for r in last.values() if r["acc_local"] == r["acc_local"]]
        assert row["acc_local"] == [pytest.approx(100 * statistics.fmean(own))]
        of_last = [r["params"] for r in rows if r["round"] == 2]
        assert row["params"] == [statistics.fmean(of_last)]
        assert row["mb_up"] == [pytest.approx(sum(one["bytes_up"] for one in lines) / 1e6)]
        assert row["mb_down"] == [pytest.approx(sum(one["bytes_down"] for one in lines) / 1e6)]
        assert row["client_s"] == [pytest.approx(statistics.median(r["seconds"] for r in rows))]
        assert row["rounds_to"] == {"0.0": [2], "0.999": [None]}
    # The poorest tier trains half the width, and FedAvg's clients all train that.
    assert found["rows"]["fedavg"]["params"][0] < found["rows"]["fedpa"]["params"][0]
    assert found["full"]["params"] > found["rows"]["fedpa"]["params"][0]


def test_a_client_counts_with_its_most_recent_local_accuracy(
    papers: Callable[[str], Any], cells: Any
) -> None:
    measured, (_, todo) = papers("measured"), cells
    one = measured.Finished(todo[0], todo[0].done())
    rounds, ids = [1, 1, 2, 3], [7, 4, 7, 4]
    accuracy = [0.1, 0.5, 0.9, float("nan")]
    one.__dict__["_rows"] = {
        **{"round": np.array(rounds), "client": np.array(ids)},
        **{"acc_local": np.array(accuracy), "params": np.array([1, 2, 3, 4])},
        **{"macs": np.arange(4), "steps": np.array([5, 6, 7, 8]), "seconds": np.ones(4)},
    }
    assert one.clients.client.tolist() == [4, 7]
    assert one.clients.acc_local.tolist() == [0.5, 0.9]
    assert one.clients.params.tolist() == [2, 3]
    assert one.clients.steps.tolist() == [6, 7]


def test_rounds_to_a_target_count_to_the_mean_of_five(
    papers: Callable[[str], Any], cells: Any
) -> None:
    measured, (_, todo) = papers("measured"), cells
    one = measured.Finished(todo[0], todo[0].done())
    one.__dict__["accuracy"] = np.array([0.0, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.1])
    # Means of five: 0.3, 0.38, 0.3, 0.3 after rounds 5, 6, 7 and 8.
    assert [one.rounds_to(t) for t in (0.29, 0.35, 0.5)] == [5, 6, None]
    assert one.smooth.max() == pytest.approx(0.38)
    assert one.figures["acc_global_last_5"] == pytest.approx(30.0)
    assert one.figures["acc_global_best"] == pytest.approx(38.0)


@pytest.mark.parametrize("name", ["measured", "correlation", "page", "samples", "adds_rate"])
def test_the_examples_in_the_harness_hold(papers: Callable[[str], Any], name: str) -> None:
    done = doctest.testmod(papers(name))
    assert done.attempted > 0 and done.failed == 0
