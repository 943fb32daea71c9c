"""The commands that go on with a run that was interrupted."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from subfleet.platform import checkpoint
from subfleet.platform.files import last_checkpoint
from subfleet.platform.runfolder import RunFolder

SENT_BY = "SUBFLEET_SENT_BY"  # set where `subfleet submit` started the run


def how_to_go_on(
    folder: RunFolder, rounds: int, local: bool, address: str | None
) -> tuple[str, ...]:
    """What an interrupted run left, and the command that takes it up."""
    last = last_checkpoint(folder.metrics)
    if last is None:
        return ("stopped; nothing saved yet",)
    done = f"{checkpoint.number(last)} of {rounds} rounds"
    if SENT_BY in os.environ:
        return (
            f"stopped; {folder.path} holds {done}; go on with the same experiment by",
            f"  subfleet submit EXPERIMENT.toml --out {shlex.quote(str(folder.path))}",
        )
    where = ["--local"] if local else [] if address is None else ["--address", address]
    return (
        f"stopped; {folder.path} holds {done}; go on with",
        f"  {resume_command(folder, where)}",
    )


def resume_command(folder: RunFolder, where: Sequence[str] = ()) -> str:
    """The command that goes on with a run; `where` are its options on where it runs."""
    command = ["run", str(folder.config), "--out", str(folder.path), "--resume", *where]
    return f"{command_name()} {shlex.join(command)}"


def command_name() -> str:
    """How this process was told to run subfleet: the console script, or a Python's `-m`."""
    if Path(sys.argv[0]).name == "__main__.py":
        return shlex.join([sys.executable, "-m", "subfleet"])
    return "subfleet"
