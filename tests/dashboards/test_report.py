"""The page of a report: its numbers are those of the runs, and whatever a run is, it takes part."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
from reported import Page, made
from typer.testing import CliRunner

import subfleet
from subfleet.cli import app
from subfleet.core.errors import InputError
from subfleet.dashboards.report import report
from subfleet.platform.runfolder import RunFolder

TARGET = 0.02


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subfleet.Run]:
    """Two seeds of FedPA, one of FedAvg."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "fedpa-s0": made(folder / "fedpa-s0"),
        "fedpa-s1": made(folder / "fedpa-s1", run__seed=1, run__max_seconds=600),
        "fedavg": made(folder / "fedavg", algorithm__name="fedavg"),
    }


@pytest.fixture(scope="module")
def page(runs: dict[str, subfleet.Run], tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return Page(report([run.path for run in runs.values()], out, target=TARGET).read_text())


@pytest.fixture
def copied(runs: dict[str, subfleet.Run], tmp_path: Path) -> Path:
    """A run folder that a test may damage."""
    return Path(shutil.copytree(runs["fedpa-s0"].path, tmp_path / "copied"))


def drawn(*paths: Path, **options: object) -> Page:
    out = paths[0].parent / "report.html"
    return Page(report(paths, out, **options).read_text())


def lines(run: subfleet.Run) -> list[dict]:
    text = (run.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def last(run: subfleet.Run, key: str) -> float:
    return next(r[key] for r in reversed(lines(run)) if r.get(key) is not None)


def summed(run: subfleet.Run, *keys: str) -> float:
    return sum(record[key] for record in lines(run) for key in keys)


def of_round(run: subfleet.Run, round: int) -> list[dict]:
    """Rows of `clients/`, by client."""
    rows = [row for row in run.clients().to_pylist() if row["round"] == round]
    return sorted(rows, key=lambda row: row["client"])


# --- numbers ---------------------------------------------------------------------------------


def test_results_are_means_over_seeds_of_the_metrics(page, runs) -> None:
    fedpa, fedavg = page.data["summary"]
    assert (fedpa["group"], fedpa["runs"], fedavg["group"], fedavg["runs"]) == (
        *("fedpa", "2", "fedavg", "1"),
    )
    both = [runs["fedpa-s0"], runs["fedpa-s1"]]
    wanted = {
        "global accuracy": [last(run, "acc_global") for run in both],
        "local accuracy": [last(run, "acc_local") for run in both],
        "worst tenth": [last(run, "acc_local_worst10") for run in both],
        "bytes": [summed(run, "bytes_up", "bytes_down") for run in both],
        "FLOPs": [summed(run, "flops") for run in both],
        "energy, J": [summed(run, "energy_j") for run in both],
        "simulated time": [last(run, "sim_time") for run in both],
        "wall-clock time": [sum(r["seconds"]["total"] for r in lines(run)) for run in both],
    }
    for heading, values in wanted.items():
        assert float(fedpa[heading]) == pytest.approx(statistics.mean(values)), heading
        assert float(fedpa[f"{heading} sd"]) == pytest.approx(statistics.stdev(values)), heading
    assert float(fedavg["bytes"]) == summed(runs["fedavg"], "bytes_up", "bytes_down")
    assert fedavg["bytes sd"] == ""  # of one run there is none


def test_cells_show_the_numbers_behind_them(page) -> None:
    shown, data = page.rows("summary")[0], page.data["summary"][0]
    mean, sd = (float(data[key]) for key in ("global accuracy", "global accuracy sd"))
    assert shown["global accuracy"] == f"{mean:.3f} ± {sd:.3f}"
    assert shown["rounds"] == "6"


def test_curves_are_those_of_the_metrics(page, runs) -> None:
    both = [runs["fedpa-s0"], runs["fedpa-s1"]]
    points = [row for row in page.data["acc_global-bytes"] if row["group"] == "fedpa"]
    assert len(points) == 3  # rounds 2, 4 and 6
    for point, round in zip(points, (2, 4, 6), strict=True):
        accuracy = [lines(run)[round - 1]["acc_global"] for run in both]
        spent = [sum(r["bytes_up"] + r["bytes_down"] for r in lines(run)[:round]) for run in both]
        assert float(point["acc_global"]) == pytest.approx(statistics.mean(accuracy))
        assert float(point["sd"]) == pytest.approx(statistics.stdev(accuracy))
        assert float(point["bytes"]) == pytest.approx(statistics.mean(spent))
    times = [float(row["sim_time"]) for row in page.data["acc_global-sim_time"]]
    assert times[-1] == pytest.approx(last(runs["fedavg"], "sim_time"))
    assert len(page.data["loss_train-rounds"]) == 12


def test_costs_to_a_target_are_those_of_the_first_round_there(page, runs) -> None:
    for row, names in zip(
        page.data["costs-to-target"], (("fedpa-s0", "fedpa-s1"), ("fedavg",)), strict=True
    ):
        firsts = [
            next((r["round"] for r in lines(runs[n]) if (r.get("acc_global") or 0) >= TARGET), None)
            for n in names
        ]
        there = [(runs[n], first) for n, first in zip(names, firsts, strict=True) if first]
        assert (int(row["reached"]), int(row["of"])) == (len(there), len(names))
        assert there or row["group"] == "fedavg"
        if there:
            assert float(row["rounds"]) == statistics.mean(first for _, first in there)
            spent = [sum(r["flops"] for r in lines(run)[:first]) for run, first in there]
            assert float(row["flops"]) == pytest.approx(statistics.mean(spent))


def test_fairness_is_of_the_clients_of_the_last_tested_round(page, runs) -> None:
    groups = {"fedpa": ["fedpa-s0", "fedpa-s1"], "fedavg": ["fedavg"]}
    for row in page.data["fairness"]:
        each = [
            [
                client["acc_local"]
                for client in of_round(runs[name], 6)
                if client["acc_local"] is not None
                and row["tier"] in ("all clients", client["tier"])
            ]
            for name in groups[row["group"]]
        ]
        assert row["round"] == "6"
        for key, of in (
            ("clients", len),
            ("mean", statistics.mean),
            ("sd", statistics.stdev),
            ("worst10", min),  # of fewer than 20
        ):
            found = [of(accuracies) for accuracies in each]
            assert float(row[key]) == pytest.approx(statistics.mean(found)), key
            if len(found) > 1:
                assert float(row[f"{key} sd"]) == pytest.approx(statistics.stdev(found)), key
            else:
                assert row[f"{key} sd"] == ""  # of one run there is none
    rows = {(row["group"], row["tier"]): row for row in page.data["fairness"]}
    assert set(rows) == {(g, t) for g in groups for t in ("all clients", "high", "low")}
    of_all = rows["fedavg", "all clients"]
    assert float(of_all["mean"]) == pytest.approx(last(runs["fedavg"], "acc_local"))
    assert float(of_all["worst10"]) == pytest.approx(last(runs["fedavg"], "acc_local_worst10"))


def test_pictures_have_the_data_that_they_draw(page, runs) -> None:
    run = runs["fedpa-s0"]
    late = {r["round"]: r["late"] + r["dropped"] for r in lines(run)}
    worst = max(late, key=lambda round: (late[round], round))
    bars = page.data["timeline-fedpa"]
    rows = of_round(run, worst)
    assert sorted(float(b["sim_seconds"]) for b in bars) == sorted(r["sim_seconds"] for r in rows)
    assert sum(bar["status"] != "ok" for bar in bars) == late[worst] > 0
    groups = json.loads((run.path / "network.json").read_text())["groups"]
    units = sorted(page.data["units-fedpa"], key=lambda row: int(row["client"]))
    assert [" ".join(row[group] for group in groups) for row in units] == [
        row["units"] for row in of_round(run, 6)
    ]
    keep = page.data["coverage-fedpa"]
    assert [float(row["keep conv1"]) for row in keep] == [r["keep"]["conv1"] for r in lines(run)]
    assert [int(row["least fc1"]) for row in keep] == [r["coverage"]["fc1"] for r in lines(run)]
    (labels,) = [name for name in page.data if name.startswith("labels-")]
    assert len(page.data[labels]) == 30
    tiers = {r["tier"]: r for r in page.data["tiers"] if r["group"] == "fedavg"}
    assert float(tiers["low"]["accuracy"]) == last(runs["fedavg"], "acc_tier")["low"]
    train = [r for r in page.data["seconds"] if (r["group"], r["phase"]) == ("fedavg", "train")]
    mean = statistics.mean(r["seconds"]["train"] for r in lines(runs["fedavg"]))
    assert float(train[0]["seconds"]) == pytest.approx(mean)


def test_everything_is_in_the_one_file(page) -> None:
    assert "script" not in page.tags and "link" in page.tags  # the empty icon alone
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.html)
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert len(page.alts) == page.tags.count("img") and all(len(alt) > 40 for alt in page.alts)
    anchors = {address[1:] for address in addresses if address.startswith("#")}
    assert anchors <= set(re.findall(r'id="([^"]*)"', page.html))


def test_seeds_and_stops_make_no_groups_but_settings_do(page) -> None:
    assert {row["run"]: row["group"] for row in page.rows("runs")} == {
        "fedpa-s0": "fedpa",
        "fedpa-s1": "fedpa",
        "fedavg": "fedavg",
    }
    assert page.rows("settings") == [{"": "algorithm.name", "fedpa": "fedpa", "fedavg": "fedavg"}]


# --- odd runs ----------------------------------------------------------------------------------


def test_a_run_that_was_cut_short_takes_part(copied: Path, runs) -> None:
    (copied / "summary.json").unlink()
    metrics = (copied / "metrics.jsonl").read_bytes()
    (copied / "metrics.jsonl").write_bytes(metrics[: len(metrics) - 40])
    page = drawn(copied, runs["fedavg"].path)
    row = next(row for row in page.rows("runs") if row["run"] == "copied")
    assert (row["state"], row["rounds"]) == ("cut short", "5 of 6")
    assert (
        "copied: crashed, was interrupted, or goes on on another machine: 5 of 6 rounds."
        in page.text
    )
    assert (
        "copied: metrics.jsonl: line 6 cannot be read and is left out, of sums, too." in page.text
    )
    assert page.data["summary"][0]["rounds"] == "5.0"


def test_damaged_lines_are_counted(copied: Path) -> None:
    text = (copied / "metrics.jsonl").read_text().splitlines()
    text[1], text[3] = "{", '"round"'
    (copied / "metrics.jsonl").write_text("\n".join(text) + "\n")
    page = drawn(copied)
    assert "metrics.jsonl: 2 lines cannot be read and are left out, of sums, too" in page.text
    assert len(page.data["loss_train-rounds"]) == 4


def test_a_run_that_goes_on_is_marked(copied: Path) -> None:
    handle = RunFolder.find(copied).lock()
    try:
        page = drawn(copied)
    finally:
        os.close(handle)
    assert page.rows("runs")[0]["state"] == "running"
    assert "copied: still running: 6 of 6 rounds." in page.text


def test_a_run_before_its_first_round_is_marked(copied: Path) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "clients")
    page = drawn(copied)
    assert page.rows("runs")[0]["rounds"] == "0 of 6"
    assert "copied: has no metrics.jsonl yet." in page.text and "acc_global-rounds" not in page.data


