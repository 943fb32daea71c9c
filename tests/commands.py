"""Whole commands in sessions of their own, and what is left of them; heads of Ray clusters."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from subfleet.cluster.address import check_address
from subfleet.cluster.jobs import checked
from subfleet.core.errors import InputError
from subfleet.launch import Run

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
engine = "loop"
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


class Commands:
    """Commands of a test, with a home folder and a session of their own."""

    def __init__(self, home: Path):
        self.processes: list[subprocess.Popen[str]] = []
        self.home = home
        # Some commands start in other folders; the package is importable there too.
        root = str(Path(__file__).resolve().parents[1])
        self._variables = {"HOME": str(home), "RAY_AUTH_MODE": "token", "PYTHONPATH": root}
        # A cluster finds its `python` by PATH.
        self._variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(
        self, *arguments: str, cwd: Path | None = None, without: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Starts `python arguments...`; its process id is that of its session.

        `without`: names of variables that it does not get.
        """
        outside = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        variables = {k: v for k, v in (outside | self._variables).items() if k not in without}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=variables,
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
        file = self.home / "experiment.toml"
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """The head of a Ray cluster on loopback, in a session of its own, with a token of its own."""

    def __init__(self, commands: Commands, *, jobs: bool):
        """Starts it, with a job server where `jobs`, and waits until it answers."""
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{free_port()}"
        (commands.home / ".ray").mkdir(exist_ok=True)
        (commands.home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        port, server_port = (text.rpartition(":")[2] for text in (self.address, self.url))
        served = (
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={server_port}"),
            f"--dashboard-agent-listen-port={free_port()}",
        )
        self.process = commands.start(
            *("-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", f"--port={port}"),
            *("--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"),
            *(served if jobs else ("--include-dashboard=false",)),
            without=("PYTHONPATH",),  # jobs bring their code along
        )
        self._wait(lambda: check_address(self.address))
        if jobs:
            self._wait(lambda: checked(self.url))

    def _wait(self, knock: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                knock()
            except InputError:
                assert self.process.poll() is None, self.process.communicate()
                assert time.monotonic() < deadline, "the cluster did not start"
                time.sleep(0.2)
            else:
                return
