"""Runs that begin with the weights and the reports of a former run."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from toys import Crash, StopAfter, same_bits
from typer.testing import CliRunner

import subfleet
from subfleet.algorithms import FedPA
from subfleet.algorithms.local import split_statistics
from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.algorithm import Cohort, Phase, RoundPlan, State
from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult, LossProgram, Params
from subfleet.launch import assemble, launch
from subfleet.platform.runfolder import RunFolder
from subfleet.sweep import cells, run_cells
from subfleet.trained import TrainedRun

BEGAN: list[Params] = []  # what runs of `Reporting` began with
SEEN: list[Cohort] = []  # and the cohorts that they planned for


def reported(
    net: Any, start: Params, trained: Params, kept: Params | None, inputs: Params
) -> ClientResult:
    """FedPA's upload, and a report of what was trained."""
    result = split_statistics(net, start, trained, kept, inputs)
    bias = trained["fc2.bias"]
    return replace(result, report={"units": trained["fc1.bias"].numel(), "bias": bias.clone()})


@dataclass(frozen=True)
class Reporting(FedPA):
    """FedPA; clients report, and who has reported weighs twice as much."""

    def init(self, params: Params) -> State:
        BEGAN.append(params)
        return super().init(params)

    def phase(self, round: int) -> Phase:
        phase = super().phase(round)
        assert isinstance(phase.program, LossProgram)
        net = self.setting.net

        def finish(start: Params, trained: Params, kept: Any, inputs: Params) -> ClientResult:
            return reported(net, start, trained, kept, inputs)

        return replace(phase, program=replace(phase.program, finish=finish))

    def plan(self, state: State, cohort: Cohort, round: int) -> RoundPlan:
        SEEN.append(cohort)
        plan = super().plan(state, cohort, round)
        twice = [1 if report is None else 2 for report in cohort.report]
        tasks = [replace(t, weight=t.weight * k) for t, k in zip(plan.tasks, twice, strict=True)]
        return replace(plan, tasks=tasks)


