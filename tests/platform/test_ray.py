"""Runs on real Ray actors: the same bits on any hosts, lost hosts, errors, users' code."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets import ClientRows, Store, write_store
from subfleet.datasets.reader import Layout
from subfleet.launch import Run, assemble, launch
from subfleet.platform.bundles import EvalBundle, Merge
from subfleet.platform.merging import HeldSums
from subfleet.platform.metrics import read_metrics
from subfleet.platform.ray_executor import RayExecutor
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]


@pytest.fixture(scope="module")
def inline(mixed_fleet: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that all others must equal: in this process, without Ray."""
    return launch(mixed_fleet, out=tmp_path_factory.mktemp("inline") / "run", local=True)


def on_hosts(experiment: Experiment, hosts: int, out: Path) -> Run:
    return launch(experiment.with_overrides([f"run.hosts={hosts}"]), out=out)


def assert_every_round_once(run: Run, experiment: Experiment) -> None:
    rounds, cohort = experiment.run.rounds, experiment.run.cohort
    assert [record["round"] for record in run.metrics] == list(range(1, rounds + 1))
    rows = run.clients()
    pairs = set(zip(rows["round"].to_pylist(), rows["client"].to_pylist(), strict=True))
    assert len(rows) == len(pairs) == rounds * cohort


@pytest.mark.parametrize("hosts", [1, 3])  # two of them below, with and without losses
def test_the_result_is_that_of_the_inline_run_on_any_number_of_hosts(
    hosts: int, mixed_fleet: Experiment, inline: Run, tmp_path: Path
) -> None:
    run = on_hosts(mixed_fleet, hosts, tmp_path / "run")
    assert run.summary["params_sha256"] == inline.summary["params_sha256"]
    assert run.summary["acc_local"] == inline.summary["acc_local"]
    assert_every_round_once(run, mixed_fleet)
    assert all(record["retries"] == 0 for record in run.metrics)


