"""`subfleet data`: prepare, describe and plot, and how each says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from subfleet.cli import app
from subfleet.datasets import READERS, SETS, Store
from subfleet.datasets.published import open_set
from subfleet.datasets.store import read_manifest
from subfleet.datasets.writing import verify_store

runner = CliRunner()


def data(*arguments: object) -> Result:
    return runner.invoke(app, ["data", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """What a command with bad input says: one line, and nothing on stdout."""
    done = data(*arguments)
    assert done.exit_code == 2, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def writers(folder: Path, labels: dict[str, list[Any]], name: str = "all_data_0.json") -> Path:
    """A file of LEAF's FEMNIST, in which each writer has images of these labels."""
    folder.mkdir(parents=True, exist_ok=True)
    users = {
        user: {"x": [[i / 255] * 784 for i in range(len(y))], "y": y} for user, y in labels.items()
    }
    (folder / name).write_text(json.dumps({"users": list(users), "user_data": users}))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return writers(tmp_path / "source", {"anna": [0, 1, 1, 61], "bert": [5, 5, 5]})


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    out = tmp_path / "store"
    assert data("prepare", "femnist", "--source", source, "--out", out, "--local").exit_code == 0
    return out


# --- list ----------------------------------------------------------------------------------------


def test_the_list_has_every_set_with_its_own_options_and_what_it_shares() -> None:
    rows = {row["name"]: row for row in json.loads(data("list", "--json").stdout)}
    assert rows.keys() == SETS.keys()
    assert all(rows[name]["and those of"] == "files" for name in READERS)
    assert rows["synthetic_cifar10"]["and those of"] == "dealt"
    assert rows["synthetic_femnist"]["and those of"] == ""
    assert rows["celeba"]["options"] == "size, min_images"
    assert "progress" not in json.dumps(rows) and "seed" not in json.dumps(rows)
    last = data("list").stdout.splitlines()[-2:]
    assert last[0].startswith("dealt: ") and "alpha" in last[0]
    assert last[1].startswith("files: source, ") and "skip_bad" in last[1]


# --- prepare -------------------------------------------------------------------------------------


def test_prepare_writes_a_store_and_says_how_to_read_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "store"
    done = data("prepare", "femnist", "--source", source, "--out", out, "--local")
    assert done.exit_code == 0 and done.stdout == f"{out}\n"
    assert "7 samples of femnist" in done.stderr
    assert f"--set data.name=femnist --set data.source={out}" in done.stderr
    read = Store(out)
    assert read.client_names == ["anna", "bert"]
    assert read.block(np.array([0]), "all").y.tolist() == [0, 1, 1, 61]
    assert [path.name for path in out.parent.iterdir()] == ["store"], "no scratch is left"


