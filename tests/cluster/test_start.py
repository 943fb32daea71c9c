"""Whole commands with a Ray of their own: they end, or are ended, and leave nothing behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import (
    EXPERIMENT,
    GONE_S,
    Commands,
    Head,
    assert_every_round_once,
    free_port,
    left_over,
    running,
    wait_for_round,
)

from subfleet.cluster.address import check_address
from subfleet.core.errors import InputError
from subfleet.platform.metrics import read_metrics
from subfleet.platform.runfolder import RunFolder


@pytest.mark.ray
def test_a_run_killed_and_resumed_equals_one_that_was_not(
    commands: Commands, tmp_path: Path
) -> None:
    whole = commands.run(tmp_path / "whole", "--local")
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors

    killed = commands.run(tmp_path / "out")
    wait_for_round(killed, tmp_path / "out", 3)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    assert left_over(killed.pid) == {}
    assert RunFolder(tmp_path / "out", "").read_summary() is None

    resumed = commands.run(tmp_path / "out", "--resume")
    said, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert said.splitlines()[-1] == str(tmp_path / "out")
    assert left_over(resumed.pid) == {}
    summaries = [RunFolder(tmp_path / name, "").read_summary() or {} for name in ("whole", "out")]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    assert_every_round_once(tmp_path / "out", 8)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sent", "status", "words", "where"),
    [
        (signal.SIGINT, 130, "interrupted\n", []),
        (signal.SIGINT, 130, "interrupted\n", ["--local"]),
        (signal.SIGTERM, 143, "", ["--local"]),  # on Ray when a job is stopped: test_jobs.py
    ],
)
def test_an_interrupted_run_saves_its_rounds_and_says_how_to_go_on(
    sent: signal.Signals,
    status: int,
    words: str,
    where: list[str],
    commands: Commands,
    tmp_path: Path,
) -> None:
    # No checkpoint but that of the interrupt.
    more = ["--set", "run.rounds=1000", "--set", "run.checkpoint_every=0", *where]
    run = commands.run(tmp_path / "out", *more)
    wait_for_round(run, tmp_path / "out", 4)
    time.sleep(0.05)  # while a round is written down it cannot be saved
    # A terminal sends Ctrl-C to the whole group.
    os.killpg(run.pid, sent) if sent is signal.SIGINT else run.send_signal(sent)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status, errors
    assert errors.endswith(words)
    assert "Traceback" not in errors
    assert left_over(run.pid) == {}

    done = len(list(read_metrics(tmp_path / "out" / "metrics.jsonl")))
    said = errors.splitlines()
    at = next(i for i, line in enumerate(said) if "go on with" in line)
    assert said[at] == f"stopped; {tmp_path / 'out'} holds {done} of 1000 rounds; go on with"
    python, *arguments = shlex.split(said[at + 1])
    assert python == sys.executable
    assert ("--local" in arguments) == bool(where)
    again = commands.start(*arguments, "--set", f"run.rounds={done + 1}")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert_every_round_once(tmp_path / "out", done + 1)


def test_a_run_stopped_before_its_first_round_leaves_nothing(
    commands: Commands, tmp_path: Path
) -> None:
    run = commands.run(tmp_path / "out", "--local")
    assert run.stderr is not None
    while run.stderr.readline() != "reading the data ...\n":
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143
    assert errors.endswith("stopped; nothing saved yet\n")
    assert not (tmp_path / "out").exists()


def test_a_sweep_stopped_in_its_second_cell_goes_on_by_the_same_command(
    commands: Commands, home: Path, tmp_path: Path
) -> None:
    file = home / "experiment.toml"
    file.write_text(EXPERIMENT.replace("rounds = 8", "rounds = 4"))
    given = ["-m", "subfleet", "sweep", str(file), "--seeds", "0,1", "--local"]
    given += ["--out", str(tmp_path / "cells")]
    sweep = commands.start(*given)
    assert sweep.stderr is not None
    while "cell 2/2: all, seed 1" not in (line := sweep.stderr.readline()):
        assert line, sweep.communicate()
    sweep.send_signal(signal.SIGTERM)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 143, errors
    assert "Traceback" not in errors
    assert left_over(sweep.pid) == {}
    said = errors.splitlines()
    assert said[-2] == f"stopped; {tmp_path / 'cells'} holds 1 of 2 cells finished; go on with"
    assert shlex.split(said[-1]) == [sys.executable, *given]
    again = commands.start(*shlex.split(said[-1])[1:])
    said, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "2 cells, 1 finished before, 1 to run" in errors


SWEEP = """
import sys
from pathlib import Path
from subfleet.cluster import start
from subfleet.config import Experiment
from subfleet.sweep import sweep