def test_a_run_of_an_older_version_takes_part(copied: Path, runs) -> None:
    facts = json.loads((copied / "environment.json").read_text())
    facts["packages"]["subfleet"] = "0.0.1"
    (copied / "environment.json").write_text(json.dumps(facts))
    for name in ("network.json", "labels.parquet", "tiers.json", "engine.json"):
        (copied / name).unlink()
    older = [
        json.dumps({k: r[k] for k in ("round", "loss_train", "acc_global")})
        for r in lines(runs["fedpa-s0"])
        if "acc_global" in r
    ]
    (copied / "metrics.jsonl").write_text("\n".join(older) + "\n")
    page = drawn(copied, runs["fedpa-s1"].path)
    assert "copied: written by subfleet 0.0.1." in page.text
    versions = {row[""]: row for row in page.rows("environment")}
    assert versions["packages.subfleet"]["copied"] == "0.0.1"
    assert len(page.data["acc_global-rounds"]) == 3  # both runs' rounds 2, 4 and 6
    assert {row["runs"] for row in page.data["acc_global-rounds"]} == {"2"}
    assert {row["runs"] for row in page.data["acc_global-flops"]} == {"1"}
    assert "copied: has no local accuracy, global loss, which other runs have." in page.text


def test_a_run_with_other_metrics_takes_part(tmp_path: Path, runs) -> None:
    bare = made(tmp_path / "bare", run__eval_every=0, run__rounds=2, run__cohort=4)
    text = (bare.path / "metrics.jsonl").read_text()
    kept = [{"round": r["round"], "novelty": 0.5} for r in map(json.loads, text.splitlines())]
    (bare.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    page = drawn(bare.path, runs["fedavg"].path)
    labels = ["fedpa, rounds=2, cohort=4, eval_every=0", "fedavg, rounds=6, cohort=8, eval_every=2"]
    assert [row["group"] for row in page.data["summary"]] == labels
    assert {row["group"] for row in page.data["acc_global-rounds"]} == {labels[1]}
    words = "bare: has no global accuracy, local accuracy, training loss, global loss, which other"
    assert words in page.text
    novel = drawn(bare.path, runs["fedavg"].path, metric="novelty")
    assert [row["novelty"] for row in novel.data["novelty-rounds"]] == ["0.5", "0.5"]
    assert "costs-to-target" not in novel.data  # whether more is better is not known


def test_different_data_are_flagged(tmp_path: Path, runs) -> None:
    other = made(tmp_path / "other", data__clients=20, run__rounds=1)
    page = drawn(other.path, runs["fedavg"].path)
    assert "These runs train on different data (synthetic_femnist, 20 clients; " in page.text


def test_data_that_are_parted_otherwise_are_flagged(copied: Path, runs) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(
        config.replace("mean_samples = 20.0", "mean_samples = 40.0")
    )
    page = drawn(copied, runs["fedavg"].path)
    assert (
        "30 clients, mean_samples=40.0; synthetic_femnist, 30 clients, mean_samples=20" in page.text
    )


def test_settings_of_tiers_are_told_apart(copied: Path, runs) -> None:
    config = (copied / "config.toml").read_text()
    assert config.count("width = 0.5") == 1
    (copied / "config.toml").write_text(config.replace("width = 0.5", "width = 0.25"))
    page = drawn(copied, runs["fedpa-s0"].path)
    labels = ["low.width=0.25", "low.width=0.5"]
    assert page.rows("settings") == [
        {"": "fleet.tiers.low.width", labels[0]: "0.25", labels[1]: "0.5"}
    ]


def test_a_run_that_comes_twice_counts_once_and_a_copy_is_flagged(copied: Path, runs) -> None:
    page = drawn(copied, copied / ".." / "copied", runs["fedpa-s0"].path)
    assert page.data["summary"][0]["runs"] == "2"
    assert "fedpa: seed 0 comes 2 times (copied, fedpa-s0)." in page.text


def test_files_that_are_cut_are_left_out_and_named(copied: Path, runs) -> None:
    (part,) = (copied / "clients").glob("part-*.parquet")
    for path in (part, copied / "labels.parquet"):
        path.write_bytes(path.read_bytes()[:-100])
    page = drawn(copied, runs["fedavg"].path)
    assert f"copied: clients/{part.name} cannot be read and is left out." in page.text
    assert "copied: labels.parquet cannot be read and is left out." in page.text
    assert {row["group"] for row in page.data["fairness"]} == {"fedavg"}


def test_a_run_cut_short_lowers_no_target_and_is_marked(copied: Path, runs) -> None:
    (copied / "summary.json").unlink()
    text = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(text[:3]))
    both = copied, runs["fedpa-s0"].path
    best = max(r["acc_global"] for r in lines(runs["fedpa-s0"]) if "acc_global" in r)
    page = drawn(*both)
    assert f"Costs to {int(best * 100) / 100:g}" in page.text
    assert page.rows("summary")[0]["runs"] == "2 (1 unfinished)"
    assert [row["runs"] for row in page.data["acc_global-rounds"]] == ["2", "1", "1"]
    assert [row["runs"] for row in page.data["acc_global-bytes"]] == ["2"]  # no jump back in x


