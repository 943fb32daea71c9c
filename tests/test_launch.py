"""Whole runs in this process: what they leave behind, and what bad input ends with."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import subfleet
from subfleet.algorithms import FedPA
from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.launch import assemble, launch

TIERS = [
    {"name": "high", "share": 0.5, "width": 1.0},
    {"name": "low", "share": 0.5, "width": 0.5},
]


def tables(**changes: Any) -> dict[str, Any]:
    """A tiny experiment; `changes` are dotted keys with __ for the dot."""
    experiment = Experiment(
        data={"name": "synthetic_femnist", "clients": 20, "mean_samples": 12.0},
        model={"name": "small_cnn", "channels": [2, 4], "hidden": 8},
        fleet={"tiers": TIERS},
        algorithm={"name": "fedpa"},
        run={"rounds": 4, "cohort": 4, "eval_every": 2, "checkpoint_every": 2},
    )
    return experiment.with_values({k.replace("__", "."): v for k, v in changes.items()}).to_tables()


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "experiment.toml"
    path.write_text(Experiment(**tables(**changes)).to_toml())
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> subfleet.Run:
    folder = tmp_path_factory.mktemp("finished")
    return launch(Experiment(**tables()), out=folder / "run", local=True)


def test_a_run_folder_holds_everything(finished: subfleet.Run) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        "config.toml",
        "environment.json",
        "engine.json",
        "metrics.jsonl",
        "clients",
        "summary.json",
        "final.safetensors",
        "checkpoints",
        "tb",
    }
    assert [record["round"] for record in finished.metrics] == [1, 2, 3, 4]
    assert finished.clients().num_rows == 16
    assert set(finished.params()) == {f"{n}.{p}" for n in LAYERS for p in ("weight", "bias")}
    assert finished.summary["finished"] and finished.summary["rounds"] == 4


LAYERS = ("conv1", "conv2", "fc1", "fc2")


def test_a_run_folder_describes_its_network_and_its_data(finished: subfleet.Run) -> None:
    job = assemble(Experiment.load(finished.path / "config.toml"))
    groups = json.loads((finished.path / "network.json").read_text())["groups"]
    assert list(groups.items()) == list(job.work.net.space.groups.items())
    assert {len(units.split()) for units in finished.clients()["units"].to_pylist()} == {
        len(groups)
    }
    labels = pq.read_table(finished.path / "labels.parquet")
    ids = labels["client"].to_numpy()
    assert ids.tolist() == list(range(20))
    assert labels["counts"].to_pylist() == job.federation.label_counts(ids).tolist()
    names = [tier["name"] for tier in TIERS]
    assert labels["tier"].to_pylist() == [names[tier] for tier in job.fleet.tier_of[ids]]


def test_the_config_in_the_folder_gives_the_same_run_again(
    finished: subfleet.Run, tmp_path: Path
) -> None:
    again = launch(Experiment.load(finished.path / "config.toml"), out=tmp_path / "b", local=True)
    assert again.summary["params_sha256"] == finished.summary["params_sha256"]


def test_a_longer_run_goes_on_from_a_shorter_one(finished: subfleet.Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    longer = Experiment(**tables(run__rounds=6))
    resumed = launch(longer, out=tmp_path / "run", resume=True, local=True)
    fresh = launch(longer, out=tmp_path / "fresh", local=True)
    assert [record["round"] for record in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert resumed.clients().column("round").to_pylist() == [r for r in range(1, 7) for _ in "1234"]
    assert resumed.summary["params_sha256"] == fresh.summary["params_sha256"]


def test_a_given_engine_record_is_replayed(finished: subfleet.Run, tmp_path: Path) -> None:
    record = json.loads((finished.path / "engine.json").read_text())
    for choice in record["choices"]:
        choice["memory_format"] = "contiguous"
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(record))
    other = launch(Experiment(**tables()), out=tmp_path / "run", local=True, engine_record=path)
    written = json.loads((other.path / "engine.json").read_text())
    assert written == record


class Cut:
    """An observer that ends a run after a round, before any checkpoint."""

    def on_start(self, info: dict) -> None:
        pass

    def on_round(self, record: dict, coverage: dict) -> None:
        if record["round"] == 2:
            raise RunFailed("cut")

    def on_end(self, summary: dict) -> None:
        pass


def test_a_resume_replays_the_record_even_without_a_checkpoint(tmp_path: Path) -> None:
    experiment = Experiment(**tables(model__hidden=6, run__checkpoint_every=0))
    plain = launch(experiment, out=tmp_path / "plain", local=True)
    record = json.loads((plain.path / "engine.json").read_text())
    for choice in record["choices"]:
        choice |= {"way": "vmap", "side_by_side": 2, "memory_format": "contiguous"}
    (tmp_path / "engine.json").write_text(json.dumps(record))
    given: dict[str, Any] = {"local": True, "engine_record": tmp_path / "engine.json"}
    whole = launch(experiment, out=tmp_path / "whole", **given)
    assert whole.summary["params_sha256"] != plain.summary["params_sha256"]
    with pytest.raises(RunFailed, match="cut"):
        launch(experiment, out=tmp_path / "cut", observers=[Cut()], **given)
    resumed = launch(experiment, out=tmp_path / "cut", resume=True, local=True)
    assert resumed.summary["params_sha256"] == whole.summary["params_sha256"]
    assert json.loads((resumed.path / "engine.json").read_text()) == record
    (plain.path / "summary.json").unlink()
    with pytest.raises(InputError, match="--engine-record differs"):
        launch(experiment, out=plain.path, resume=True, **given)


@dataclass(frozen=True)
class Stops(FedPA):
    """FedPA; a run of it is interrupted while it plans the third round."""

    def plan(self, state: Any, cohort: Any, round: int) -> Any:
        if round == 3:
            raise KeyboardInterrupt
        return super().plan(state, cohort, round)


def test_an_interrupt_saves_the_last_finished_round(tmp_path: Path) -> None:
    name = f"{Stops.__module__}:Stops"
    stops = Experiment(**tables(algorithm__name=name, run__checkpoint_every=0))
    with pytest.raises(KeyboardInterrupt):
        launch(stops, out=tmp_path / "run", local=True)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "round-000002"
    assert subfleet.Run(tmp_path / "run", {}).clients().num_rows == 8
    short = launch(
        stops.with_values({"run.rounds": 2}), out=tmp_path / "run", resume=True, local=True
    )
    fresh = launch(Experiment(**tables(run__rounds=2)), out=tmp_path / "fresh", local=True)
    assert short.summary["params_sha256"] == fresh.summary["params_sha256"]


def test_the_target_accuracy_ends_a_run(tmp_path: Path) -> None:
    run = launch(
        Experiment(**tables(run__target_accuracy=1e-6, run__rounds=50)),
        out=tmp_path / "run",
        local=True,
    )
    assert run.summary["finished"] and run.summary["rounds"] < 50


def test_max_seconds_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    experiment = Experiment(**tables(run__max_seconds=1e-3))
    cut = launch(experiment, out=tmp_path / "run", local=True)
    assert not cut.summary["finished"] and cut.summary["rounds"] == 1
    whole = launch(Experiment(**tables()), out=tmp_path / "run", resume=True, local=True)
    assert whole.summary["finished"] and whole.summary["rounds"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"name": "logreg"}},
            "the width of tier low has no effect: logreg has no units that can be left out",
        ),
        ({"run__eval_clients": 9}, "run.eval_clients = 9, and 4 clients are held out"),
        (
            {"algorithm": {"name": "stc"}, "train__momentum": 0.9},
            "train.momentum = 0.9 has no effect: stc trains without; a train.lr that was chosen "
            "beside it wants to be 10 times as large",
        ),
        (
            {"algorithm": {"name": "fedprox", "stragglers": 0.5}, "train__epochs": 1},
            "algorithm.stragglers = 0.5 has no effect where train.epochs = 1",
        ),
        (
            {"algorithm": {"name": "centralised"}},
            "run.cohort = 4 has no effect: centralised trains",
        ),
        (
            {"algorithm": {"name": "adds"}, "run__engine": "traced"},
            'run.engine = "traced" has no effect: clients of adds on small_cnn can be computed by '
            "loop, vmap alone",
        ),
        (
            {"algorithm": {"name": "pfedme"}, "run__compile": True},
            "run.compile = true has no effect: pfedme on small_cnn takes its gradients itself",
        ),
    ],
)
def test_settings_without_effect_are_pointed_out(
    changes: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "subfleet"):
        launch(Experiment(**tables(run__rounds=1, **changes)), out=tmp_path / "run", local=True)
    assert [record.message for record in caplog.records if words in record.message]


def test_settings_with_an_effect_are_not_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straggling = {"name": "fedprox", "stragglers": 0.5}
    experiment = tables(run__rounds=1, algorithm=straggling, train__epochs=2, train__momentum=0.5)
    with caplog.at_level(logging.WARNING, "subfleet"):
        launch(Experiment(**experiment), out=tmp_path / "run", local=True)
    assert not caplog.records


def test_a_resume_with_nothing_left_to_do_says_so(
    finished: subfleet.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    with caplog.at_level(logging.WARNING, "subfleet"):
        again = launch(
            Experiment(**tables(run__rounds=2)), out=tmp_path / "run", resume=True, local=True
        )
    assert again.summary["rounds"] == 4
    (record,) = caplog.records
    assert record.message.startswith("run.rounds = 2, and 4 rounds are done already: nothing is")


# --- bad input: one clear message, the right status, nothing half-written ------------------------

BAD = {
    "unknown data set": ({"data__name": "femnits"}, "did you mean 'femnist'"),
    "unknown model": ({"model__name": "smal_cnn"}, "did you mean 'small_cnn'"),
    "unknown algorithm": ({"algorithm__name": "fedpq"}, "did you mean 'fedpa'"),
    "unknown option": ({"algorithm__normalizer": "all"}, "did you mean 'normaliser'"),
    "no such data": (
        {"data": {"name": "femnist", "source": "/nowhere/femnist"}},
        "/nowhere/femnist",
    ),
    "a budget that no width meets": (
        {"fleet__tiers": [{"name": "tiny", "share": 1.0, "flops": 10}]},
        "tier 'tiny': budget flops=10 is below the smallest sub-network",
    ),
    "a cohort larger than the population": (
        {"run__cohort": 17},
        "run.cohort=17 is more than the 16 clients that train",
    ),
    "a width out of bounds": (
        {"algorithm": {"name": "fedavg", "width": 1.5}},
        "algorithm.width=1.5 is outside (0, 1]",
    ),
    "a GPU that is not there": ({"run__device": "cuda"}, 'use "auto" or "cpu"'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_status_2(case: str, tmp_path: Path) -> None:
    changes, words = BAD[case]
    if case == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = write(tmp_path, **changes)
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused(finished: subfleet.Run, tmp_path: Path) -> None:
    path = write(tmp_path)
    before = sorted(p.name for p in finished.path.rglob("*"))
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(finished.path)])
    assert done.exit_code == 2 and "holds another run" in done.stderr
    assert sorted(p.name for p in finished.path.rglob("*")) == before


def test_a_run_of_another_experiment_is_not_resumed(finished: subfleet.Run, tmp_path: Path) -> None:
    path = write(tmp_path, train__lr=0.25)
    arguments = ["run", str(path), "--local", "--resume", "--out", str(finished.path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "train.lr = 0.1 there, 0.25 here" in done.stderr.replace("\n", " ")


def test_a_checkpoint_from_another_experiment_is_refused(
    finished: subfleet.Run, tmp_path: Path
) -> None:
    other = launch(Experiment(**tables(train__lr=0.2)), out=tmp_path / "other", local=True)
    shutil.rmtree(other.path / "checkpoints")
    shutil.copytree(finished.path / "checkpoints", other.path / "checkpoints")
    with pytest.raises(InputError, match="is of another experiment"):
        launch(Experiment(**tables(train__lr=0.2)), out=other.path, resume=True, local=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    finished: subfleet.Run, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "tensors.safetensors").write_bytes(b"cut")
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    facts["packages"]["numpy"] = "1.0"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(facts))
    arguments = ["run", str(write(tmp_path)), "--local", "--resume", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert f"warning: checkpoint {newest} is damaged" in done.stderr
    assert "warning: resumed on another machine or other versions" in done.stderr
    assert "(numpy: 1.0 then, " in done.stderr
    assert done.stderr.count("is damaged") == 1
    run = subfleet.Run(tmp_path / "run", json.loads((tmp_path / "run/summary.json").read_text()))
    assert run.summary["params_sha256"] == finished.summary["params_sha256"]
    assert [record["round"] for record in run.metrics] == [1, 2, 3, 4]


OWN = """
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from subfleet.algorithms import FedAvg
from subfleet.datasets import InMemory

