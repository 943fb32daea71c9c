"""A real head with its job server: experiments submitted, followed, stopped, fetched."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from commands import EXPERIMENT, Commands, Head, assert_every_round_once, free_port, running

from subfleet.cli_jobs import _followed, job_row, print_jobs
from subfleet.cluster.fetch import pack, unpack
from subfleet.cluster.jobs import JobInfo, JobServer, checked, exit_status
from subfleet.cluster.submit import Submission, own_modules, relative_paths
from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.launch import launch
from subfleet.platform.runfolder import RunFolder

OWN = """
import os
import re
import subfleet
from subfleet.algorithms.fedavg import FedAvg
from subfleet.core.errors import InputError

class Refuses(FedAvg):
    def server_step(self, state, plan, reduced):
        raise InputError(f"code from {os.path.dirname(subfleet.__file__)}")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head for all tests here, and what is left of it killed at the end."""
    home = tmp_path_factory.mktemp("home")
    commands = Commands(home)
    yield Cluster(commands)
    for process in commands.processes:
        for pid in running(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)


class Cluster:
    """A head, and the commands of a user who has its token."""

    def __init__(self, commands: Commands):
        self.commands = commands
        self.head = Head(commands, jobs=True)
        self.file = commands.home / "experiment.toml"
        self.file.write_text(EXPERIMENT)

    def start(self, *words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Starts `subfleet words... --address URL`."""
        address = ("--address", self.head.url)
        return self.commands.start("-m", "subfleet", *words, *address, cwd=cwd)

    def call(self, *words: str, cwd: Path | None = None) -> tuple[int, str, str]:
        """Status, standard output and standard error of a command."""
        process = self.start(*words, cwd=cwd)
        said, errors = process.communicate(timeout=150)
        return process.returncode, said, errors


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the experiment's parameters come to, in this process."""
    file = tmp_path_factory.mktemp("digest") / "experiment.toml"
    file.write_text(EXPERIMENT)
    run = launch(Experiment.load(file), out=file.parent / "run", local=True)
    return run.summary["params_sha256"]


def wait_for(what: Callable[[], object], words: str) -> None:
    deadline = time.monotonic() + 100
    while not what():
        assert time.monotonic() < deadline, words
        time.sleep(0.02)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.ray
def test_a_submitted_run_survives_its_coordinator_and_is_fetched(
    cluster: Cluster, digest: str, tmp_path: Path
) -> None:
    out, there = tmp_path / "out", tmp_path / "shared" / "run"
    words = ("submit", str(cluster.file), "--name", "first", "--out", str(there))
    job = cluster.start(*words, "--fetch", str(out))
    wait_for(lambda: lines_of(there / "metrics.jsonl") >= 3, "no third round")
    coordinators = [
        pid
        for pid, words in running(cluster.head.process.pid).items()
        if words.startswith("ray::Coordinator")
    ]
    assert len(coordinators) == 1
    os.kill(coordinators[0], signal.SIGKILL)
    said, errors = job.communicate(timeout=150)
    assert job.returncode == 0, (said, errors)
    assert re.search(r"died; going on from round-00000\d \(restart 1 of 3\)\n", said), said
    assert said.splitlines()[-2:] == [str(there), str(out)]
    assert (RunFolder(out, "").read_summary() or {})["params_sha256"] == digest
    assert_every_round_once(out, 8)
    assert (there / "checkpoints").is_dir() and not (out / "checkpoints").exists()

    # Submitted again it finds the finished run; the id is taken.
    status, _, errors = cluster.call(*words)
    assert status == 2 and "--name first: there is a job first already (SUCCEEDED)" in errors
    status, said, _ = cluster.call("jobs", "list", "--json")
    (row,) = (row for row in json.loads(said) if row["id"] == "first")
    assert (row["id"], row["status"], row["exit_status"]) == ("first", "SUCCEEDED", 0)
    assert row["run_folder"] == str(there)
    status, said, _ = cluster.call("jobs", "list")
    assert status == 0 and "first" in said and "SUCCEEDED" in said
    status, said, _ = cluster.call("jobs", "logs", "first")
    assert status == 0 and said.splitlines()[-1] == str(there)
    status, said, errors = cluster.call("jobs", "fetch", "first", str(tmp_path / "later"))
    assert (status, said) == (0, f"{tmp_path / 'later'}\n"), errors
    assert (tmp_path / "later" / "summary.json").is_file()


