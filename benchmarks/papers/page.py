"""The page of a table: how it was made, what came out, and what was written by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from subfleet.platform.files import write_atomic
from subfleet.platform.runfolder import environment

BEGIN = "<!-- written by hand: kept when the page is made anew -->"
END = "<!-- end of what is written by hand -->"
FOLDERS = ("--data", "--cache", "--out", "--json")
PACKAGES = ("torch", "torchvision", "numpy", "ray")


def command(script: str, words: Sequence[str]) -> str:
    """The command as anybody may type it: folders of one machine become their option's name.

    >>> command("a.py", ["--data", "/here/it/is", "--seeds=0,1"])
    'python a.py --data DATA --seeds=0,1'
    """
    out, before = [], ""
    for word in words:
        option, equals, _ = word.partition("=")
        if before in FOLDERS:
            word = before.removeprefix("--").upper()
        elif equals and option in FOLDERS:
            word = f"{option}={option.removeprefix('--').upper()}"
        out.append(word)
        before = word
    return f"python {script} {shlex.join(out)}".rstrip()


def heading(title: str, command: str) -> str:
    """The title, the command, the date, the machine and the versions."""
    facts = environment()
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in PACKAGES)
    machine = f"{facts['cpu']}, {facts['cores_usable']} cores"
    if facts["gpu"]:
        machine += f", {facts['gpus']} × {facts['gpu']}"
    return (
        f"# {title}\n\n```\n{command}\n```\n\n{datetime.now(UTC):%Y-%m-%d}; {machine}; "
        f"Python {facts['python']}, {versions}."
    )


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
