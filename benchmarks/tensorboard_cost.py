"""What writing for TensorBoard costs a run: the writer's own seconds beside the run's.

    python benchmarks/tensorboard_cost.py [--rounds N] [--json FILE]

Each run has a process of its own, without Ray, whose own writer is timed. Three runs:

    quickstart    the experiment of `subfleet demo`
    short         the same, four clients a round for a single step: rounds of some tens of
                  milliseconds, every one of them evaluated
    wide          ResNet-18, two clients for a single step on one image: 4,800 units in 9 groups

Printed are its seconds over those of the run without it: of the clock, and of the processor, which
other programs disturb less. Both are of rounds and the end. To begin, TensorBoard is imported: that
comes once a run, however long, and has its own share and milliseconds. Then the median and the
longest round of the writer, what it takes to end, the median round of the run, and the bytes
written. The status is 1 where rounds and end take more than 2 % of the processor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np

import subfleet.launch
from subfleet.config import Experiment
from subfleet.dashboards.tensorboard import TensorBoardWriter
from subfleet.demo import quickstart

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
        self.calls: list[tuple[str, float, float]] = []

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started, cpu = perf_counter(), thread_time()
        yield
        self.calls.append((name, perf_counter() - started, thread_time() - cpu))

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
        return [seconds for of, seconds, _ in self.calls if of == name]

    def spent(self, *names: str) -> np.ndarray:
        """Seconds of all calls of these kinds: of the clock, and of the processor."""
        return np.sum([seconds for of, *seconds in self.calls if of in names], axis=0)


def measure(experiment: Experiment) -> dict[str, float]:
    """Figures of one run in this process, of which it must be the first; seconds and bytes."""
    writers: list[Timed] = []

    def timed(folder: Path) -> Timed:
        writers.append(Timed(folder))
        return writers[0]

    subfleet.launch.TensorBoardWriter = timed  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = perf_counter(), process_time()
        run = subfleet.launch.launch(experiment, out=Path(folder) / "run", local=True)
        took = np.array([perf_counter() - started, process_time() - cpu])
        (writer,) = writers
        start, rest = writer.spent("start"), writer.spent("clients", "round", "end")
        share, cpu_share = (rest / (took - start - rest)).tolist()
        clients, rounds = writer.seconds("clients"), writer.seconds("round")
        each = [sum(pair) for pair in zip(clients, rounds, strict=True)]
        return {
            "share": share,
            "cpu_share": cpu_share,
            "start_share": float((start / (took - start - rest))[1]),
            "round_s": statistics.median(each),
            "longest_s": max(each),
            "start_s": float(start[0]),
            "end_s": float(writer.spent("end")[0]),
            "run_round_s": statistics.median(r["seconds"]["total"] for r in run.metrics),
            "bytes": sum(path.stat().st_size for path in writer.folder.iterdir()),
        }


def measured(names: Iterable[str], rounds: int | None) -> dict[str, dict[str, float]]:
    """Figures by the name of the run, each measured in a new process."""
    base = quickstart() if rounds is None else quickstart().with_values({"run.rounds": rounds})
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        return {
            name: pool.submit(measure, base.with_values(CHANGES[name])).result() for name in names
        }


def table(rows: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| run | rounds and end: clock | processor | begin: processor | begin | a round "
        "| the longest | end | the run's round | written |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        keys = ("start_s", "round_s", "longest_s", "end_s", "run_round_s")
        shares = ("share", "cpu_share", "start_share")
        cells = [name, *(f"{100 * row[key]:.2f} %" for key in shares)]
        cells += [f"{1e3 * row[key]:.1f} ms" for key in keys]
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 1e3:,.0f} kB |")
    return "\n".join(lines)


def main() -> int:
    """Measures and prints; the status."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--rounds", type=int, help="rounds of each run; by default those of the demo"
    )
    arguments.add_argument("--runs", nargs="+", choices=CHANGES, default=[*CHANGES])
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    options = arguments.parse_args()
    if options.rounds is not None and options.rounds < 1:
        arguments.error(f"--rounds {options.rounds}: is below 1; give e.g. 50")
    rows = measured(options.runs, options.rounds)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["cpu_share"] > LIMIT for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
