"""What writing for TensorBoard costs a run: the writer's own seconds beside the run's.

    python benchmarks/tensorboard_cost.py [--rounds 50] [--json FILE]

Each run is watched in this process, without Ray, by a second writer that is timed. Its share is
its seconds over those of the run without it. Three runs:

    quickstart    the experiment of `subfleet demo`
    short         the same, four clients a round for a single step: rounds of some tens of
                  milliseconds, every one of them evaluated
    wide          ResNet-18, two clients for a single step on one image: 4,800 units in 9 groups

Printed are the share of the clock's seconds and of the processor's, which other programs disturb
less; the median and the longest round of the writer, what it takes to begin and to end; the median
round of the run, and the bytes written. The status is 1 where a share of the processor is above
2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np

from subfleet.config import Experiment
from subfleet.dashboards.tensorboard import TensorBoardWriter
from subfleet.demo import quickstart
from subfleet.launch import launch

LIMIT = 0.02
CHANGES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "short": {
        "run.cohort": 4,
        "run.eval_every": 1,
        "run.eval_clients": 4,
        "train.steps": 1,
        "train.epochs": None,
    },
    "wide": {
        "data.name": "synthetic_cifar10",
        "data.clients": 20,
        "model.name": "resnet18",
        "run.cohort": 2,
        "run.eval_every": 0,
        "run.eval_clients": 1,
        "train.steps": 1,
        "train.epochs": None,
        "train.batch_size": 1,
    },
}


class Timed(TensorBoardWriter):
    """A writer that notes what it takes: seconds of the clock and of the processor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cpu_s = 0.0
        self.calls: list[tuple[str, float]] = []

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started, cpu = perf_counter(), thread_time()
        yield
        self.cpu_s += thread_time() - cpu
        self.calls.append((name, perf_counter() - started))

    def on_start(self, info: dict[str, Any]) -> None:
        """Begins, timed."""
        with self._timed("start"):
            super().on_start(info)

    def on_clients(self, round: int, columns: Mapping[str, np.ndarray]) -> None:
        """Takes the clients' rows, timed."""
        with self._timed("clients"):
            super().on_clients(round, columns)

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Writes a round, timed."""
        with self._timed("round"):
            super().on_round(record, coverage)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Ends, timed."""
        with self._timed("end"):
            super().on_end(summary)

    def seconds(self, name: str) -> list[float]:
        """Of each call of one kind."""
        return [seconds for of, seconds in self.calls if of == name]


def measure(experiment: Experiment) -> dict[str, float]:
    """Figures of one run; seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Timed(Path(folder) / "timed")
        started, cpu = perf_counter(), process_time()
        run = launch(experiment, out=Path(folder) / "run", local=True, observers=[writer])
        run_cpu_s = process_time() - cpu - writer.cpu_s
        spent = sum(seconds for _, seconds in writer.calls)
        clients, rounds = writer.seconds("clients"), writer.seconds("round")
        each = [sum(pair) for pair in zip(clients, rounds, strict=True)]
        return {
            "share": spent / (perf_counter() - started - spent),
            "cpu_share": writer.cpu_s / run_cpu_s,
            "round_s": statistics.median(each),
            "longest_s": max(each),
            "start_s": sum(writer.seconds("start")),
            "end_s": sum(writer.seconds("end")),
            "run_round_s": statistics.median(r["seconds"]["total"] for r in run.metrics),
            "bytes": sum(path.stat().st_size for path in writer.folder.iterdir()),
        }


def table(rows: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| run | share | of the processor | a round | the longest | begin | end | the run's round "
        "| written |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        keys = ("round_s", "longest_s", "start_s", "end_s", "run_round_s")
        cells = [name, *(f"{100 * row[key]:.2f} %" for key in ("share", "cpu_share"))]
        cells += [f"{1e3 * row[key]:.1f} ms" for key in keys]
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 1e3:,.0f} kB |")
    return "\n".join(lines)


def main() -> int:
    """Measures and prints; the status."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=50, help="rounds of each run")
    arguments.add_argument("--runs", nargs="+", choices=CHANGES, default=[*CHANGES])
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    options = arguments.parse_args()
    if options.rounds < 1:
        arguments.error(f"--rounds {options.rounds}: is below 1; give e.g. 50")
    base = quickstart().with_values({"run.rounds": options.rounds})
    rows = {name: measure(base.with_values(CHANGES[name])) for name in options.runs}
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["cpu_share"] > LIMIT for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
