"""APFL's page: what its rows are, and what it says of their cells."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subfleet.config import Experiment
from subfleet.core.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "examples" / "papers" / "apfl"


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks/papers` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module


# --- rows ------------------------------------------------------------------------------------


def tables(apfl: Any, options: Any, name: str = "cifar10") -> list[Any]:
    return [apfl.table(name, partition, options) for partition in apfl.PARTITIONS]


def test_two_partitions_five_rows_and_two_seeds_are_twenty_cells(
    papers: Callable[[str], Any],
) -> None:
    apfl = papers("apfl")
    options = apfl.parsed(["--data", ".", "--seeds", "0,1"])
    found = [cell for one in tables(apfl, options) for cell in one.cells([0, 1], Path("nowhere"))]
    assert len(found) == 20 and len({cell.folder for cell in found}) == 20


def test_small_rows_are_the_files_with_what_is_said_to_be_smaller(
    papers: Callable[[str], Any],
) -> None:
    apfl, numbers = papers("apfl"), papers("apfl_numbers")
    own = {"fedavg": numbers.SMALL_FEDAVG, "fedcs": numbers.SMALL_FEDCS, "feduniform": {}}
    for one in tables(apfl, apfl.parsed(["--data", "."])):
        for row, cell in zip(one.rows, one.cells([0], Path("nowhere")), strict=True):
            file = Experiment.load(FILES / f"{one.name}-{row.name}.toml")
            smaller = numbers.SMALL | own[row.name.partition("-")[0]]
            assert cell.experiment == file.with_values({"data.source": "cifar10"} | smaller)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cinic10"])
def test_the_papers_own_scale_runs_the_files_as_they_are(
    name: str, papers: Callable[[str], Any], tmp_path: Path
) -> None:
    apfl = papers("apfl")
    options = apfl.parsed(["--scale", "paper", "--data", str(tmp_path)])
    assert options.jobs == 0, "a run has all that the machine has"
    for one in tables(apfl, options, name):
        for cell in one.cells([0], Path("nowhere")):
            file = Experiment.load(FILES / f"{one.name}-{cell.label}.toml")
            assert cell.experiment == file.with_values({"data.source": str(tmp_path / name)})


def test_a_tried_option_is_a_row_more(papers: Callable[[str], Any]) -> None:
    apfl = papers("apfl")
    words = ["--data", ".", "--rows", "fedcs-high", "--try", "fedcs-high:inherit=true"]
    (plain, other) = tables(apfl, apfl.parsed(words))[0].rows
    assert other.name == "fedcs-high, inherit=true"
    assert other.settings == {**plain.settings, "algorithm.inherit": True}
    assert plain.paper == {"acc_global": "92.74", "acc_own": "92.75"}
    assert other.paper == {}, "the paper knows nothing of it"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "fedcs"], "--rows: 'fedcs' is none of fedavg, feduniform-high, fedcs-high"),
        (["--partitions", "shards"], "--partitions: 'shards' is none of iid, dirichlet"),
        (["--try", "fedcs:lazy=true"], "--try fedcs:lazy=true: not of the form ROW:KEY=VALUE"),
        (["--try", "fedcs-high"], "--try fedcs-high: not of the form ROW:KEY=VALUE"),
        (["--seeds", "0,0"], "--seeds 0,0: a seed is given twice"),
        (["--minutes", "0"], "--minutes: '0' is not a number above 0"),
        (["--data", "/nonexist"], "--data /nonexist: no such folder; give the one of the data"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(
    words: list[str], said: str, papers: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        papers("apfl").parsed(["--data", ".", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_says_what_the_script_does(
    papers: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        papers("apfl").parsed(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "APFL's Table 1, scaled down" in printed and "--page-only" in printed


def test_a_folder_without_a_data_set_is_refused(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    apfl = papers("apfl")
    with pytest.raises(InputError, match="has no folder cifar10; put the publishers' files there"):
        apfl.run(apfl.parsed(["--data", str(tmp_path)]))


def test_a_part_is_not_written_over_the_page(papers: Callable[[str], Any]) -> None:
    parsed = papers("apfl").parsed
    whole = ["--data", ".", "--cache", "kept"]
    results = ROOT / "docs" / "results"
    assert parsed(whole).out == results / "apfl.md"
    assert parsed([*whole, "--scale", "paper"]).out == results / "apfl-paper.md"
    tried = ["--try", "fedcs-low:lazy=false"]
    for words in (["--partitions", "iid"], ["--rows", "fedavg"], tried):
        assert parsed([*whole, *words]).out == Path("kept/part.md")


# --- the page --------------------------------------------------------------------------------

TIERS = [
    {"name": "high", "share": 0.4, "width": 1.0},
    {"name": "medium", "share": 0.2, "width": 0.75},
    {"name": "low", "share": 0.4, "width": 0.5},
]
SEARCH = {
    **{"algorithm.name": "fedcs", "algorithm.warm_up": 1, "algorithm.shrink": 0.3},
    **{"algorithm.min_units": 1, "run.rounds": 4},
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A toy's table with a row of each method, its cells of one seed, run, and where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
        common = importlib.import_module("common")
        experiment = Experiment(
            data={"name": "synthetic_femnist", "clients": 5, "mean_samples": 12.0},
            model={"name": "small_cnn", "channels": [4, 8], "hidden": 16, "norm": "batch"},
            fleet={"tiers": TIERS},
            algorithm={"name": "feduniform"},
            run={
                **{"rounds": 2, "cohort": 5, "held_out": 0.0, "eval_every": 1},
                **{"engine": "loop"},
            },
        )
        paper = {"acc_global": "92.74", "acc_own": "92.75"}
        rows = (
            common.Row("fedavg", "FedAvg ×0.5", {"algorithm.name": "fedavg"}),
            common.Row("feduniform-high", "FedUniform, HIGH", {}),
            common.Row("fedcs-high", "FedCS, HIGH", SEARCH, paper),
        )
        table = common.Table("toy", "A toy", experiment, rows)
        cache = tmp_path_factory.mktemp("cells")
        todo = table.cells([0], cache)
        for cell in todo:
            common.train(cell)
        return table, todo, cache


def test_the_page_has_tables_and_figures(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path
) -> None:
    table, todo, _ = cells
    apfl_page, found = papers("apfl_page"), papers("measured").results(table, todo)
    section = apfl_page.section(found, tmp_path, "apfl")
    compared = apfl_page.comparison([found], tmp_path, "apfl")
    assert "| FedAvg ×0.5 | – |" in section and "| FedCS, HIGH | 92.74 |" in section
    assert "nan" not in section + compared
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        *("apfl-toy-bytes.png", "apfl-units.png", "apfl-distances.png", "apfl-sizes.png")
    }
    for name in pictures:
        assert name in section + compared
        content = (tmp_path / name).read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) < 150_000
    rows = [line for line in (section + compared).splitlines() if line.startswith("|")]
    assert len(rows) == 5 + 5 + 3 + 3 + 4
    (line,) = apfl_page.summary([found]).splitlines()
    assert line.startswith("* A toy, HIGH, Glo. / Loc.: FedAvg ×0.5 ") and "FedCS, HIGH " in line


def test_its_figures_are_those_of_the_run_folders(papers: Callable[[str], Any], cells: Any) -> None:
    table, todo, _ = cells
    apfl_page, found = papers("apfl_page"), papers("measured").results(table, todo)
    line = found.line("fedcs-high")
    cell, run = apfl_page.Cell(line.finished[0]), todo[2].done()
    records, rows = run.metrics, run.clients().to_pylist()
    assert [r["phase"] for r in records] == ["warm-up", "search", "train", "train"]
    assert cell.final("acc_global") == 100 * records[-1]["acc_global"]
    assert cell.final("acc_own") == 100 * records[-1]["acc_own"]
    sent = [(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in records]
    assert cell.before == pytest.approx(sent[0] + sent[1])
    assert cell.megabytes == pytest.approx(np.cumsum(sent[2:]))
    seconds = [row["seconds"] for row in rows if row["round"] == 2]
    assert cell.seconds("search") == pytest.approx(seconds)
    assert cell.warm == records[0]["loss_train"]
    trained = {row["client"]: row for row in rows if row["round"] == 4}
    assert {c: size[2] for c, size in cell.sizes.items()} == {
        c: row["macs"] for c, row in trained.items()
    }
    # High clients keep the whole; the two low ones are the only pair of one budget.
    assert len(cell.found) == 3 and len(cell.distances()) == 1
    low = [cell.found[c] for c, row in sorted(trained.items()) if row["tier"] == "low"]
    assert cell.distances() == [pytest.approx(float(np.linalg.norm(low[0] - low[1])))]


def test_a_page_without_a_search_or_a_fleet_says_what_there_is(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path
) -> None:
    table, todo, _ = cells
    apfl_page, measured = papers("apfl_page"), papers("measured")
    for names in (["fedavg"], ["feduniform-high"], ["fedcs-high"], ["fedavg", "fedcs-high"]):
        found = measured.results(table.only(names), todo)
        section = apfl_page.section(found, tmp_path, "apfl")
        compared = apfl_page.comparison([found], tmp_path, "apfl")
        text = "\n".join([apfl_page.summary([found]), section, compared])
        assert "nan" not in text
        assert ("searched networks" in text) == ("fedcs-high" in names)
        assert text.count("| FedAvg ×0.5 |") == 2 * ("fedavg" in names)
        assert text.count("LOW") == 0, "no row of that fleet was run"
    assert apfl_page.comparison([], tmp_path, "apfl") == apfl_page.summary([]) == ""


def test_the_page_alone_runs_nothing_and_names_what_is_missing(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apfl, common = papers("apfl"), papers("common")
    table, _, cache = cells

    def refused(*given: Any, **more: Any) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(common, "launch", refused)
    monkeypatch.setattr(apfl, "table", lambda name, partition, options: table)
    (tmp_path / "cifar10").mkdir()
    words = ["--data", str(tmp_path), "--cache", str(cache), "--partitions", "iid"]
    words += ["--seeds", "0,1", "--out", str(tmp_path / "a.md"), "--page-only"]
    monkeypatch.setattr("sys.argv", ["apfl.py", *words])
    apfl.main()
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("# APFL, scaled down\n\n* A toy, HIGH") and "## A toy" in text
    assert "* toy, fedcs-high, seed 1: not run yet" in text and "seed 0:" not in text
    assert "--page-only" not in text and str(tmp_path) not in text


def test_all_figures_can_be_had_as_json(papers: Callable[[str], Any], cells: Any) -> None:
    table, todo, _ = cells
    apfl_page, found = papers("apfl_page"), papers("measured").results(table, todo)
    told = json.loads(json.dumps(apfl_page.to_json([found]), allow_nan=False))
    (fedcs,) = told["toy"]["fedcs-high"]
    cell = apfl_page.Cell(found.line("fedcs-high").finished[0])
    assert fedcs["acc_own"] == cell.final("acc_own") and fedcs["seed"] == 0
    assert fedcs["search_slowest_s"] == cell.seconds("search").max() <= fedcs["search_s"]
    (fedavg,) = told["toy"]["fedavg"]
    assert fedavg["warm_up_loss"] is fedavg["search_slowest_s"] is None


def test_megabytes_to_a_target_lie_between_two_evaluations(papers: Callable[[str], Any]) -> None:
    records = [
        {"round": r, "phase": "train", "bytes_up": 1e6, "bytes_down": 1e6, "acc_global": accuracy}
        for r, accuracy in ((1, None), (2, 0.1), (3, None), (4, 0.3))
    ]
    cell = papers("apfl_cells").Cell(type("Finished", (), {"metrics": records}))
    assert cell.megabytes_to(10) == 4.0
    assert cell.megabytes_to(15) == pytest.approx(5.0)
    assert np.isnan(cell.megabytes_to(31))
