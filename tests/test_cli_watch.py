"""`subfleet watch` beside real runs in other processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, running, wait_for_round
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.platform.metrics import read_metrics

LONG = ("--local", "--set", "run.rounds=2000", "--set", "run.eval_every=0")


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Starts commands; at the end nothing of them is left."""
    (tmp_path / "home").mkdir()
    started = Commands(tmp_path / "home")
    yield started
    for process in started.processes:
        for pid in running(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)


def watch(commands: Commands, *arguments: str) -> subprocess.Popen[str]:
    return commands.start("-m", "subfleet", "watch", *arguments)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_words(process: subprocess.Popen[str], words: str) -> None:
    """Reads what a command says until it says this."""
    assert process.stderr is not None
    for said in process.stderr:
        if words in said:
            return
    raise AssertionError(f"it ended without: {words}")


def test_a_run_is_followed_from_before_its_first_round_to_its_table(
    commands: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    device = "fleet.device.failure_rate=0.1"
    run = commands.run(out, "--local", "--set", "run.rounds=20", "--set", device)
    wait_for(out / "config.toml")
    watching = watch(commands, str(out))
    said, heard = run.communicate(timeout=200)
    shown, followed = watching.communicate(timeout=60)
    assert (run.returncode, watching.returncode) == (0, 0), (heard, followed)
    assert shown == said and shown.splitlines()[-1] == str(out)
    assert shown.splitlines()[-2].startswith("simulated: ")
    assert "round 20/20  acc 0." in followed and "0s left" in followed
    # Whoever comes late sees the last rounds, and the same end.
    late = CliRunner().invoke(app, ["watch", str(out), "--last", "3"])
    assert late.exit_code == 0 and late.stdout.splitlines()[-1] == str(out)
    assert "the last 3 rounds" in late.stderr
    assert [row.split()[1] for row in late.stderr.splitlines() if row.startswith("│")] == [
        *("18", "19", "20"),
    ]


def test_a_killed_run_is_named_and_goes_on_by_the_command_that_is_shown(
    commands: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = commands.run(out, *LONG)
    wait_for_round(run, out, 3)
    patient = watch(commands, str(out), "--patience", "200")
    hasty = watch(commands, str(out), "--patience", "1")
    wait_for_words(patient, "round ")
    run.kill()
    run.wait()
    _, said = hasty.communicate(timeout=100)
    assert hasty.returncode == 1
    assert f"run failed: {out} seems to have stopped after " in said
    assert "no process on this machine runs in it" in said
    command = shlex.split(said.splitlines()[-1])
    done = len(list(read_metrics(out / "metrics.jsonl")))
    at = command.index("run")
    assert command[at:] == ["run", str(out / "config.toml"), "--out", str(out), "--resume"]
    more = ("--local", "--set", f"run.rounds={done + 4}")
    again = commands.start("-m", "subfleet", *command[at:], *more)
    _, problem = again.communicate(timeout=200)
    assert again.returncode == 0, problem
    shown, followed = patient.communicate(timeout=60)
    assert patient.returncode == 0, followed
    # Killed just after a checkpoint, it has no round to repeat.
    repeats = f"go on from round {done} " not in said
    assert ("the run was taken up again after round" in followed) == repeats
    assert f"round {done + 4}/{done + 4}" in followed and shown.splitlines()[-1] == str(out)


def test_ctrl_c_ends_the_watching_alone(commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = commands.run(out, *LONG)
    wait_for_round(run, out, 1)
    watching = watch(commands, str(out))
    wait_for_words(watching, "round ")
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert f"no longer watching {out}; the run itself is left alone" in said
    wait_for_round(run, out, 1 + len(list(read_metrics(out / "metrics.jsonl"))))


def test_a_run_whose_time_was_over_says_how_to_go_on(commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = commands.run(out, "--local", "--set", "run.max_seconds=0.1")
    _, problem = run.communicate(timeout=200)
    assert run.returncode == 0, problem
    seen = CliRunner().invoke(app, ["watch", str(out)])
    assert seen.exit_code == 0
    assert "its time was over after 1 of 8 rounds; go on from round 1 with (and" in seen.stderr
    assert "--resume" in seen.stderr and seen.stdout.splitlines()[-1] == str(out)


def test_what_is_no_run_is_named_with_what_to_do(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["watch", *arguments])
        assert result.exit_code == 2 and result.stdout == ""
        return result.stderr

    gone = tmp_path / "gone"
    assert f"{gone}: is no folder of a run; give the folder that" in refused(str(gone))
    assert f"{tmp_path}: holds no run (no config.toml)" in refused(str(tmp_path))
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "config.toml").write_text("")
    named = f"{tmp_path}: holds runs and is none; give one of them, such as {tmp_path / 'cell'}"
    assert named in refused(str(tmp_path))
    assert "environment.json: cannot be read" in refused(str(tmp_path / "cell"))
    assert "--last -1: is below 0" in refused(str(tmp_path), "--last", "-1")
    assert "--patience -2: is below 0" in refused(str(tmp_path), "--patience", "-2")