@pytest.mark.ray
def test_a_stopped_job_saves_its_rounds_and_goes_on_when_submitted_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    there = tmp_path / "run"
    words = ("submit", str(cluster.file), "--out", str(there))
    more = ("--set", "run.rounds=1000", "--set", "run.checkpoint_every=0")
    status, said, errors = cluster.call(*words, *more, "--name", "long", "--no-wait")
    assert status == 0, errors
    assert said == "long\n"
    wait_for(lambda: lines_of(there / "metrics.jsonl") >= 2, "no second round")
    status, said, errors = cluster.call("jobs", "stop", "long")
    assert (status, said) == (0, "long: STOPPED\n"), errors
    assert f"subfleet submit EXPERIMENT.toml --out {there}\n" in errors
    done = lines_of(there / "metrics.jsonl")
    assert RunFolder(there, "").read_summary() is None, "the run was over before it was stopped"
    newest = max((there / "checkpoints").glob("round-*/manifest.json")).parent.name
    assert newest in (f"round-{done:06d}", f"round-{done - 1:06d}")
    status, said, errors = cluster.call("jobs", "stop", "long")
    assert (status, said) == (0, "long: STOPPED\n")
    assert errors.startswith("job long had ended before\n")
    status, said, errors = cluster.call("jobs", "logs", "long", "--follow")
    assert status != 0 and "go on with" in said and "WebSocket" not in errors
    rounds = f"run.rounds={done + 1}"
    status, said, errors = cluster.call(*words, "--set", rounds)
    assert status == 0, (said, errors)
    assert_every_round_once(there, done + 1)
    experiment = Experiment.load(cluster.file, [rounds])
    whole = launch(experiment, out=tmp_path / "whole", local=True)
    summary = RunFolder(there, "").read_summary() or {}
    assert summary["params_sha256"] == whole.summary["params_sha256"]


@pytest.mark.ray
def test_a_failing_job_ends_the_command_with_its_own_status(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "my_fl.py").write_text(OWN)
    file = tmp_path / "own.toml"
    file.write_text(EXPERIMENT.replace('"fedpa"', '"my_fl:Refuses"'))
    out = ("--out", str(tmp_path / "run"))
    status, said, errors = cluster.call("submit", str(file), *out, cwd=tmp_path)
    assert status == 2, (said, errors)
    # The job's code came along: this package and the user's own module.
    assert "error: code from " in said and "py_modules" in said
    assert "FAILED, exit status 2" in errors
    # A job that is refused has no run, even where another job's lies in its folder.
    there, fetched = tmp_path / "of another", tmp_path / "fetched"
    there.mkdir()
    (there / "config.toml").touch()
    file.write_text(f'[data]\nname = "femnist"\nsource = "{tmp_path}/nothing"\n')
    words = ("--name", "refused", "--out", str(there), "--fetch", str(fetched))
    status, said, errors = cluster.call("submit", str(file), *words)
    assert status == 2 and f"{tmp_path}/nothing" in said
    assert errors.index("no run was begun: there is nothing to fetch") < errors.index("FAILED")
    status, _, errors = cluster.call("jobs", "fetch", "refused", str(fetched))
    assert status == 2 and "job refused: was refused before it began a run" in errors
    assert not fetched.exists()


