"""The page on models: every block of it runs, and its figures are those of the code."""

from __future__ import annotations

import doctest
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import Page
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.core.units import IndexMap
from subfleet.models import ZOO

PAGE = Page("models.md")
SESSIONS = [
    text for language, text in PAGE.blocks if language == "python" and text.startswith(">>>")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files, from which its modules are imported."""
    with PAGE.written(tmp_path_factory.mktemp("page")) as folder:
        yield folder


def test_the_page_promises_thirty_lines() -> None:
    lines = [
        line for name in ("my_net.py", "my_run.toml") for line in PAGE.files[name].splitlines()
    ]
    assert len([line for line in lines if line.strip() and not line.startswith("# ")]) <= 30


@pytest.mark.parametrize("command", PAGE.commands)
def test_its_commands_run(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "subfleet"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    if arguments[0] == "run":
        assert done.stdout.splitlines()[-1].endswith("runs/mine")
        summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
        assert summary["finished"] and summary["rounds"] == 4


def test_its_script_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / "my_run.py"))
    assert "'phone'" in capsys.readouterr().out


def test_its_sessions_print_what_they_print(folder: Path) -> None:
    session = doctest.DocTestParser().get_doctest("\n".join(SESSIONS), {}, "models.md", None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner()
    assert runner.run(session, out=said.append).failed == 0, "".join(said)
    assert session.examples


def test_every_option_that_it_names_exists() -> None:
    page_help = CliRunner().invoke(app, ["models", "describe", "--help"]).stdout
    for option in ("--convention", "--count-bias", "--count-norm", "--batch", "--optimizer"):
        assert option in PAGE.text and option in page_help


def test_its_table_of_models_is_the_zoo() -> None:
    row = r"^\| `(\w+)` \| ([\w ]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| .+ \|$"
    found = {name: tuple(rest) for name, *rest in re.findall(row, PAGE.text, re.MULTILINE)}
    assert list(found) == sorted(ZOO)
    for name, (shape, *figures) in found.items():
        net = ZOO[name]()
        params, macs = net.stored_params(IndexMap.full(), "local"), net.cost().macs
        assert figures == [f"{net.num_classes:,}", f"{params:,}", f"{macs:,}"], name
        assert tuple(int(n) for n in re.findall(r"\d+", shape)) == net.input_shape, name
