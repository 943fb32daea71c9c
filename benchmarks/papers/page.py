"""The page of a table: how it was made, what came out, and what was written by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subfleet.platform.files import write_atomic
from subfleet.platform.runfolder import environment

BEGIN = "<!-- written by hand: kept when the page is made anew -->"
END = "<!-- end of what is written by hand -->"
FOLDERS = ("--data", "--cache", "--out", "--json")
WIDTH = 70  # of a line of the command, after which the next option begins a new one
PACKAGES = ("torch", "torchvision", "numpy", "ray")


def command(script: str, words: Sequence[str]) -> str:
    """The command as anybody may type it: folders of one machine become their option's name.

    >>> command("a.py", ["--data", "/here/it/is", "--seeds=0,1"])
    'python a.py --data DATA --seeds=0,1'
    """
    lines, before = [f"python {script}"], ""
    for word in words:
        option, equals, _ = word.partition("=")
        if before in FOLDERS:
            word = before.removeprefix("--").upper()
        elif equals and option in FOLDERS:
            word = f"{option}={option.removeprefix('--').upper()}"
        if word.startswith("--") and len(lines[-1]) > WIDTH:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
        before = word
    return " \\\n    ".join(lines)


def heading(title: str, summary: str, command: str, made_on: Iterable[Mapping[str, Any]]) -> str:
    """The title, what was found, the command, the dates, the machines and the versions.

    `made_on` are the environments of the runs; without any it is this process's.
    """
    environments = list(made_on) or [environment()]
    days = sorted({facts["time"][:10] for facts in environments})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machines = "; ".join(sorted({_machine(facts) for facts in environments}))
    parts = [f"# {title}", summary, f"```\n{command}\n```", f"{when}; {machines}."]
    return "\n\n".join(part for part in parts if part)


def _machine(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in PACKAGES)
    machine = f"{facts['cpu']}, {facts['cores_usable']} cores"
    if facts["gpu"]:
        machine += f", {facts['gpus']} × {facts['gpu']}"
    return f"{machine}; Python {facts['python']}, {versions}"


def missing_text(missing: Mapping[str, str]) -> str:
    """Which cells are not in the tables; nothing where all are."""
    if not missing:
        return ""
    lines = [f"* {name}: {why}" for name, why in missing.items()]
    return "## Not in these tables\n\nThe same command goes on with them.\n\n" + "\n".join(lines)


def write(path: Path, parts: Sequence[str], default: str) -> None:
    """Writes the page; what stands between the marks in an older one stays, else `default`."""
    kept = default
    if path.exists():
        _, found, rest = path.read_text().partition(BEGIN)
        inner, closed, _ = rest.partition(END)
        if found and closed:
            kept = inner.strip("\n")
    whole = [part for part in parts if part]
    whole.append(f"{BEGIN}\n\n{kept.strip()}\n\n{END}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n\n".join(whole) + "\n").encode())