def test_a_damaged_checkpoint_is_told_where_the_run_was_started(
    mixed_fleet: Experiment, inline: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(inline.path, copy)
    newest = max((copy / "checkpoints").glob("round-*"))
    (newest / "tensors.safetensors").write_bytes(b"cut")
    experiment = mixed_fleet.with_overrides(["run.hosts=1"])
    console = Console(file=io.StringIO())
    run = launch(experiment, out=copy, resume=True, progress=console)
    assert f"warning: checkpoint {newest} is damaged" in console.file.getvalue()
    assert run.summary["params_sha256"] == inline.summary["params_sha256"]
    # Without a console they are logged, here and not on the coordinator.
    newest = max((copy / "checkpoints").glob("round-*"))
    (newest / "state.json").unlink()
    launch(experiment, out=copy, resume=True)
    assert f"checkpoint {newest} is damaged" in caplog.text


def test_events_wait_only_for_who_follows(mixed_fleet: Experiment, tmp_path: Path) -> None:
    import ray

    from subfleet.platform.coordinator import start_coordinator
    from subfleet.platform.host import Hosts

    job = assemble(mixed_fleet.with_overrides(["run.rounds=1"]))
    hosts = Hosts(job.work, job.federation, wanted=1, device="cpu")
    kinds = {}
    for followed in (True, False):
        folder = RunFolder.create(tmp_path / str(followed), "", "f")
        coordinator = start_coordinator(job, folder, hosts, [], followed)
        ray.get(coordinator.run.remote())
        kinds[followed] = [kind for kind, _ in ray.get(coordinator.events.remote())]
        ray.kill(coordinator)
    hosts.kill()
    expected = ["start", "progress", "note", "note", "progress", "round", "end"]
    assert kinds[True] == expected  # first the variants that were tried out
    assert kinds[False] == []


def in_round(metrics: Path, round: int) -> bool:
    """Whether the run has written the round before this one, and not this one."""
    return metrics.exists() and metrics.read_bytes().count(b"\n") == round - 1


def losing_a_host(
    experiment: Experiment, hosts: int, out: Path, busy_hosts: Callable[[], list[int]]
) -> tuple[Run, list[int]]:
    """A run one of whose hosts is killed at work in round 2, and the process that it was."""
    killed: list[int] = []

    def kill_one(deadline: float) -> None:
        while time.monotonic() < deadline and not killed:
            time.sleep(0.005)
            if in_round(out / "metrics.jsonl", 2):
                for pid in busy_hosts()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = Thread(target=kill_one, args=(time.monotonic() + 120,))
    killer.start()
    run = on_hosts(experiment, hosts, out)
    killer.join()
    return run, killed


def test_streamed_rows_give_the_same_result(
    mixed_fleet: Experiment, inline: Run, tmp_path: Path
) -> None:
    run = on_hosts(mixed_fleet.with_overrides(["run.stream=true"]), 2, tmp_path / "run")
    assert run.summary["params_sha256"] == inline.summary["params_sha256"]
    assert run.summary["acc_local"] == inline.summary["acc_local"]
    assert_every_round_once(run, mixed_fleet)


@pytest.mark.parametrize(("hosts", "stream"), [(1, "false"), (2, "false"), (2, "true")])
def test_a_host_killed_in_mid_round_changes_nothing_but_the_retries(
    hosts: int,
    stream: str,
    mixed_fleet: Experiment,
    inline: Run,
    busy_hosts: Callable[[], list[int]],
    tmp_path: Path,
) -> None:
    experiment = mixed_fleet.with_overrides([f"run.stream={stream}"])
    run, killed = losing_a_host(experiment, hosts, tmp_path / "run", busy_hosts)
    assert killed
    assert run.summary["params_sha256"] == inline.summary["params_sha256"]
    assert_every_round_once(run, mixed_fleet)
    retries = {record["round"]: record["retries"] for record in run.metrics}
    assert 1 <= retries[2] <= 2, "the killed host had one bundle at work and one at its door"
    assert sum(retries.values()) == retries[2]


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "stc", "p_up": 0.1, "p_down": 0.1},
        {"name": "pfedme", "begin": "personal", "eta": 0.05},
    ],
    ids=lambda algorithm: algorithm["name"],
)
def test_residuals_and_personal_models_survive_a_lost_host(
    algorithm: dict, mixed_fleet: Experiment, busy_hosts: Callable[[], list[int]], tmp_path: Path
) -> None:
    """What a client kept in one round decides what it sends in the next."""
    tables = mixed_fleet.to_tables()
    tables["algorithm"] = algorithm
    experiment = Experiment(**tables).with_overrides(["run.rounds=4"])
    plain = launch(experiment, out=tmp_path / "inline", local=True)
    run, killed = losing_a_host(experiment, 2, tmp_path / "run", busy_hosts)
    assert killed and sum(record["retries"] for record in run.metrics) >= 1
    assert run.summary["params_sha256"] == plain.summary["params_sha256"]
    assert run.summary["acc_local"] == plain.summary["acc_local"]


# Sums of over a megabyte, in more bundles than the coordinator merges itself.
LARGE_SUMS = ["model.hidden=256", "run.bundle_clients=1", "run.rounds=2", "run.engine=loop"]


@pytest.fixture(scope="module")
def large_sums(
    mixed_fleet: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, Run]:
    """An experiment whose sums are merged on hosts, and its run without any."""
    experiment = mixed_fleet.with_overrides(LARGE_SUMS)
    return experiment, launch(experiment, out=tmp_path_factory.mktemp("large") / "run", local=True)


def test_sums_merged_on_hosts_have_the_same_bits_also_after_a_loss(
    large_sums: tuple[Experiment, Run], busy_hosts: Callable[[], list[int]], tmp_path: Path
) -> None:
    experiment, here = large_sums
    run, killed = losing_a_host(experiment, 2, tmp_path / "run", busy_hosts)
    assert killed and sum(record["retries"] for record in run.metrics) >= 1
    assert run.summary["params_sha256"] == here.summary["params_sha256"]
    assert_every_round_once(run, experiment)


def lost_object(ray: Any) -> Any:
    """A reference whose object went with the process that had put it."""

    class Maker:
        def make(self) -> list[Any]:
            return [ray.put(np.zeros(1 << 17))]

    maker = ray.remote(num_cpus=0)(Maker).remote()
    (reference,) = ray.get(maker.make.remote())
    ray.kill(maker)
    return reference


