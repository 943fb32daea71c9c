"""Flower and pfl, each in a virtual environment of its own (`make bench-peers`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1] / "peers"
PATIENCE_S = 3600  # after which a peer hangs: Flower takes ten minutes for logistic regression
PEERS = {"flower": "Flower", "pfl": "pfl"}


def installed(folder: Path) -> dict[str, Path]:
    """The Python of each peer that has its environment in the folder."""
    pythons = {peer: folder / peer / "bin" / "python" for peer in PEERS}
    return {peer: python for peer, python in pythons.items() if python.exists()}


def run(peer: str, python: Path, workload: str, rounds: int) -> dict[str, Any]:
    """Rounds of a workload after a first one: `version`, and `seconds` of each round."""
    script = SCRIPTS / f"{peer}_side.py"
    command = [str(python), str(script), workload, "--rounds", str(rounds)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])