def test_the_readers_own_options_are_set_by_name(tmp_path: Path) -> None:
    out, folder = tmp_path / "store", tmp_path / "tweets"
    tweets = {"ann": {"x": [["1", "d", "q", "ann", "so good !", "training"]] * 3, "y": [1, 1, 0]}}
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"users": ["ann"], "user_data": tweets}))
    command = ["prepare", "sent140", "--source", folder, "--out", out, "--local"]
    assert data(*command, "--set", "seq_len=7").exit_code == 0
    assert Store(out).input_shape == (7,)
    out = tmp_path / "other"
    said = refused(*command[:4], "--out", out, "--local", "--set", "seq_length=7")
    assert "data.seq_length: not an option of Sent140; did you mean 'seq_len'?" in said
    assert "data.seq_len = 'x'" in refused(*command[:4], "--out", out, "--set", "seq_len=x")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "rest", "words"),
    [
        ("femnits", [], "unknown data set 'femnits'; did you mean 'femnist'?"),
        ("synthetic_femnist", [], "unknown data set 'synthetic_femnist'"),
        ("femnist", [], "the files of femnist are missing; give their folder with --source DIR"),
        ("femnist", ["--source", "nowhere"], "data.source = 'nowhere' does not exist"),
        ("femnist", ["--download"], "data.download: femnist has no downloader"),
    ],
)
def test_prepare_refuses_what_it_cannot_find(
    name: str, rest: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "store"
    assert words in refused("prepare", name, *rest, "--out", out, "--local")
    assert not out.exists()


def test_without_ray_wrong_files_are_said_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refused("prepare", "femnist", "--source", empty, "--out", tmp_path / "store")
    assert str(empty) in said


def test_prepare_never_writes_over_what_is_there(source: Path, store: Path, tmp_path: Path) -> None:
    command = ["prepare", "femnist", "--source", source, "--local", "--out"]
    assert "is a store already; remove it or give another --out" in refused(*command, store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "is not empty and no store" in refused(*command, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "file").touch()
    assert "is not empty and no store" in refused(*command, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert data(*command, tmp_path / "empty").exit_code == 0


def test_bad_rows_are_refused_or_left_out_counted_and_told_again(tmp_path: Path) -> None:
    bad = {"anna": [0, 1, 62], "bert": [5, 5, 77], "carl": [3, -1], "dora": []}
    source, out = writers(tmp_path / "source", bad), tmp_path / "store"
    command = ["prepare", "femnist", "--source", source, "--out", out, "--local"]
    said = refused(*command)
    assert str(source / "all_data_0.json") in said and "62" in said and "--skip-bad" in said
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["source"]
    done = data(*command, "--skip-bad")
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert sum(line.startswith("left out: 3 x ") for line in lines) == 1, done.stderr
    assert "left out: 1 clients with one sample or none" in lines
    assert "4 samples of femnist" in done.stderr
    assert Store(out).client_names == ["anna", "bert"]
    # Whoever reads the store later hears of it, too.
    found = json.loads(data("describe", out, "--json").stdout)
    told = "\n".join(found["report"]["warnings"])
    assert "left out when prepared: 3 x " in told
    assert "1 clients with one row or none, 1 rows in all, are left out" in told
    assert "note: left out when prepared: 3 x " in data("describe", out).stdout


@pytest.mark.ray
def test_prepare_parses_on_ray(tmp_path: Path, ray_here: Path, real_data: Path) -> None:
    out = tmp_path / "store"
    source = real_data / "femnist"
    done = data("prepare", "femnist", "--source", source, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)]
    assert "13,866 samples of femnist" in done.stderr
    alone = tmp_path / "alone"
    assert data("prepare", "femnist", "--source", source, "--out", alone, "--local").exit_code == 0
    files = [json.loads((path / "manifest.json").read_text())["files"] for path in (out, alone)]
    assert files[0] == files[1]


@pytest.mark.ray
def test_a_fault_on_ray_is_one_message(tmp_path: Path, ray_here: Path) -> None:
    source = writers(tmp_path / "source", {"anna": [0, 99]})
    said = refused("prepare", "femnist", "--source", source, "--out", tmp_path / "store")
    assert "99" in said and str(source) in said


# --- describe ------------------------------------------------------------------------------------


def test_describe_a_store(store: Path) -> None:
    found = json.loads(data("describe", store, "--json").stdout)
    assert (found["name"], found["clients"], found["samples"]) == ("femnist", 2, 7)
    assert (found["mean"], found["sd"]) == (3.5, 0.5)
    assert (found["classes"], found["classes_present"]) == (62, 4)
    assert (found["classes_min"], found["classes_max"]) == (1, 3)
    assert found["parts"] == {"train": 5, "val": 0, "test": 2}
    assert found["report"]["split"] == "seeded" and "verified" not in found
    table = data("describe", store).stdout
    assert "femnist" in table and "quantiles" in table and "samples by part" in table


def test_options_beside_a_store_part_it_otherwise(store: Path) -> None:
    command = ["describe", store, "--json"]
    dealt = ["--set", "partition=iid", "--set", "clients=3", "--set", "val_share=0.2"]
    found = json.loads(data(*command, *dealt).stdout)
    assert found["clients"] == 3 and found["samples"] == 7
    assert found["report"]["partition"]["kind"] == "iid"
    assert "data.splitt: not an option of" in refused(*command, "--set", "splitt=leaf")


def test_describe_verifies_sums(store: Path) -> None:
    assert json.loads(data("describe", store, "--verify", "--json").stdout)["verified"] is True
    said = data("describe", store, "--verify").stdout
    assert "verified" in said
    rows = store / "rows.arrow"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    said = refused("describe", store, "--verify")
    assert f"{rows} has sha256 " in said and "prepare the data again" in said
    rows.write_bytes(content[:-8])
    assert f"{rows} has {len(content) - 8} bytes, not {len(content)}" in refused("describe", store)


def test_verify_is_for_stores() -> None:
    said = refused("describe", "synthetic_femnist", "--verify")
    assert "--verify: synthetic_femnist is no store" in said


def test_describe_a_name_and_an_experiment(tmp_path: Path) -> None:
    options = ["--set", "clients=12", "--set", "alpha=0.1", "--set", "train=600", "--set", "test=9"]
    found = json.loads(data("describe", "synthetic_cifar10", *options, "--json").stdout)
    assert (found["clients"], found["samples"], found["classes"]) == (12, 600, 10)
    assert "9 rows are left out" in "\n".join(found["report"]["warnings"])
    file = tmp_path / "mine.toml"
    file.write_text(
        '[data]\nname = "synthetic_cifar10"\nclients = 12\nalpha = 0.1\ntrain = 600\ntest = 9\n'
        "[run]\nseed = 1\n"
    )
    other = json.loads(data("describe", file, "--json").stdout)
    assert (other["clients"], other["samples"]) == (12, 600)
    assert other["quantiles"] != found["quantiles"], "the experiment's seed deals"
    again = json.loads(data("describe", file, "--set", "clients=6", "--json").stdout)
    assert again["clients"] == 6


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("synthetic_cifar", "unknown data set; did you mean 'synthetic_cifar10'?"),
        ("none.toml", "none.toml: no such file"),
        ("femnist", "data.source is missing: femnist needs its publisher's files"),
        ("{}", "is a folder, but no store (no manifest.json); name the data set instead"),
    ],
)
def test_describe_says_what_it_does_not_know(what: str, words: str, tmp_path: Path) -> None:
    assert words in refused("describe", what.format(tmp_path))