def test_cells_are_no_formulas(tmp_path: Path, runs) -> None:
    path = shutil.copytree(runs["fedavg"].path, tmp_path / "=cmd()")
    assert drawn(path).data["runs"][0]["run"] == "'=cmd()"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("environment.json", '{"packages": null}'),
        ("summary.json", '{"rounds": null}'),
        ("summary.json", "[]"),
        ("config.toml", "run = 3"),
        ("metrics.jsonl", '{"round": "2"}\n'),
        ("network.json", "[]"),
    ],
)
def test_odd_files_are_no_reason_to_fail(name: str, text: str, copied: Path, runs) -> None:
    (copied / name).write_text(text)
    page = drawn(copied, runs["fedavg"].path)
    assert {row["run"] for row in page.rows("runs")} == {"copied", "fedavg"}


def test_names_with_html_in_them_are_escaped(tmp_path: Path, runs) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)> & $x_1$"
    shutil.copytree(runs["fedpa-s0"].path, evil)
    page = drawn(evil, runs["fedavg"].path, title="<script>alert(2)</script>")
    assert "<script>alert(2)</script>" in page.text and evil.name in page.text
    assert "script" not in page.tags and "<img src=x" not in page.html
    assert len(page.alts) == page.tags.count("img")


def test_a_damaged_experiment_is_a_group_of_its_own(copied: Path, runs) -> None:
    (copied / "config.toml").write_text("[run\n")
    page = drawn(copied, runs["fedpa-s0"].path)
    assert "copied: config.toml cannot be read" in page.text
    assert {row["group"] for row in page.data["summary"]} == {"copied", "fedpa-s0"}


