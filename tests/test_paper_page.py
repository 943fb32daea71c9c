"""ADDS's page: what its rows are, and what it says of their cells."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_launch import tables
from test_paper_examples import FILES, ROWS, SETS

from subfleet.config import Experiment
from subfleet.core.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

# What each row of the scaled-down tables changes in its table's experiment. No row but STC
# trains otherwise than FedAvg: it takes no momentum, so that 0.1 is 0.01 / (1 - 0.9).
PFEDME = {"inner_steps": 5, "penalty": 15.0, "personal_lr": 0.05, "eta": 0.01}
OWN: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("femnist", "centralised"): ({}, {}),
    ("femnist", "fedavg"): ({}, {}),
    ("femnist", "fedprox"): ({}, {}),
    ("femnist", "stc"): (
        {"p_up": "adds_femnist", "p_down": "adds_femnist"},
        {"lr": 0.1, "momentum": 0.0},
    ),
    ("femnist", "pfedme"): (PFEDME, {}),
    ("femnist", "feddrop"): ({"keep": 0.75}, {}),
    ("femnist", "adds-slim"): ({"name": "adds", "importance": "slim"}, {}),
    ("femnist", "adds-lrp"): ({"name": "adds", "importance": "lrp"}, {}),
    ("shakespeare", "fedavg"): ({}, {}),
    ("shakespeare", "adds-slim"): ({"name": "adds", "importance": "slim"}, {}),
    ("sent140", "fedavg"): ({}, {}),
    ("sent140", "adds-slim"): ({"name": "adds", "importance": "slim"}, {}),
}


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks/papers` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module


# --- rows ------------------------------------------------------------------------------------


def test_each_small_row_changes_what_it_says_and_nothing_else(
    papers: Callable[[str], Any],
) -> None:
    adds = papers("adds")
    assert {(name, row) for name, rows in adds.SMALL_ROWS.items() for row in rows} == set(OWN)
    for (name, row), (algorithm, train) in OWN.items():
        plain = adds.experiment_file(name, "fedavg")
        own = adds._own_settings(adds.experiment_file(name, row), plain)
        expected = {f"algorithm.{key}": value for key, value in ({"name": row} | algorithm).items()}
        assert own == expected | {f"train.{key}": value for key, value in train.items()}
        assert (plain.train.momentum, plain.train.lr) == {
            **{"femnist": (0.9, 0.01), "shakespeare": (0.0, 0.8), "sent140": (0.0, 0.3)}
        }[name]


@pytest.mark.parametrize("name", SETS)
def test_the_papers_own_scale_runs_the_files_as_they_are(
    name: str, papers: Callable[[str], Any], tmp_path: Path
) -> None:
    adds = papers("adds")
    options = adds.parsed(["--scale", "paper", "--data", str(tmp_path)])
    assert options.jobs == 0, "a run has all that the machine has"
    for cell in adds.table(name, ROWS, options).cells([0], Path("nowhere")):
        file = Experiment.load(FILES / f"{name}-{cell.label}.toml")
        where: dict[str, Any] = {"data.source": str(tmp_path / name)}
        if name == "sent140":
            where["data.glove"] = str(tmp_path / "sent140" / "glove.6B.300d.txt")
        if cell.label == "pfedme":  # without effect on it, and not in its file
            train = cell.experiment.train
            where |= {"train.lr": train.lr, "train.momentum": train.momentum}
        assert cell.experiment == file.with_values(where)


def test_a_wrong_word_is_refused(
    papers: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        papers("adds").parsed(["--data", ".", "--rows", "fedagv"])
    assert "--rows: 'fedagv' is none of centralised, fedavg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "a"], "--seeds a: 'a' is not a whole number from 0 up; write e.g. 0,1,2"),
        (["--seeds", "0,0"], "--seeds 0,0: a seed is given twice"),
        (["--minutes", "-1"], "--minutes: '-1' is not a number above 0"),
        (["--minutes", "nan"], "--minutes: 'nan' is not a number above 0"),
        (["--jobs", "-2"], "--jobs: '-2' is not a whole number from 0 up"),
        (["--data", "/nonexist"], "--data /nonexist: no such folder; give the one of the data"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(
    words: list[str], said: str, papers: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        papers("adds").parsed(["--data", ".", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_a_data_set_is_refused(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    adds = papers("adds")
    with pytest.raises(InputError, match="has no folder sent140; put the publishers' files there"):
        adds.run(adds.parsed(["--data", str(tmp_path), "--tables", "sent140"]))


# --- the page --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A toy's table with rows of each kind, its cells of one seed, run, and where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
        common = importlib.import_module("common")
        changes = {"run__rounds": 2, "run__eval_every": 1, "run__engine": "loop"}
        rows = (
            common.Row("centralised", "centralised", {"algorithm.name": "centralised"}),
            common.Row("fedavg", "FedAvg", {"algorithm.name": "fedavg"}, {"acc_global": "81.36"}),
            common.Row("adds-slim", "ADDS (slim)", {"algorithm.name": "adds"}),
        )
        table = common.Table("toy", "A toy", Experiment(**tables(**changes)), rows, (0.0, 0.999))
        cache = tmp_path_factory.mktemp("cells")
        todo = table.cells([0], cache)
        for cell in todo:
            common.train(cell)
        return table, todo, cache


def test_the_page_has_tables_figures_and_what_was_written_by_hand(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path
) -> None:
    adds, measured, page = papers("adds"), papers("measured"), papers("page")
    found = measured.results(*cells[:2])
    section = papers("adds_page").section(found, tmp_path, "adds")
    assert "| FedAvg | 81.36 |" in section and "| ADDS (slim) | – |" in section
    for picture in tmp_path.glob("*.png"):
        assert picture.name in section
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 150_000
    names = {"acc_global", "loss_global", "acc-local", "divergence", "keep"}
    assert {path.name for path in tmp_path.glob("*.png")} == {f"adds-toy-{n}.png" for n in names}
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 15 and max(map(len, rows)) <= 120, "a table fits the page"
    path = tmp_path / "adds.md"
    page.write(path, ["# ADDS", section], adds.TRIED)
    assert adds.TRIED in path.read_text()
    path.write_text(path.read_text().replace(adds.TRIED, "## What was tried\n\nThree things."))
    page.write(path, ["# Anew", page.missing_text({"toy, fedpa, seed 1": "no time"})], adds.TRIED)
    text = path.read_text()
    assert text.startswith("# Anew") and "Three things." in text and "A toy" not in text
    assert "* toy, fedpa, seed 1: no time" in text


def test_the_page_begins_with_what_was_found(papers: Callable[[str], Any], cells: Any) -> None:
    adds_page, measured = papers("adds_page"), papers("measured")
    found = measured.results(*cells[:2])
    lasts = {"centralised": 30.04, "fedavg": 20.0, "adds-slim": 41.0}
    for line in found.lines:
        figures = dict(line.finished[0].figures) | {"acc_global_last_5": lasts[line.row.name]}
        line.finished[0].__dict__["figures"] = figures
    found.line("adds-slim").finished[0].figures["params"] = found.full["params"] / 8
    order, sizes = adds_page.summary([found]).splitlines()
    assert order.endswith("A toy: ADDS (slim) 41.0, centralised 30.0, FedAvg 20.0.")
    assert sizes.endswith("A toy: ADDS (slim) 12.5 %.")
    text = papers("page").heading("ADDS", f"{order}\n{sizes}", "python a.py", found.environments())
    assert text.startswith(f"# ADDS\n\n{order}\n{sizes}\n\n```\npython a.py\n```\n\n20")


def test_a_long_command_is_broken_between_options(papers: Callable[[str], Any]) -> None:
    words = ["--seeds", "0,1", "--cache", "/a/b", "--tables", "femnist", "--rows", "fedavg"]
    words += ["--try", "stc:p_up=1 2", "--json", "-"]
    text = papers("page").command("benchmarks/papers/adds.py", words)
    lines = text.split(" \\\n    ")
    assert len(lines) == 2 and max(map(len, lines)) < 100
    assert " ".join(lines) == (
        "python benchmarks/papers/adds.py --seeds 0,1 --cache CACHE --tables femnist "
        "--rows fedavg --try 'stc:p_up=1 2' --json JSON"
    )


def test_correlation_of_size_and_divergence_is_told_without_what_steps_explain(
    papers: Callable[[str], Any],
) -> None:
    """Divergence and size both fall with steps; of clients of equal steps, size with divergence."""
    adds_page, figures = papers("adds_page"), papers("figures")
    steps = np.repeat([3, 9, 15, 21], 25)
    own = np.tile(np.linspace(-0.1, 0.1, 25), 4)
    points = figures.Points(1 - steps / 30 + own, 80 - 2 * steps - 20 * own, steps)
    _, plain, partial, many, confounded = adds_page._correlations("ADDS", points)
    assert float(plain) > 0.9 and float(confounded) < -0.9
    assert float(partial) == -1.0
    assert many.endswith(" (50 of 100)") and 0 < float(many.split()[0]) < float(plain)
    # Where all take the same number of steps there is nothing to explain.
    same = points._replace(colour=np.full(100, 15))
    assert adds_page._correlations("ADDS", same)[1:] == [plain, plain, f"{plain} (100 of 100)", "–"]


def test_units_are_counted_after_the_cap_and_rounding(
    papers: Callable[[str], Any], cells: Any
) -> None:
    measured = papers("measured")
    found = measured.results(*cells[:2])
    (one,) = found.line("adds-slim").finished
    reports = papers("common").reports(one.run.path).values()
    shares = measured.kept_shares(one, found.units)
    assert found.units == {"conv1": 2, "conv2": 4, "fc1": 8} and list(shares) == list(found.units)
    for group, size in found.units.items():
        assert shares[group] == [report["units"][group] / size for report in reports]
    ratios = [report["ratio"]["fc1"] for report in reports]
    assert shares["fc1"] != ratios and {8 * share % 1 for share in shares["fc1"]} == {0}


def test_a_page_of_pooled_data_alone_has_no_histogram(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path
) -> None:
    table, todo, _ = cells
    found = papers("measured").results(table.only(["centralised"]), todo)
    section = papers("adds_page").section(found, tmp_path, "adds")
    assert "| centralised |" in section
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        *("adds-toy-acc_global", "adds-toy-loss_global")
    }


def test_a_part_is_not_written_over_the_page(papers: Callable[[str], Any]) -> None:
    parsed = papers("adds").parsed
    whole = ["--data", ".", "--cache", "kept"]
    assert parsed(whole).out == ROOT / "docs" / "results" / "adds.md"
    for words in (["--tables", "femnist"], ["--rows", "stc"], ["--try", "stc:p_up=0.1"]):
        assert parsed([*whole, *words]).out == Path("kept/part.md")
    assert parsed([*whole, "--rows", "stc", "--validate"]).out == Path("kept/validation.md")
    assert parsed([*whole, "--rows", "stc", "--out", "a.md"]).out == Path("a.md")


def test_the_page_alone_runs_nothing_and_a_run_of_all_reads_what_is_finished(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adds, common = papers("adds"), papers("common")
    table, todo, cache = cells

    def refused(*given: Any, **more: Any) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(common, "launch", refused)
    monkeypatch.setattr(adds, "SMALL", {"toy": {}})
    monkeypatch.setattr(adds, "SMALL_ROWS", {"toy": ["fedavg"]})
    monkeypatch.setattr(adds, "table", lambda name, rows, options: table)
    (tmp_path / "toy").mkdir()
    words = ["--data", str(tmp_path), "--cache", str(cache), "--jobs", "0"]
    words += ["--out", str(tmp_path / "a.md")]
    monkeypatch.setattr("sys.argv", ["adds.py", *words, "--seeds", "0,1", "--page-only"])
    adds.main()
    text = (tmp_path / "a.md").read_text()
    assert "## A toy" in text and "* toy, fedavg, seed 1: not run yet" in text
    assert "seed 0:" not in text and "--page-only" not in text
    monkeypatch.setattr("sys.argv", ["adds.py", *words, "--seeds", "0"])
    adds.main()
    whole = (tmp_path / "a.md").read_text()
    assert "## A toy" in whole and "not run yet" not in whole
    assert [cell.done() is None for cell in todo] == [False] * 3


@pytest.mark.slow
def test_the_script_makes_a_page_of_real_writers(
    papers: Callable[[str], Any],
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adds, common = papers("adds"), papers("common")
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "PROBE_S", 1e-3)
    smaller = {"model.width": 0.05, "run.rounds": 2, "train.epochs": 1}
    monkeypatch.setitem(adds.SMALL, "femnist", adds.SMALL["femnist"] | smaller)
    words = ["--data", str(real_data), "--tables", "femnist", "--rows", "fedavg,adds-slim"]
    words += ["--seeds", "0", "--jobs", "1", "--cache", str(tmp_path / "cells")]
    words += ["--out", str(tmp_path / "page" / "adds.md"), "--json", "-"]
    monkeypatch.setattr("sys.argv", ["adds.py", *words])
    adds.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    rows = printed["tables"][0]["rows"]
    assert printed["missing"] == {} and list(rows) == ["fedavg", "adds-slim"]
    text = (tmp_path / "page" / "adds.md").read_text()
    assert (
        "python benchmarks/papers/adds.py --data DATA" in text
        and str(tmp_path) not in text
        and str(real_data) not in text
    )
    for figure in ("divergence", "keep", "acc-local", "acc_global", "loss_global"):
        assert f"(adds-femnist-{figure}.png)" in text