def test_a_name_is_a_name_though_a_folder_has_it_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))
    source.rename(tmp_path / "femnist")
    found = json.loads(data("describe", "femnist", "--set", "source=femnist", "--json").stdout)
    assert found["samples"] == 7


def test_what_describe_reads_without_a_store_is_kept_in_the_cache(
    source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = ["--set", f"source={source}", "--set", f"cache={cache}"]
    assert data("describe", "femnist", *options).exit_code == 0
    (kept,) = cache.iterdir()
    assert kept.name.startswith("femnist-")
    opened = open_set(READERS["femnist"](), str(source), cache=str(cache))
    assert isinstance(opened, Store) and opened.path == kept


# --- plot ----------------------------------------------------------------------------------------


def test_plot_draws_a_store_and_a_twin(store: Path, tmp_path: Path) -> None:
    for what, options in ((store, []), ("synthetic_femnist", ["--set", "clients=30"])):
        out = tmp_path / "pictures" / "a.png"
        done = data("plot", what, *options, "-o", out)
        assert done.exit_code == 0 and done.stdout == f"{out}\n"
        assert out.read_bytes()[:4] == b"\x89PNG"
        out.unlink()


def test_plot_refuses_what_it_cannot_draw_or_write(store: Path, tmp_path: Path) -> None:
    said = refused("plot", store, "-o", tmp_path / "a.png", "--clients", "0")
    assert "--clients 0 is too few" in said
    (tmp_path / "file").touch()
    said = refused("plot", store, "-o", tmp_path / "file" / "a.png")
    assert "cannot be written" in said and "-o partition.png" in said


@pytest.mark.parametrize("command", ["list", "prepare", "describe", "plot"])
def test_help_has_examples(command: str) -> None:
    shown = data(command, "--help")
    assert shown.exit_code == 0 and f"subfleet data {command}" in shown.stdout


def test_what_takes_seconds_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subfleet.dashboards.console.SLOW_S", 0.0)
    made = data("prepare", "femnist", "--source", source, "--out", tmp_path / "s", "--local")
    assert "looking at the files ... 0s" in made.stderr
    drawn = data("plot", tmp_path / "s", "-o", tmp_path / "p.png")
    assert "drawing ... 0s" in drawn.stderr


def test_the_files_of_a_store_are_checked_one_by_one(store: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    verify_store(store, lambda *progress: heard.append(progress))
    number = len(read_manifest(store)["files"])
    assert number and heard == [("files checked", n, number) for n in range(number)]