@pytest.mark.ray
def test_rays_own_command_submits_it_too(cluster: Cluster, digest: str, tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2]
    work = tmp_path / "work"
    work.mkdir()
    (work / "subfleet").symlink_to(folder / "subfleet")
    (work / "experiment.toml").write_text(EXPERIMENT)
    command = ("python", "-m", "subfleet", "run", "experiment.toml", "--address", "auto")
    job = cluster.commands.start(
        *("-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.head.url),
        *("--working-dir", str(work), "--", *command, "--out", str(tmp_path / "run")),
    )
    said, errors = job.communicate(timeout=150)
    assert job.returncode == 0, (said, errors)
    assert (RunFolder(tmp_path / "run", "").read_summary() or {})["params_sha256"] == digest


def test_a_job_that_does_not_write_yet_is_spoken_of_until_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subfleet.dashboards.console.SLOW_S", 0.01)
    waited: list[str] = []

    class Slow:
        def follow(self, id: str, write: Callable[[str], None]) -> str:
            wait_for(lambda: waited.append(capsys.readouterr().err) or "".join(waited), "no word")
            write("loading torch ...\n")
            time.sleep(0.1)
            write("done\n")
            return id

    assert _followed(Slow(), "a") == "a"
    assert "".join(waited) == "job a is starting ... 0s\n"
    assert capsys.readouterr() == ("loading torch ...\ndone\n", "")


def test_the_list_of_jobs_cuts_no_folder_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = f"$HOME/subfleet-runs/{'deep/' * 8}subfleet-1a2b3c4d"
    job = JobInfo("subfleet-1a2b3c4d", "FAILED", "python", 1.0, 2.0, 2, "", {"out": folder})
    print_jobs([job_row(job)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert folder in "".join(line.split()[-1] for line in lines if line.strip())
    assert "hidden: entrypoint, seconds, exit (a wider terminal, or --json)" in lines


def test_the_status_of_a_job_is_its_own() -> None:
    def ended(status: str, code: int | None) -> int:
        return exit_status(JobInfo("a", status, "", 1.0, 2.0, code, "", {}))

    assert ended("SUCCEEDED", 0) == 0
    assert ended("FAILED", 2) == 2
    assert ended("FAILED", -9) == 137
    assert ended("FAILED", None) == 1
    assert ended("STOPPED", None) == 143


def test_an_address_where_nobody_answers_is_told_within_seconds(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT)
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    command = [sys.executable, "-m", "subfleet", "submit", str(file), "--address", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"error: --address {url}: nobody answers there" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 30  # most of it for the imports


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("auto", "http://HEAD:8265"),
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("ray://a:10001", "http://HEAD:8265"),
        ("http://a:b", "http://HEAD:8265"),
    ],
)
def test_an_address_of_another_form_is_refused(address: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"is not of the form http://HOST:PORT; .* {meant}, or"):
        checked(address)


class _OtherVersion(BaseHTTPRequestHandler):
    """Answers as the dashboard of an older Ray does."""

    def do_GET(self) -> None:
        body = json.dumps({"version": "4", "ray_version": "2.9.0", "ray_commit": "x"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_a_server_that_never_answers_is_left_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(InputError, match="what answers is no job server of Ray"):
            JobServer(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 10


def test_what_speaks_another_protocol_is_named_without_its_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            caller, _ = server.accept()  # the knock
            caller.close()
            caller, _ = server.accept()
            with caller:
                caller.recv(1024)
                caller.sendall(bytes(range(24)))

        Thread(target=answer, daemon=True).start()
        with pytest.raises(InputError, match=r"no job server of Ray \(it does not speak HTTP\)"):
            JobServer(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_cluster_of_another_ray_is_named_beside_ours() -> None:
    import ray

    server = HTTPServer(("127.0.0.1", 0), _OtherVersion)
    Thread(target=server.serve_forever, daemon=True).start()
    words = f"the cluster runs Ray 2.9.0, this is Ray {ray.__version__}"
    with pytest.raises(InputError, match=words):
        JobServer(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_paths_that_the_cluster_cannot_see_are_refused(tmp_path: Path) -> None:
    def made(**tables: dict) -> str:
        return Experiment(**{"data": {"name": "synthetic_femnist"}} | tables).to_toml()

    with pytest.raises(InputError, match=r"data.source = 'here': is relative"):
        Submission(made(data={"name": "femnist", "source": "here"}))
    with pytest.raises(InputError, match=r"--out here: is relative"):
        Submission(made(), out="here")
    with pytest.raises(InputError, match=r"--restarts -1: is below 0"):
        Submission(made(), restarts=-1)
    with pytest.raises(InputError, match=r"--with .*nothing: there is no such"):
        Submission(made(), more=[tmp_path / "nothing"])
    (tmp_path / "experiment.toml").touch()
    with pytest.raises(InputError, match=r"experiment.toml is sent along already"):
        Submission(made(), more=[tmp_path / "experiment.toml"])
    for name in ("", "a/b", "../a", 'a"; true; "'):
        with pytest.raises(InputError, match=r"is no name of a job"):
            Submission(made(), id=name)
    tables = {"fleet": {"tiers": [{"device": {"trace": "t.csv"}}, {"device": {"trace": "/t"}}]}}
    assert list(relative_paths(tables)) == [("fleet.tiers[0].device.trace", "t.csv")]
    assert list(relative_paths({"data": {"source": "~/a"}, "algorithm": {"source": "b"}})) == []


def test_modules_of_the_users_own_are_sent_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_file.py").write_text("")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)  # where the command starts is enough
    monkeypatch.setattr(sys, "path", list(sys.path))

    def sent(name: str) -> list[Path]:
        data = {"name": "synthetic_femnist"}
        return own_modules(Experiment(data=data, algorithm={"name": name}).to_tables())

    assert sent("own_file:A") == [tmp_path / "own_file.py"]
    assert sent("own_package.deep:A") == [tmp_path / "own_package"]
    assert sent("subfleet.algorithms.fedavg:FedAvg") == sent("fedavg") == []
    with pytest.raises(InputError, match="module 'nowhere' cannot be found here"):
        sent("nowhere:A")


def test_a_fetched_folder_is_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "clients").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "clients" / "a").write_bytes(os.urandom(200_000))
    text = f"warning: before\n{pack(tmp_path / 'run')}\nafter"
    unpack(text, tmp_path / "out")
    there, here = (tmp_path / name / "clients" / "a" for name in ("run", "out"))
    assert there.read_bytes() == here.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clients"]
    for bad in (text[:-20], text[:500] + text[501:]):
        with pytest.raises(RunFailed, match="is damaged"):
            unpack(bad, tmp_path / "bad")
