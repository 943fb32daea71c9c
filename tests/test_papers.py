"""The papers' experiment files, and the harness that makes their scaled-down tables."""

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

from subfleet import registry
from subfleet.config import Experiment
from subfleet.core.algorithm import FULL, Setting, TierSize
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "examples" / "papers" / "adds"
SETS = ("femnist", "celeba", "shakespeare", "sent140")
ROWS = ("fedavg", "stc", "pfedme", "feddrop", "adds-slim", "adds-lrp")

# What the data would say, and the parameters of each network as papers count them: ADDS's
# Table 2 has 5.68 M and (with 62 classes, 60 of them too many) 9.95 M.
FACTS: dict[str, dict[str, Any]] = {
    "femnist": {"input_shape": (1, 28, 28), "num_classes": 62},
    "celeba": {"input_shape": (3, 112, 112), "num_classes": 2},
    "shakespeare": {"input_shape": (80,), "num_classes": 80, "vocabulary": 81},
    "sent140": {
        **{"input_shape": (25,), "num_classes": 2, "vocabulary": 50},
        "embedding": np.zeros((50, 300), np.float32),
    },
}
PARAMETERS = {"femnist": 5_675_584, "celeba": 9_883_776}
TRAINING_CLIENTS = {"femnist": 850, "celeba": 970, "shakespeare": 528, "sent140": 1064}


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks/papers` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module


# --- the files -------------------------------------------------------------------------------


def test_there_is_a_file_for_each_row_of_the_tables() -> None:
    names = {f"{name}-{row}.toml" for name in SETS for row in ROWS}
    assert {path.name for path in FILES.glob("*.toml")} == names


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", SETS)
def test_a_file_names_what_there_is_and_builds_it(name: str, row: str) -> None:
    experiment = Experiment.load(FILES / f"{name}-{row}.toml")
    registry.check_names(experiment)
    data, train = experiment.data, experiment.train
    assert data.name == name
    factory = registry.data_factory(name)
    registry.check_options("data", factory, data.options, registry.DATA_GIVEN, name)
    net = registry.build_model(experiment.model, **FACTS[name])
    if name in PARAMETERS:
        assert net.cost(FULL).params == PARAMETERS[name]
    setting = Setting(
        net=net,
        tiers=(TierSize("all", 1.0, FULL),),
        rule=LocalRule(train.lr, train.momentum),
        stream=Stream(batch=train.batch_size, epochs=train.epochs or 1),
        seed=0,
        rounds=experiment.run.rounds,
    )
    algorithm = registry.build_algorithm(experiment.algorithm, setting)
    assert algorithm.phase(1).program is not None
    assert (experiment.run.rounds, train.epochs) == (200, 3)
    assert experiment.run.cohort == round(0.3 * TRAINING_CLIENTS[name])


# --- the harness -----------------------------------------------------------------------------


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
        **{"macs": np.arange(4), "seconds": np.ones(4)},
    }
    assert one.clients.client.tolist() == [4, 7]
    assert one.clients.acc_local.tolist() == [0.5, 0.9]
    assert one.clients.params.tolist() == [2, 3]


def test_rounds_to_a_target_count_to_the_mean_of_five(
    papers: Callable[[str], Any], cells: Any
) -> None:
    measured, (_, todo) = papers("measured"), cells
    one = measured.Finished(todo[0], todo[0].done())
    one.__dict__["accuracy"] = np.array([0.0, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.1])
    # Means of five: 0.3, 0.38, 0.3, 0.3 after rounds 5, 6, 7 and 8.
    assert [one.rounds_to(t) for t in (0.29, 0.35, 0.5)] == [5, 6, None]
    assert one.smooth.max() == pytest.approx(0.38)


@pytest.mark.parametrize("name", ["measured", "figures", "page", "samples"])
def test_the_examples_in_the_harness_hold(papers: Callable[[str], Any], name: str) -> None:
    done = doctest.testmod(papers(name))
    assert done.attempted > 0 and done.failed == 0


def test_the_page_has_tables_figures_and_what_was_written_by_hand(
    papers: Callable[[str], Any], cells: Any, tmp_path: Path
) -> None:
    adds, measured, page = papers("adds"), papers("measured"), papers("page")
    found = measured.results(*cells)
    section = adds.section(found, tmp_path, "adds")
    assert "| FedAvg | 81.36 |" in section and "| FedPA | – |" in section
    for picture in tmp_path.glob("*.png"):
        assert picture.name in section
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 150_000
    assert len(list(tmp_path.glob("*.png"))) == 3
    path = tmp_path / "adds.md"
    page.write(path, [page.heading("ADDS", "python adds.py"), section], adds.TRIED)
    assert adds.TRIED in path.read_text()
    path.write_text(path.read_text().replace(adds.TRIED, "## What was tried\n\nThree things."))
    page.write(path, ["# Anew", page.missing_text({"toy, fedpa, seed 1": "no time"})], adds.TRIED)
    text = path.read_text()
    assert text.startswith("# Anew") and "Three things." in text and "A toy" not in text
    assert "* toy, fedpa, seed 1: no time" in text


@pytest.mark.parametrize("name", SETS)
def test_the_papers_own_scale_runs_the_files_as_they_are(
    name: str, papers: Callable[[str], Any]
) -> None:
    adds = papers("adds")
    options = adds.parsed(["--scale", "paper", "--data", "here"])
    assert options.jobs == 0, "a run has all that the machine has"
    for cell in adds.table(name, ROWS, options).cells([0], Path("nowhere")):
        file = Experiment.load(FILES / f"{name}-{cell.label}.toml")
        where = {"data.source": f"here/{name}"}
        if name == "sent140":
            where["data.glove"] = "here/sent140/glove.6B.300d.txt"
        assert cell.experiment == file.with_values(where)


def test_settings_are_tried_on_the_training_clients_alone(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    from subfleet.datasets.federation import split_of

    def user(name: str) -> tuple[list, list]:
        rows = [[str(i), "", "", name, f"{name}{i}", "training"] for i in range(10)]
        return rows, [i % 2 for i in range(10)]

    (tmp_path / "sent140").mkdir()
    leaf_json(tmp_path / "sent140", {f"u{i}": user(f"u{i}") for i in range(10)})
    words = ["--data", str(tmp_path), "--tables", "sent140", "--rows", "adds-slim", "--validate"]
    words += ["--try", "adds-slim:arch_lr=0.5,penalty=0.0", "--try", "fedavg:no=1"]
    adds = papers("adds")
    table = adds.table("sent140", ["adds-slim"], adds.parsed(words))
    plain, tried = table.rows
    assert tried.title == "ADDS (slim), arch_lr=0.5, penalty=0.0"
    assert tried.settings == plain.settings | {"algorithm.arch_lr": 0.5, "algorithm.penalty": 0.0}
    cells = table.cells([3], tmp_path)
    options = cells[0].experiment.data
    inner = registry.build_data(options, seed=3)
    whole = papers("samples").sent140(source=options.source, seed=3, vocabulary=2000)
    ids, _ = split_of(whole, 3)
    assert (whole.num_clients, inner.num_clients) == (10, len(ids))
    for part in ("train", "test"):
        own, theirs = (d.block(i, part) for d, i in ((inner, np.arange(len(ids))), (whole, ids)))
        assert all(np.array_equal(a, b) for a, b in zip(own, theirs, strict=True))


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
    assert "--data DATA" in text and str(tmp_path) not in text and str(real_data) not in text
    for figure in ("divergence", "keep", "acc-local", "acc_global", "loss_global"):
        assert f"(adds-femnist-{figure}.png)" in text


def test_a_wrong_word_is_refused(
    papers: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        papers("adds").parsed(["--data", ".", "--rows", "fedagv"])
    assert "--rows: 'fedagv' is none of centralised, fedavg" in capsys.readouterr().err


# --- parts of published sets -----------------------------------------------------------------


def leaf_json(folder: Path, users: dict[str, tuple[list, list]]) -> Path:
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    sizes = [len(y) for _, y in users.values()]
    found = {"users": list(users), "num_samples": sizes, "user_data": data}
    (folder / "data.json").write_text(json.dumps(found))
    return folder


def test_roles_are_thinned_without_sharing_a_character(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    from subfleet.datasets.shakespeare import ALPHABET, tokens_of

    draw = np.random.default_rng(0)

    def role(windows: int) -> tuple[list[str], list[str]]:
        text = "".join(draw.choice(list(ALPHABET[24:76]), windows + 80))
        return [text[i : i + 80] for i in range(windows)], list(text[80:])

    users = {"A": role(300), "B": role(129), "C": role(128)}
    source = str(leaf_json(tmp_path, users))
    data = papers("samples").shakespeare(source=source, clients=0, most=50)
    assert data.num_clients == 2, "C has too few for 50 windows and a gap of 79"
    both = np.arange(2)
    assert data.sizes(both, "train").tolist() == [40, 40]
    assert data.sizes(both, "test").tolist() == [10, 10]
    for client, name in enumerate("AB"):
        place = {tokens_of(x).tobytes(): i for i, x in enumerate(users[name][0])}
        train, test = (
            [place[x.tobytes()] for x in data.block(np.array([client]), part).x]
            for part in ("train", "test")
        )
        assert len(set(train)) == 40 and len(set(test)) == 10
        assert min(test) >= max(train) + 80
    with pytest.raises(InputError, match=r"data.clients = 5: 2 clients have 129 rows or more"):
        papers("samples").shakespeare(source=source, clients=5, most=50)


def test_users_with_few_tweets_are_left_out(papers: Callable[[str], Any], tmp_path: Path) -> None:
    def user(tweets: int) -> tuple[list, list]:
        rows = [[str(i), "", "", "u", f"word{i} good", "training"] for i in range(tweets)]
        return rows, [i % 2 for i in range(tweets)]

    source = str(leaf_json(tmp_path, {"a": user(9), "b": user(10), "c": user(20)}))
    data = papers("samples").sent140(source=source, least=10, vocabulary=100)
    assert (data.num_clients, data.vocabulary, data.num_classes) == (2, 100, 2)
    assert data.sizes(np.arange(2), "all").tolist() == [10, 20]
    assert data.sizes(np.arange(2), "test").tolist() == [2, 4]
