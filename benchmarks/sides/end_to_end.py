"""Whole runs on Ray: rows streamed from a store, reduction, server step, metrics.

Nothing of Ray is imported until a run begins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sides.engine_alone import How
from sides.workloads import LR, Workload

HOSTS = 2
WINDOW = 16  # rounds that are streamed at a time; the first window's are read before they train
BENCHMARKS = Path(__file__).resolve().parents[1]
SUMS = "waiting, reading, summing"


@dataclass(frozen=True)
class Measured:
    """One run: mean seconds of a round, where they went, and how the engine computed."""

    round_s: float
    phases: dict[str, float]
    choice: dict[str, Any]


def tables(workload: Workload, store: Path, how: How, rounds: int, stream: bool) -> dict[str, Any]:
    """The experiment; options of the engine stand in it only where they are not the default."""
    options = _options(how)
    defaults = _options(How())
    return {
        "data": {"name": "sides.store:opened", "source": str(store)},
        "model": {"name": workload.model},
        "algorithm": {"name": "fedavg"},
        "train": {"lr": LR, "batch_size": workload.batch, "epochs": 1},
        "run": {
            "rounds": rounds,
            "cohort": workload.cohort,
            "hosts": HOSTS,
            "stream": stream,
            "eval_every": 0,
            "eval_clients": 1,
            "checkpoint_every": 0,
            **{key: value for key, value in options.items() if value != defaults[key]},
        },
    }


def _options(how: How) -> dict[str, Any]:
    return {"engine": how.engine, "dtype": how.dtype, "compile": how.compiled}


def run(workload: Workload, store: Path, how: How, stream: bool) -> Measured:
    """One run; the rounds that count are those in a steady state, without the evaluation's."""
    from subfleet.config import Experiment
    from subfleet.launch import launch

    rounds = workload.run_rounds
    experiment = Experiment(**tables(workload, store, how, rounds, stream))
    with tempfile.TemporaryDirectory() as folder:
        ended = launch(experiment, out=Path(folder) / "run", engine_record=how.record)
        first = WINDOW + 1 if rounds > 2 * WINDOW else 2
        records = [r for r in ended.metrics if first <= r["round"] < rounds]
        clients = ended.clients()
        choices = json.loads((ended.path / "engine.json").read_text())["choices"]
    counted = np.isin(clients["round"].to_numpy(), [r["round"] for r in records])
    trained = float(clients["seconds"].to_numpy()[counted].sum()) / len(records) / HOSTS
    phases = breakdown([record["seconds"] for record in records], trained)
    return Measured(phases["total"], phases, choices[-1])


def breakdown(seconds: Sequence[dict[str, float]], trained: float) -> dict[str, float]:
    """Mean seconds of a round by phase.

    `train` is what each host spends on its clients, `trained` seconds; the rest of the
    coordinator's own phase of that name is what hosts wait, read and sum up.

    >>> breakdown([{"plan": 0.1, "train": 2.0, "total": 2.2}], 1.8)["overhead"]
    0.18
    """
    names = dict.fromkeys(name for record in seconds for name in record)
    mean = {n: float(np.mean([record.get(n, 0.0) for record in seconds])) for n in names}
    total, seen = mean.pop("total"), mean.pop("train")
    known = {"train": trained, SUMS: seen - trained, **mean}
    other = total - sum(known.values())
    lost = round((total - trained) / total, 4)
    return {**known, "other": other, "total": total, "overhead": lost}


def first_round(workload: Workload, store: Path, how: How) -> float:
    """Seconds from starting the command `subfleet run` to the end of its first round."""
    import tomli_w

    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "experiment.toml", Path(folder) / "run"
        file.write_text(tomli_w.dumps(tables(workload, store, how, rounds=2, stream=True)))
        command = [sys.executable, "-m", "subfleet", "run", str(file), "--out", str(out)]
        with open(Path(folder) / "log", "w+") as log:
            began = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            metrics = out / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()}")
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.wait()
    return seconds