def test_sums_that_are_lost_before_they_are_merged_are_made_again(
    large_sums: tuple[Experiment, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first merge begins one of its sums is gone, like those of a lost node."""
    import ray

    from subfleet.platform.host import Hosts

    experiment, here = large_sums
    job = assemble(experiment)
    lost = [lost_object(ray)]
    find = HeldSums.of

    def losing(sums: HeldSums, merge: Merge) -> list:
        found = find(sums, merge)
        return [*found[:3], lost.pop(), *found[4:]] if lost else found

    monkeypatch.setattr(HeldSums, "of", losing)
    hosts = Hosts(job.work, job.federation, wanted=2, device="cpu")
    executor = RayExecutor(hosts)
    summary = Rounds(job, executor, RunFolder.create(tmp_path / "run", "", "f")).run()
    hosts.kill()
    assert not lost and executor.retries == 1
    assert summary["params_sha256"] == here.summary["params_sha256"]


def test_a_run_without_a_host_that_answers_fails_and_says_so(mixed_fleet: Experiment) -> None:
    import ray

    from subfleet.platform.host import Hosts

    job = assemble(mixed_fleet)

    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class Everything:
        def up(self) -> None:
            pass

    taken = Everything.remote()
    ray.get(taken.up.remote())
    hosts = Hosts(job.work, job.federation, wanted=1, device="cpu")
    bundle = EvalBundle(0, 1, np.array([0]), {}, "test", 1.0)
    executor = RayExecutor(hosts, patience_s=1.0)
    with pytest.raises(RunFailed, match="none of the 1 hosts has answered for 1 s"):
        list(executor.run([bundle], {0: job.work.net.init(0)}))
    hosts.kill()
    ray.kill(taken)


USER_CODE = """
    import dataclasses
    import os
    import pathlib
    import signal

    import torch

    from subfleet.algorithms.fedavg import FedAvg
    from subfleet.algorithms.local import cross_entropy
    from subfleet.core.errors import InputError, RunFailed

    class Halfway(FedAvg):
        def server_step(self, state, plan, reduced):
            new = super().server_step(state, plan, reduced)["params"]
            return {"params": {k: (new[k] + v) / 2 for k, v in state["params"].items()}}

    class RefusesOnCoordinator(FedAvg):
        def server_step(self, state, plan, reduced):
            raise InputError("key=1 is out of bounds; give 0")

    class BreaksOnCoordinator(FedAvg):
        def server_step(self, state, plan, reduced):
            return {"params": state["nothing"]}

    class DiesOnCoordinator(FedAvg):
        def server_step(self, state, plan, reduced):
            os.kill(os.getpid(), signal.SIGKILL)

    class TurnsNaN(FedAvg):
        def plan(self, state, cohort, round):
            params = state["params"]
            if round == 2:
                params = {k: v * float("nan") for k, v in params.items()}
            return super().plan({"params": params}, cohort, round)

    def refuse(net, params, batch, noise, inputs):
        raise InputError("key=2 is out of bounds; give 0")

    def fail(net, params, batch, noise, inputs):
        raise RunFailed("the loss gave up; restart it")

    def crash(net, params, batch, noise, inputs):
        raise KeyError("nothing")

    def die(net, params, batch, noise, inputs):
        os.kill(os.getpid(), signal.SIGKILL)

    class OnHost(FedAvg):
        def phase(self, round):
            phase = super().phase(round)
            return dataclasses.replace(
                phase, program=dataclasses.replace(phase.program, loss=type(self).loss)
            )

    class RefusesOnHost(OnHost):
        loss = staticmethod(refuse)

    class FailsOnHost(OnHost):
        loss = staticmethod(fail)

    class CrashesOnHost(OnHost):
        loss = staticmethod(crash)

    class DiesOnHost(OnHost):
        loss = staticmethod(die)

    def break_once(net, params, batch, noise, inputs):
        broken = pathlib.Path(__file__).parent / "broken"
        if not broken.exists():
            broken.touch()
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return cross_entropy(net, params, batch, noise, inputs)

    class BreaksItsDevice(OnHost):
        loss = staticmethod(break_once)
"""


@pytest.fixture(scope="module")
def users_module(ray_here: Path) -> Iterator[None]:
    """The user's own module `my_fl` in the folder in which Ray was started."""
    (ray_here / "my_fl.py").write_text(textwrap.dedent(USER_CODE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield
    sys.modules.pop("my_fl", None)


def users_own(experiment: Experiment, name: str, engine: str = "loop") -> Experiment:
    """Two rounds of an algorithm of `my_fl` on one host, without evaluation on the way."""
    chosen = [f"algorithm.name=my_fl:{name}", f"run.engine={engine}", "run.hosts=1"]
    return experiment.with_overrides([*chosen, "run.rounds=2", "run.eval_every=0"])


@pytest.mark.usefixtures("users_module")
def test_the_users_own_algorithm_runs_on_hosts(mixed_fleet: Experiment, tmp_path: Path) -> None:
    experiment = users_own(mixed_fleet, "Halfway")
    here = launch(experiment, out=tmp_path / "here", local=True)
    there = launch(experiment, out=tmp_path / "there")
    assert here.summary["params_sha256"] == there.summary["params_sha256"]


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("RefusesOnCoordinator", 2, "error: key=1 is out of bounds; give 0"),
        ("RefusesOnHost", 2, "error: key=2 is out of bounds; give 0"),
        ("FailsOnHost", 1, "run failed: the loss gave up; restart it"),
        ("BreaksOnCoordinator", 1, "run failed: the coordinator failed: KeyError: 'nothing'"),
        ("CrashesOnHost", 1, "loss cannot be traced (KeyError: 'nothing'); set run.engine"),
        ("DiesOnCoordinator", 1, "run failed: the coordinator's process died"),
        ("DiesOnHost", 1, "was lost with its host 5 times"),
    ],
)
def test_an_error_far_away_ends_the_command_as_one_here_would(
    name: str, status: int, words: str, mixed_fleet: Experiment, tmp_path: Path
) -> None:
    file = tmp_path / "e.toml"
    engine = "traced" if "traced" in words else "loop"
    file.write_text(users_own(mixed_fleet, name, engine).to_toml())
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "run")])
    assert result.exit_code == status, result.stderr
    assert words in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "no round was finished: nothing to resume"