def experiment(**changes: Any) -> Experiment:
    """A tiny experiment; `changes` are dotted keys with __ for the dot."""
    tiny = Experiment(
        data={"name": "synthetic_femnist", "clients": 10, "mean_samples": 12.0},
        model={"name": "small_cnn", "channels": [2, 4], "hidden": 8, "norm": "batch"},
        fleet={
            "tiers": [
                {"name": "high", "share": 0.5, "width": 1.0},
                {"name": "low", "share": 0.5, "width": 0.5},
            ]
        },
        algorithm={"name": f"{__name__}:Reporting"},
        run={"rounds": 3, "cohort": 3, "eval_every": 0, "checkpoint_every": 2, "engine": "loop"},
    )
    return tiny.with_values({k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> subfleet.Run:
    return launch(experiment(), out=tmp_path_factory.mktemp("first") / "run", local=True)


@pytest.fixture
def copied(first: subfleet.Run, tmp_path: Path) -> Path:
    """A former run to damage."""
    return Path(shutil.copytree(first.path, tmp_path / "former"))


def after(former: Path, **changes: Any) -> Experiment:
    """The same experiment, begun with a former run; two rounds."""
    return experiment(run__start_from=str(former), **({"run__rounds": 2} | changes))


def test_a_run_begins_with_the_weights_and_reports_of_a_former_one(
    first: subfleet.Run, tmp_path: Path
) -> None:
    BEGAN.clear()
    SEEN.clear()
    run = launch(after(first.path), out=tmp_path / "run", local=True)
    began, statistics = BEGAN[0], assemble(experiment()).work.net.statistics
    # FedPA leaves BatchNorm's statistics to its clients: they begin afresh.
    assert same_bits({n: v for n, v in began.items() if n not in statistics}, first.params())
    assert statistics and all(
        bool((began[name] == float(name.endswith("running_var"))).all()) for name in statistics
    )
    former = TrainedRun.open(first.path)
    cohort = SEEN[0]
    assert cohort.last_round.tolist() == [-1] * 3
    assert [record["round"] for record in run.metrics] == [1, 2]
    for client, report in zip(cohort.id.tolist(), cohort.report, strict=True):
        assert (report is None) == (client not in former.trained)
        if report is not None:
            there = former.reports[client]
            assert report["units"] == there["units"] and same_bits(
                {"bias": report["bias"]}, {"bias": there["bias"]}
            )
    assert any(cohort.report)
    # What nobody reported anew is still known, and written down.
    assert TrainedRun.open(run.path).reports.keys() >= former.reports.keys()
    facts = json.loads((run.path / "environment.json").read_text())["start"]
    assert facts["round"] == 3 and facts["run"] == str(first.path)
    assert facts["params_sha256"] == first.summary["params_sha256"]
    assert f'start_from = "{first.path}"' in (run.path / "config.toml").read_text()


def test_two_hosts_and_a_resume_give_the_same_bits(first: subfleet.Run, tmp_path: Path) -> None:
    three = after(first.path, run__rounds=3, run__checkpoint_every=1)
    one = launch(three, out=tmp_path / "one", local=True)
    fresh = launch(experiment(), out=tmp_path / "fresh", local=True)
    assert one.summary["params_sha256"] != fresh.summary["params_sha256"]
    two = launch(three.with_values({"run.hosts": 2}), out=tmp_path / "two", local=True)
    for round in (1, 2):  # before the first checkpoint, and after it
        out = tmp_path / f"cut{round}"
        with pytest.raises(Crash):
            launch(three, out=out, local=True, observers=[StopAfter(round)])
        cut = launch(three, out=out, local=True, resume=True)
        assert cut.summary["params_sha256"] == one.summary["params_sha256"]
    assert two.summary["params_sha256"] == one.summary["params_sha256"]


def test_statistics_of_the_server_are_taken_over(tmp_path: Path) -> None:
    server = {"algorithm__name": "fedavg", "run__rounds": 1}
    former = launch(experiment(**server), out=tmp_path / "former", local=True)
    start = assemble(after(former.path, **server)).start
    assert start is not None and same_bits(start.params, former.params())
    statistics = assemble(experiment()).work.net.statistics
    assert all(start.params[name].unique().numel() > 1 for name in statistics)


def test_an_unfinished_run_is_begun_from_at_its_last_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    former = tmp_path / "former"
    with pytest.raises(Crash):
        launch(
            experiment(run__checkpoint_every=1, run__rounds=4),
            out=former,
            local=True,
            observers=[StopAfter(3)],
        )
    whole = assemble(after(former)).start
    assert whole is not None and whole.round == 2 and whole.warnings == ()
    assert same_bits(whole.params | TrainedRun.open(former).params, whole.params)
    (former / "checkpoints" / "round-000002" / "tensors.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING, "subfleet"):
        run = launch(after(former), out=tmp_path / "run", local=True)
    assert json.loads((run.path / "environment.json").read_text())["start"]["round"] == 1
    (told,) = (r.message for r in caplog.records if "start_from" in r.message)
    assert "round-000002 is damaged" in told and "trying the one before" in told


def test_a_resume_from_another_start_is_refused(copied: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "run", after(copied, run__checkpoint_every=1)
    with pytest.raises(Crash):
        launch(wanted, out=out, local=True, observers=[StopAfter(2)])
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["round-000001"]
    fingerprint = assemble(wanted).fingerprint
    launch(experiment(run__rounds=4), out=copied, local=True, resume=True)
    assert assemble(wanted).fingerprint != fingerprint
    with pytest.raises(InputError, match=r"from another start \(round 3 there, 4 here;.*--out"):
        launch(wanted, out=out, local=True, resume=True)
    with pytest.raises(InputError, match=r"run.start_from = .* there, absent here"):
        launch(experiment(run__rounds=2), out=out, local=True, resume=True)
    shutil.rmtree(copied)
    with pytest.raises(InputError, match=rf"run.start_from = '{copied}'.*no folder of a run"):
        launch(wanted, out=out, local=True, resume=True)
    assert TrainedRun.open(out).round == 1  # its own weights are there


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"data__clients": 12}, "data.clients differ"),
        ({"data__skew": 0.1}, "data.skew differ"),
        ({"run__seed": 1}, "run.seed differ"),
        ({"fleet__tiers": [{"name": "all", "share": 1.0, "width": 1.0}]}, "fleet.tiers differ"),
    ],
)
def test_reports_of_other_clients_are_left_behind(
    changes: dict[str, Any], differing: str, first: subfleet.Run
) -> None:
    start = assemble(after(first.path, **changes)).start
    assert start is not None and start.reports == {}
    (told,) = start.warnings
    assert "not taken over" in told and told.endswith(differing)


