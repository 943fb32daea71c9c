"""Ray for the tests of this folder, and the experiment they run on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subfleet.config import Experiment

TABLES = {
    # Local BatchNorm statistics: the clients' own states travel to the hosts and back.
    "data": {"name": "synthetic_femnist", "clients": 40, "mean_samples": 60},
    "model": {"name": "small_cnn", "norm": "batch"},
    "fleet": {
        "tiers": [
            {"name": "high", "share": 0.4, "width": 1.0},
            {"name": "low", "share": 0.6, "width": 0.5},
        ]
    },
    "algorithm": {"name": "fedpa"},
    "train": {"lr": 0.1, "batch_size": 20, "epochs": 1},
    "run": {
        "seed": 3,
        "rounds": 4,
        "cohort": 12,
        "eval_every": 2,
        "eval_clients": 4,
        "checkpoint_every": 1,
    },
}


@pytest.fixture(scope="session")
def mixed_fleet() -> Experiment:
    """FedPA on two tiers, four rounds of a fraction of a second."""
    return Experiment(**TABLES)


def descendants(root: int) -> dict[int, str]:
    """Command lines of the processes below `root`, by process id."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            stat = (folder / "stat").read_text()
            commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: commands[pid] for pid in below if pid in commands and pid != os.getpid()}


@pytest.fixture
def busy_hosts():
    """A function: ids of the host processes of this process's Ray that run a bundle now."""

    def find() -> list[int]:
        return [
            pid for pid, line in descendants(os.getpid()).items() if "ray::ClientHost.run" in line
        ]

    return find
