"""The commands: how errors end, what tables hold, and what help shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.cli_support import reported
from subfleet.core.errors import InputError, RunFailed

runner = CliRunner()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text('[data]\nname = "synthetic_femnist"\n')
    return file


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("train.lr = -1"), 2, "error: train.lr = -1\n"),
        (RunFailed("round 3 turned NaN"), 1, "run failed: round 3 turned NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("no\nsuch key"),
            1,
            "run failed: ValueError: no such key; --debug shows where\n",
        ),
        (AssertionError(), 1, "run failed: AssertionError; --debug shows where\n"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_end_with_their_status_and_one_message(
    error: BaseException, status: int, words: str, debug: bool
) -> None:
    failing = typer.Typer()

    @failing.command()
    @reported
    def fail(debug: bool = False) -> None:
        raise error

    result = runner.invoke(failing, ["--debug"] if debug else [])
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.endswith(words)
    assert ("Traceback" in result.stderr) == debug


def test_what_ends_a_command_by_itself_is_let_through() -> None:
    ending = typer.Typer()

    @ending.command()
    @reported
    def end(debug: bool = False) -> None:
        raise typer.Exit(7)

    result = runner.invoke(ending, [])
    assert (result.exit_code, result.stderr) == (7, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{}", "--set", "train.lr=-1"], "train.lr = -1: must be greater than 0"),
        (["run", "{}", "--set", "train.lrr=1"], "unknown key; did you mean 'lr'?"),
        (["run", "none.toml"], "none.toml: no such file"),
        (["run", "{}", "--resume"], "--resume needs --out"),
        (["run", "{}", "--local", "--address", "auto"], "exclude each other"),
        (["sweep", "{}", "--seeds", "0,x"], "'x' is not a whole number"),
        (["sweep", "{}", "--seeds", "1,1"], "a seed is given twice"),
        (["sweep", "{}", "--set", "train.lr="], "cannot read the values"),
    ],
)
def test_bad_input_ends_with_status_2(arguments: list[str], words: str, small: Path) -> None:
    result = runner.invoke(app, [a.format(small) for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_commands_and_options_end_with_status_2(small: Path) -> None:
    assert runner.invoke(app, ["rum"]).exit_code == 2
    assert runner.invoke(app, ["run", str(small), "--sett", "a.b=1"]).exit_code == 2


@pytest.mark.parametrize("command", [["models", "list"], ["algorithms"], ["data", "list"]])
def test_lists_come_as_a_table_and_as_json(command: list[str]) -> None:
    rows = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    table = runner.invoke(app, command).stdout
    assert rows
    for row in rows:
        assert row["name"] in table
        assert row["what"]


def test_an_algorithm_is_described_with_its_options() -> None:
    found = json.loads(runner.invoke(app, ["algorithms", "stc", "--json"]).stdout)
    assert found["name"] == "stc" and found["paper"] == "Sattler et al. 2020"
    (p_up,) = [option for option in found["options"] if option["name"] == "p_up"]
    assert p_up["default"] == 0.0025 and p_up["needed"] is False
    assert p_up["type"] == "a number or one of 'adds_femnist', 'adds_celeba'"
    assert '"adds_femnist" (0.2439)' in p_up["meaning"]
    table = runner.invoke(app, ["algorithms", "stc"]).stdout
    assert all(option["name"] in table for option in found["options"])
    assert "[algorithm]" in table and "0.2439" in table
    listed = json.loads(runner.invoke(app, ["algorithms", "--json"]).stdout)
    assert found in listed


def test_an_unknown_algorithm_is_not_described() -> None:
    done = runner.invoke(app, ["algorithms", "stx"])
    assert done.exit_code == 2 and "did you mean 'stc'?" in done.stderr


COMMANDS = [
    "run",
    "sweep",
    "models list",
    "models describe",
    "models explain",
    "export",
    "algorithms",
    "data list",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_stay_on_their_lines(command: str) -> None:
    result = runner.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert re.search(rf"^\s+subfleet {command}", result.stdout, re.MULTILINE)


def test_help_is_there_well_under_a_second(root: Path) -> None:
    start = time.perf_counter()
    command = [sys.executable, "-m", "subfleet", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0
    assert time.perf_counter() - start < 2.0  # 0.1 s on an idle machine
    assert runner.invoke(app, ["--version"]).stdout.startswith("subfleet 0.")
