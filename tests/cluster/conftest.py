"""What the tests of clusters share: commands with a home folder of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, running


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