sessions = []
connect = start._connect

def counted(ray, address):
    connect(ray, address)
    sessions.append(ray.get_runtime_context().get_job_id())

start._connect = counted
out = Path(sys.argv[1])
for _ in range(2):  # the second time every cell is finished
    sweep(Experiment.load(sys.argv[2]), seeds=[0, 1], grid={}, out=out)
assert len(sessions) == 1, sessions
print("cells", len(list(out.glob("*/summary.json"))))
"""


@pytest.mark.ray
def test_the_cells_of_a_sweep_share_one_ray(commands: Commands, home: Path, tmp_path: Path) -> None:
    file = home / "experiment.toml"
    file.write_text(EXPERIMENT.replace("rounds = 8", "rounds = 1"))
    done = commands.start("-c", SWEEP, str(tmp_path / "cells"), str(file))
    said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert said.splitlines()[-1] == "cells 2"
    assert left_over(done.pid) == {}


@pytest.mark.ray
def test_a_run_on_a_cluster_leaves_it_running_and_without_actors(
    commands: Commands, tmp_path: Path
) -> None:
    head = Head(commands, jobs=False)
    # The cluster's processes have another current folder than the command.
    more = ("--address", head.address, "--set", "run.rounds=2")
    run = commands.run(Path("out"), *more, cwd=tmp_path)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert said.splitlines()[-1] == str(tmp_path / "out")
    assert_every_round_once(tmp_path / "out", 2)
    assert head.process.poll() is None
    assert any("raylet" in command for command in running(head.process.pid).values())
    deadline = time.monotonic() + GONE_S
    while any("ray::C" in command for command in running(head.process.pid).values()):
        assert time.monotonic() < deadline, running(head.process.pid)
        time.sleep(0.1)


class Listener:
    """A server on loopback that takes connections and says `words` to each."""

    def __init__(self, words: bytes):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self._words = words
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self.socket.accept()
            except OSError:  # closed
                return
            with caller:
                caller.recv(1024)
                caller.sendall(self._words)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nonsense", "is not of the form host:port"),
        ("ray://127.0.0.1:10001", "is not of the form host:port"),
        ("http://127.0.0.1:8265", "is not of the form host:port"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there"),
    ],
)
def test_an_address_that_cannot_be_is_refused(address: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        check_address(address)
    assert f"--address {address}: " in str(error.value)


@pytest.mark.parametrize("words", [b"", b"HTTP/1.0 400 Bad request\r\n\r\n"])
def test_a_server_that_is_not_ray_is_refused_at_once(words: bytes) -> None:
    listener = Listener(words)
    with listener.socket, pytest.raises(InputError, match="does not answer as Ray does"):
        check_address(listener.address)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `ray start` would leave its address; no Ray runs, as far as we see."""
    from ray._private import services

    class NoneFound(frozenset):
        def __call__(self) -> frozenset:
            return self

        def cache_clear(self) -> None: ...

    monkeypatch.setattr(services, "find_gcs_addresses", NoneFound())  # other tests' Rays may run
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_the_file_of_a_ray_that_died_is_named_within_seconds(alone: Path) -> None:
    with pytest.raises(InputError, match="--address auto: no Ray cluster runs on this machine"):
        check_address("auto")
    alone.write_text(where := f"127.0.0.1:{free_port()}")
    with pytest.raises(InputError) as error:
        check_address("auto")
    said = str(error.value)
    assert said.startswith(f"--address auto: {alone} says {where}: no Ray cluster answers there")
    assert "wrote the file has ended: remove it, or" in said


def test_auto_is_first_what_the_environment_says(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", where)
    with pytest.raises(InputError, match=f"RAY_ADDRESS={where}: no Ray cluster answers there"):
        check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(InputError, match=r"RAY_ADDRESS=ray://.*: is not of the form host:port"):
        check_address("auto")


def test_an_address_where_nobody_answers_ends_the_command_within_seconds(
    commands: Commands, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    run = commands.run(tmp_path / "out", "--address", address)
    started = time.monotonic()
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert f"error: --address {address}: no Ray cluster answers there" in errors
    assert said == ""
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 20  # most of it for the imports