@pytest.mark.usefixtures("users_module")
def test_a_device_that_breaks_costs_its_host_and_the_round_a_retry(
    mixed_fleet: Experiment, tmp_path: Path
) -> None:
    experiment = users_own(mixed_fleet, "BreaksItsDevice")
    run = launch(experiment, out=tmp_path / "run")
    again = launch(experiment, out=tmp_path / "again")
    assert run.summary["params_sha256"] == again.summary["params_sha256"]
    assert [sum(r["retries"] for r in each.metrics) > 0 for each in (run, again)] == [True, False]


def test_a_store_that_a_host_does_not_see_is_named_with_the_node(
    mixed_fleet: Experiment, tmp_path: Path
) -> None:
    import ray

    from subfleet.platform.host import Hosts

    rows = ClientRows("a", np.zeros((9, 2), np.uint8), np.arange(9) % 2, np.zeros(9, bool))
    write_store(tmp_path / "store", [rows], name="toy", layout=Layout(2, (2,)), source={})
    store, job = Store(tmp_path / "store"), assemble(mixed_fleet)
    shutil.rmtree(tmp_path / "store")
    hosts = Hosts(job.work, store, wanted=1, device="cpu")
    bundle = EvalBundle(0, 1, np.array([0]), {}, "test", 1.0)
    with pytest.raises(InputError, match="holds no prepared data") as error:
        list(RayExecutor(hosts).run([bundle], {0: job.work.net.init(0)}))
    assert f"on the cluster's node {ray.util.get_node_ip_address()}: " in str(error.value)
    hosts.kill()


@pytest.mark.usefixtures("users_module")
def test_training_that_turns_nan_names_round_client_and_tier(
    mixed_fleet: Experiment, tmp_path: Path
) -> None:
    experiment = users_own(mixed_fleet, "TurnsNaN")
    with pytest.raises(RunFailed, match=r"round 2: .*not finite: \d+ \(tier (high|low)\)") as error:
        launch(experiment, out=tmp_path / "run")
    good = tmp_path / "run" / "checkpoints" / "round-000001"
    assert "checkpoints/round-000001" in str(error.value)
    assert good.is_dir()
    assert [record["round"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
