"""Whole commands with a Ray of their own: they end, or are ended, and leave nothing behind."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from subfleet.cluster.start import check_address
from subfleet.core.errors import InputError
from subfleet.launch import Run
from subfleet.platform.metrics import read_metrics
from subfleet.platform.runfolder import RunFolder

EXPERIMENT = """
[data]
name = "synthetic_femnist"
clients = 40
mean_samples = 60
[model]
norm = "batch"
[fleet]
tiers = [{name = "high", share = 0.4, width = 1.0}, {name = "low", share = 0.6, width = 0.5}]
[algorithm]
name = "fedpa"
[run]
rounds = 8
cohort = 12
eval_every = 3
eval_clients = 4
checkpoint_every = 2
hosts = 2
"""
GONE_S = 20.0  # in which every process must have ended; a busy machine takes its time


def running(session: int) -> dict[int, str]:
    """Command lines of the processes of a session, by process id, without zombies."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return found


def left_over(session: int, allowed_s: float = GONE_S) -> dict[int, str]:
    """What still runs of a session after a while; nothing as soon as nothing does."""
    deadline = time.monotonic() + allowed_s
    while (found := running(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder of the test's own, where Ray writes its token."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def commands(home: Path) -> Iterator[Commands]:
    """Starts commands in sessions of their own; at the end nothing of them is left."""
    started = Commands(home)
    yield started
    for process in started.processes:
        for pid in running(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)


class Commands:
    """Commands of a test, with a home folder and a session of their own."""

    def __init__(self, home: Path):
        self.processes: list[subprocess.Popen[str]] = []
        self._home = home
        # Some commands start in other folders; the package is importable there too.
        root = str(Path(__file__).resolve().parents[2])
        self._variables = {"HOME": str(home), "RAY_AUTH_MODE": "token", "PYTHONPATH": root}

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Starts `python arguments...`; its process id is that of its session."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**outside, **self._variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=cwd,
        )
        self.processes.append(process)
        return process

    def run(self, out: Path, *more: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Starts `subfleet run` on the experiment of this file."""
        file = self._home / "experiment.toml"
        file.write_text(EXPERIMENT)
        return self.start("-m", "subfleet", "run", str(file), "--out", str(out), *more, cwd=cwd)


def wait_for_round(process: subprocess.Popen[str], out: Path, round: int) -> None:
    """Returns when a run has written this round; fails when it ends or takes minutes."""
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= round):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no round was written"
        time.sleep(0.01)


def assert_every_round_once(out: Path, rounds: int) -> None:
    run = Run(out, {})
    assert [record["round"] for record in run.metrics] == list(range(1, rounds + 1))
    rows = run.clients()
    pairs = set(zip(rows["round"].to_pylist(), rows["client"].to_pylist(), strict=True))
    assert len(rows) == len(pairs) == rounds * 12


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
@pytest.mark.parametrize("where", [[], ["--local"]])
@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")],
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


@pytest.mark.ray
@pytest.mark.parametrize("where", [[], ["--local"]])
def test_a_sweep_stopped_in_its_second_cell_goes_on_by_the_same_command(
    where: list[str], commands: Commands, home: Path, tmp_path: Path
) -> None:
    file = home / "experiment.toml"
    file.write_text(EXPERIMENT.replace("rounds = 8", "rounds = 4"))
    given = ["-m", "subfleet", "sweep", str(file), "--seeds", "0,1", *where]
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_answer(head: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return check_address(address)
        except InputError:
            assert head.poll() is None, head.communicate()
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(0.2)


@pytest.mark.ray
def test_a_run_on_a_cluster_leaves_it_running_and_without_actors(
    commands: Commands, home: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    head = commands.start(
        *("-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"),
        *("--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=false"),
        "--disable-usage-stats",
    )
    wait_for_answer(head, address)
    # The cluster's processes have another current folder than the command.
    more = ("--address", address, "--set", "run.rounds=2")
    run = commands.run(Path("out"), *more, cwd=tmp_path)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert said.splitlines()[-1] == str(tmp_path / "out")
    assert_every_round_once(tmp_path / "out", 2)
    assert head.poll() is None
    assert any("raylet" in command for command in running(head.pid).values())
    deadline = time.monotonic() + GONE_S
    while any("ray::C" in command for command in running(head.pid).values()):
        assert time.monotonic() < deadline, running(head.pid)
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
    with listener.socket, pytest.raises(InputError, match="what answers is not Ray"):
        check_address(listener.address)


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
    assert time.monotonic() - started < 30  # most of it for the imports
