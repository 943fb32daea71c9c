"""docs/cluster.md: its commands are understood, and its ports are those of the template."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import Page
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from subfleet.cli import app

PAGE = Page("cluster.md")
LINES = [line for _, text in PAGE.blocks for line in text.splitlines()]


def understood(command: Any, words: list[str]) -> dict[str, Any]:
    """What a command line means to a command or one of its own; raises where it means nothing."""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return command.make_context(command.name, words).params


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("subfleet ")])
def test_our_commands_are_understood(line: str) -> None:
    assert understood(get_command(app), shlex.split(line)[1:])


RAYS = [line for line in LINES if re.match(r"(RAY_\w+=\S+ )*ray ", line)]


@pytest.mark.parametrize("line", RAYS)
def test_rays_commands_are_understood(line: str, root: Path) -> None:
    words = shlex.split(line.partition(" > ")[0])
    given = understood(ray_cli, words[words.index("ray") + 1 :])
    if "entrypoint" in given:  # the job's command is ours
        ours = list(given["entrypoint"])
        assert ours[:3] == ["python", "-m", "subfleet"]
        understood(get_command(app), ours[3:])
    if "cluster_config_file" in given:
        assert (root / given["cluster_config_file"]).is_file()


def test_nodes_started_by_hand_are_those_of_the_template(root: Path) -> None:
    text = (root / "subfleet" / "cluster" / "templates" / "ray-cluster.yaml").read_text()
    template = yaml.safe_load(text)
    for kind, by_hand in zip(
        ("head", "worker"), [r for r in RAYS if "ray start" in r], strict=True
    ):
        (line,) = [c for c in template[f"{kind}_start_ray_commands"] if "ray start" in c]
        line = line.replace("$RAY_HEAD_IP", "HEAD").partition(" --autoscaling-config")[0]
        assert line.partition("ray start ")[2].split() == by_hand.split()[2:]


def test_every_port_that_is_given_is_in_the_table() -> None:
    rows = re.findall(r"^\| ([\d–, ]+?)(?: \(head\))? \|", PAGE.text, re.MULTILINE)
    listed = {number for row in rows for number in re.findall(r"\d+", row)}
    given = {n for line in RAYS for n in re.findall(r"--\S*port=(\d+)", line)}
    assert given and given <= listed
    (firewall,) = re.findall(r"\*\*A firewall\*\* that admits (.*?) from", PAGE.text)
    ends = set(re.findall(r"\d+", firewall))
    # A range is given by its ends; loopback needs no opening.
    assert listed - {"8265"} - {"6380", "6381", "6382", "6383"} == ends


def test_the_versions_are_those_that_were_tested_together(root: Path) -> None:
    (ray,) = re.findall(r"^ray==(.+)$", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert f"Ray {ray} " in PAGE.text
