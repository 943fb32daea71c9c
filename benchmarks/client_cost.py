"""What a client's round costs by each algorithm, relative to FedAvg's at full width.

    python benchmarks/client_cost.py [--width 0.25] [--rows 230] [--clients 4] [--repeats 5]
                                     [--algorithms stc,pfedme,adds-slim,adds-lrp] [--json]

ADDS's VGG on random images of 28 pixels, batches of 20, three epochs, SGD with momentum, as the
engine runs each on one thread of a CPU: seconds of the processor a client, medians over repeats
in which the algorithms take turns. ADDS's limit is 3.5 times FedAvg: it goes through the network
twice a step. Ends with status 1 where that is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from subfleet import registry
from subfleet.core.algorithm import FULL, Algorithm, Cohort, Setting, TierSize
from subfleet.core.program import LocalRule, Stream
from subfleet.core.scaling import PIXELS
from subfleet.datasets.memory import InMemory
from subfleet.models import vgg
from subfleet.platform.bundles import TrainBundle
from subfleet.platform.engine import Work
from subfleet.platform.record import candidates, possible, variant_name
from subfleet.platform.worker import Worker

PLAIN = "fedavg"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("fedavg", {}),
    "fedprox": ("fedprox", {}),
    "feddrop": ("feddrop", {}),
    "stc": ("stc", {"p_up": 0.2439, "p_down": 0.2439}),
    "pfedme": ("pfedme", {}),
    "adds-slim": ("adds", {}),
    "adds-lrp": ("adds", {"importance": "lrp"}),
}
LIMITS = {"adds-slim": 3.5}


def images(clients: int, rows: int) -> InMemory:
    """Random images and labels, all of them to train on."""
    draw, count = np.random.default_rng(0), clients * rows
    x = draw.integers(0, 255, (count, 1, 28, 28), dtype=np.uint8)
    offsets = np.arange(clients + 1) * rows
    y = draw.integers(0, 62, count)
    return InMemory(x, y, offsets, num_classes=62, scale=PIXELS, train=np.ones(count, bool))


def rounds(algorithm: Algorithm, data: InMemory, clients: int) -> Callable[[], float]:
    """What runs a round of one bundle, and says the processor's seconds a client."""
    net, ids = algorithm.setting.net, np.arange(clients)
    cohort = Cohort(
        id=ids,
        num_samples=data.sizes(ids, "train"),
        tier=np.zeros(clients, np.int16),
        label_counts=data.label_counts(ids),
        last_round=np.full(clients, -1, np.int32),
        report=[None] * clients,
    )
    plan = algorithm.plan(algorithm.init(net.init(0)), cohort, 1)
    ways = possible(net, algorithm.phase(1).program)
    choices = {}
    for task in plan.tasks:
        first, *_ = candidates(net, task.variant, "cpu", "auto", "float32", ways=ways, round=1)
        choices[variant_name(task.variant)] = first
    worker = Worker(Work(net, algorithm, data.scale, 0), data, "cpu")
    bundle = TrainBundle(0, 1, tuple(plan.tasks), choices, 1.0)

    def run() -> float:
        began = time.process_time()
        worker.run(bundle, plan.shared)
        return (time.process_time() - began) / clients

    run()  # traces, and warms up
    return run


def measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds a client and the ratio to FedAvg, by row."""
    net, data = vgg(width=options.width), images(options.clients, options.rows)
    tier = TierSize("all", 1.0, FULL)
    setting = Setting(net, (tier,), LocalRule(0.01, 0.9), Stream(batch=20, epochs=3), 0, 100)
    runs = {}
    for row in dict.fromkeys((PLAIN, *options.algorithms)):
        name, given = ROWS[row]
        runs[row] = rounds(registry.algorithms()[name](setting, **given), data, options.clients)
    turns = [{row: run() for row, run in runs.items()} for _ in range(options.repeats)]
    return {
        row: {
            "seconds": statistics.median(turn[row] for turn in turns),
            "ratio": statistics.median(turn[row] / turn[PLAIN] for turn in turns),
        }
        for row in runs
    }


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in (0, 1]; give a share such as 0.25")
    return value


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=share, default=0.25, help="of the VGG's layers")
    parser.add_argument("--rows", type=count, default=230, help="a client's training rows")
    parser.add_argument("--clients", type=count, default=4, help="in each turn")
    parser.add_argument("--repeats", type=count, default=5, help="turns")
    parser.add_argument("--algorithms", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--json", action="store_true", help="figures for programs")
    options = parser.parse_args(words)
    options.algorithms = options.algorithms.split(",")
    unknown = [row for row in options.algorithms if row not in ROWS]
    if unknown:
        parser.error(f"--algorithms: unknown {', '.join(unknown)}; known: {', '.join(ROWS)}")
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    found = measured(options)
    if options.json:
        print(json.dumps(found))
    else:
        print("| algorithm | ms a client | times FedAvg |\n| --- | ---: | ---: |")
        for row, one in found.items():
            print(f"| {row} | {1e3 * one['seconds']:,.0f} | {one['ratio']:.2f} |")
    missed = [row for row, most in LIMITS.items() if row in found and found[row]["ratio"] > most]
    for row in missed:
        print(f"{row} takes more than {LIMITS[row]} times FedAvg", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