def data(seed=0):
    shift = float(Path("{folder}/shift").read_text())
    draw = np.random.default_rng(0)
    x = draw.standard_normal((60, 1, 8, 8)).astype(np.float32) + shift
    return InMemory(x, np.arange(60) % 3, np.arange(0, 61, 6), name="own")

@dataclass(frozen=True)
class Breaks(FedAvg):
    def server_step(self, state, plan, reduced):
        raise ValueError("nothing of the kind")
"""


@pytest.fixture
def users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own module; its data follow from a file."""
    (tmp_path / "shift").write_text("0")
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN.replace("{folder}", str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / f"{name}.py"


def test_a_resume_on_other_data_is_refused(users_own: Path, tmp_path: Path) -> None:
    path = write(tmp_path, data={"name": f"{users_own.stem}:data"}, model={"name": "small_cnn"})
    arguments = ["run", str(path), "--local", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    arguments += ["--resume", "--set", "run.rounds=5"]
    (tmp_path / "shift").write_text("1")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "holds a run on other data (fingerprint " in done.stderr
    (tmp_path / "shift").write_text("0")
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_a_checkpoint_of_other_data_is_refused(users_own: Path, tmp_path: Path) -> None:
    own = {"data": {"name": f"{users_own.stem}:data"}, "model": {"name": "small_cnn"}}
    for shift in ("0", "1"):
        (tmp_path / "shift").write_text(shift)
        launch(Experiment(**tables(**own)), out=tmp_path / f"run{shift}", local=True)
    shutil.rmtree(tmp_path / "run1" / "checkpoints")
    shutil.copytree(tmp_path / "run0" / "checkpoints", tmp_path / "run1" / "checkpoints")
    with pytest.raises(InputError, match="is of another experiment"):
        launch(Experiment(**tables(**own)), out=tmp_path / "run1", resume=True, local=True)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_run_that_fails_before_its_first_round_is_over_leaves_nothing(
    there_before: bool, users_own: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, algorithm={"name": f"{users_own.stem}:Breaks"})
    out = tmp_path / "run"
    if there_before:
        out.mkdir()
    for _ in range(2):  # the second time too: nothing is in the way
        done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(out)])
        assert done.exit_code == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last == "run failed: ValueError: nothing of the kind; --debug shows where"
        assert "Traceback" not in done.stderr
        assert out.exists() == there_before
        assert not there_before or not list(out.iterdir())