def test_how_fast_devices_are_makes_no_other_clients(first: subfleet.Run) -> None:
    start = assemble(after(first.path, fleet__device={"flops_per_s": 1e9})).start
    assert start is not None and start.reports and not start.warnings


def test_reports_are_part_of_what_a_resume_compares(first: subfleet.Run) -> None:
    start = assemble(after(first.path)).start
    assert start is not None and start.reports
    without = replace(start, reports={}).facts
    assert {key for key, value in start.facts.items() if without[key] != value} == {
        "reports_sha256"
    }


def test_reports_of_another_algorithm_do_no_harm(first: subfleet.Run, tmp_path: Path) -> None:
    other = after(first.path, algorithm={"name": "adds", "persist": True}, run__rounds=1)
    assert launch(other, out=tmp_path / "run", local=True).summary["finished"]


def test_weights_without_a_checkpoint_are_enough(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    start = assemble(after(copied)).start
    assert start is not None and start.round == 3 and start.reports == {}
    assert same_bits(start.params | RunFolder(copied, "").read_final(), start.params)
    assert "is not known" in start.warnings[0]


def no_weights(former: Path) -> None:
    shutil.rmtree(former / "checkpoints")
    (former / "final.safetensors").unlink()


def no_config(former: Path) -> None:
    (former / "config.toml").unlink()


def half_written(former: Path) -> None:
    path = former / "final.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "is no folder of a run; give the folder"),
        (no_config, r"holds no run \(no config.toml\)"),
        (no_weights, "has no weights yet.*--resume"),
        (half_written, "final.safetensors: is damaged.*remove it"),
    ],
)
def test_a_folder_without_weights_is_refused(
    spoil: Any, words: str, copied: Path, tmp_path: Path
) -> None:
    spoil(copied)
    with pytest.raises(InputError, match=f"^run.start_from = '{copied}': .*{words}"):
        launch(after(copied), out=tmp_path / "run", local=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__hidden": 6}, r"tensor 'fc1.bias' is \(8,\) there and \(6,\) in model"),
        ({"model__norm": "none"}, r"tensor '.*' is \(2,\) there and absent in model 'small_cnn'"),
    ],
)
def test_the_weights_of_another_model_are_refused(
    changes: dict[str, Any], words: str, first: subfleet.Run
) -> None:
    with pytest.raises(InputError, match=words):
        assemble(after(first.path, **changes))


def test_parameters_that_the_former_run_lacks_are_not_drawn(copied: Path) -> None:
    folder = RunFolder(copied, "")
    folder.write_final({n: v for n, v in folder.read_final().items() if n != "fc2.bias"})
    with pytest.raises(InputError, match=r"tensor 'fc2.bias' is absent there and \(62,\) in"):
        assemble(after(copied))


def test_the_command_and_a_sweep_take_the_key(
    first: subfleet.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first.path.parent)
    path = tmp_path / "experiment.toml"
    path.write_text(experiment(algorithm__name="fedpa", run__rounds=1).to_toml())
    out = str(tmp_path / "run")
    setting = ["--set", f"run.start_from={first.path.name}"]
    done = CliRunner().invoke(app, ["run", str(path), "--local", "--out", out, *setting])
    assert done.exit_code == 0, done.stderr
    ran = RunFolder(Path(out), "")
    there = ran.read_environment()["start"]
    assert there["run"] == first.path.name
    assert there["params_sha256"] == first.summary["params_sha256"]
    one = experiment(algorithm__name="fedpa", run__rounds=1, run__start_from=first.path.name)
    swept = run_cells(cells(one, [0], {"all": {}}, tmp_path / "cells"), local=True)
    assert [run.summary["params_sha256"] for run in swept] == [ran.read_summary()["params_sha256"]]  # type: ignore[index]