# --- the command -------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return found.exit_code, found.output


def test_the_command_writes_the_page(runs, tmp_path: Path) -> None:
    folder = next(iter(runs.values())).path.parent
    status, said = command(folder, "-o", tmp_path / "all.html", "--title", "All of them")
    assert status == 0 and said.splitlines()[-1] == str(tmp_path / "all.html")
    page = Page((tmp_path / "all.html").read_text())
    assert len(page.rows("runs")) == 3 and "All of them" in page.text


def test_bad_input_ends_with_status_2(runs, tmp_path: Path) -> None:
    run, out = runs["fedavg"].path, tmp_path / "r.html"
    for arguments, words in (
        ([tmp_path], f"{tmp_path}: holds no run (no config.toml"),
        ([tmp_path / "none"], "is no folder; give a run folder"),
        ([run, "-o", tmp_path / "r.pdf"], "does not end in .html"),
        ([run, "-o", tmp_path / "none" / "r.html"], "is no folder; make it"),
        ([run, "--target", "60", "-o", out], "--target 60: is not between 0 and 1"),
        ([run, "--metric", "acc_globl", "-o", out], "known: acc_global, acc_local"),
    ):
        status, said = command(*arguments)
        assert status == 2 and words in said, said


def test_a_page_that_cannot_be_written_is_refused(runs, tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        report([runs["fedavg"].path], tmp_path / "r.html")


# --- in a browser --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_in_a_browser(width: int, runs, tmp_path: Path, browser) -> None:
    path = report([run.path for run in runs.values()], tmp_path / "r.html")
    opened = browser.open_page(path.as_uri(), width=width)
    assert opened.errors == [] and opened.overflow() == 0
    assert opened.requests[0] == path.as_uri()
    assert all(address.startswith("data:") for address in opened.requests[1:])
    drawn = opened.page.evaluate(
        "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 0)"
    )
    assert len(drawn) > 15 and all(drawn)
    assert min(opened.ink("figure img")) > 0.01
    right = opened.page.evaluate(
        "Math.max(...[...document.images].map(i => i.getBoundingClientRect().right))"
    )
    assert right <= width