def test_training_that_turns_nan_in_round_1_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, train__lr=1e38, train__steps=9, train__epochs=None)
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "round 1: training of" in done.stderr and "there is no checkpoint yet" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_relative_out_becomes_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, run__rounds=1)
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", "out"])
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")


def test_training_that_turns_nan_stops_and_names_who(tmp_path: Path) -> None:
    path = write(tmp_path, train__lr=1e30, run__rounds=6)
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    message = done.stderr.replace("\n", " ")
    assert "round " in message and "(tier " in message and "checkpoint" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run" / "summary.json").exists()


EXPLODES = """
from dataclasses import dataclass, replace
from subfleet.algorithms import FedPA

@dataclass(frozen=True)
class Explodes(FedPA):
    def phase(self, round):
        plain = super().phase(round)
        rule = replace(plain.program.rule, lr=1e30 if round == 4 else 0.1)
        return replace(plain, program=replace(plain.program, rule=rule))
"""


def test_training_that_turns_nan_later_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "explodes_in_round_4.py").write_text(EXPLODES)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"algorithm": {"name": "explodes_in_round_4:Explodes"}}
    with pytest.raises(RunFailed, match=r"round 4.*round-000002"):
        launch(Experiment(**tables(**own)), out=tmp_path / "run", local=True)
    short = Experiment(**tables(**own, run__rounds=3))
    resumed = launch(short, out=tmp_path / "run", resume=True, local=True)
    fresh = launch(short, out=tmp_path / "fresh", local=True)
    assert resumed.summary["params_sha256"] == fresh.summary["params_sha256"]
    assert [record["round"] for record in resumed.metrics] == [1, 2, 3]


def test_clients_that_turn_nan_are_left_out_if_so_configured(tmp_path: Path) -> None:
    run = launch(
        Experiment(**tables(train__lr=1e30, run__on_nan="skip")), out=tmp_path / "run", local=True
    )
    assert set(run.clients().column("status").to_pylist()) == {"skipped"}
    assert [record["clients"] for record in run.metrics] == [0, 0, 0, 0]
    start = assemble(Experiment(**tables())).work.net.init(0)
    assert all((start[name] == value).all() for name, value in run.params().items())


def test_an_engine_record_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"version": 99}')
    for given, words in [("engine.json", "version 99"), ("absent.json", "No such file")]:
        with pytest.raises(InputError, match=words):
            launch(
                Experiment(**tables()),
                out=tmp_path / "run",
                local=True,
                engine_record=tmp_path / given,
            )
    assert not (tmp_path / "run").exists()
