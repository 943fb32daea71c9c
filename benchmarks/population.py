"""What registered clients cost: the same cohort out of 10,000 and out of 1,000,000.

    python benchmarks/population.py [--small 10000] [--large 1000000] [--rounds 20] [--repeats 3]

Runs both populations in turn on Ray and prints, for each, seconds a round (the mean
over whole cycles of five rounds, evaluation and checkpoints included, the first cycle
left out), the start-up until the first round begins, and the peak memory of the
coordinator; then the ratio that matters, large to small, median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

from subfleet.config import Experiment
from subfleet.launch import launch
from subfleet.platform.metrics import read_metrics

CYCLE = 5  # rounds between evaluations


def experiment(clients: int, rounds: int) -> Experiment:
    """Small-CNN rounds of 100 clients in three tiers, 1,000 evaluated every fifth round."""
    tiers = [
        {"name": "high", "share": 0.2, "width": 1.0},
        {"name": "medium", "share": 0.3, "width": 0.5},
        {"name": "low", "share": 0.5, "width": 0.25},
    ]
    return Experiment(
        data={"name": "synthetic_femnist", "clients": clients},
        algorithm={"name": "fedpa"},
        fleet={"tiers": tiers},
        run={"rounds": rounds, "cohort": 100, "eval_every": CYCLE, "eval_clients": 1000},
    )


class Watch(threading.Thread):
    """Sees from outside when the first round ends and how large the coordinator grows."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics = metrics
        self.first_round_end: float | None = None
        self.coordinator_bytes = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Looks every 20 ms for the first line, every second at the memory."""
        looked = 0.0
        while not self.over.wait(0.02):
            now = time.perf_counter()
            begun = self.metrics.exists() and self.metrics.stat().st_size > 0
            if self.first_round_end is None and begun:
                self.first_round_end = now
            if now - looked > 1:
                looked = now
                self.coordinator_bytes = max(self.coordinator_bytes, peak_bytes("ray::Coordinator"))


def peak_bytes(title: str) -> int:
    """The largest peak resident set among processes whose title starts with `title`."""
    most = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(title.encode()):
                for line in (process / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        most = max(most, int(line.split()[1]) * 1024)
        except OSError:
            continue  # it ended while we looked
    return most


def measure(clients: int, rounds: int) -> dict[str, float]:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        watch = Watch(out / "metrics.jsonl")
        started = time.perf_counter()
        watch.start()
        launch(experiment(clients, rounds), out=out)
        watch.over.set()
        watch.join()
        totals = [record["seconds"]["total"] for record in read_metrics(out / "metrics.jsonl")]
    assert watch.first_round_end is not None
    return {
        "round_s": statistics.mean(totals[CYCLE:]),
        "startup_s": watch.first_round_end - started - totals[0],
        "coordinator_gb": watch.coordinator_bytes / 1e9,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--small", type=int, default=10_000)
    arguments.add_argument("--large", type=int, default=1_000_000)
    arguments.add_argument("--rounds", type=int, default=20, help="a multiple of 5, at least 10")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    found: dict[int, list[dict[str, float]]] = {options.small: [], options.large: []}
    for repeat in range(options.repeats):
        # In turn, and each first in half of the repeats: the machine's speed drifts.
        for clients in sorted(found, reverse=bool(repeat % 2)):
            found[clients].append(measure(clients, options.rounds))
    ratios = [
        large["round_s"] / small["round_s"]
        for small, large in zip(found[options.small], found[options.large], strict=True)
    ]
    if options.json:
        print(json.dumps({"runs": found, "ratios": ratios}))
        return
    print("| registered clients | s a round | start-up, s | coordinator, GB |")
    print("| ---: | ---: | ---: | ---: |")
    for clients, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {clients:,} | {middle['round_s']:.3f} | {middle['startup_s']:.1f} "
            f"| {middle['coordinator_gb']:.2f} |"
        )
    print(
        f"\nseconds a round, {options.large:,} to {options.small:,}: "
        f"{statistics.median(ratios):.3f} "
        f"(median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
