"""How long partitions take: 50,000 labels to 10,000 clients, 5,000,000 to 100,000.

    python benchmarks/partitions.py [--classes 10 100] [--repeats 3] [--json]

Labels are uniform over the classes, in random order. Prints a row for each kind and
its options: seconds (the least of the repeats) of dealing all rows, by the clock and of
the processor (one thread; the two differ on a busy machine), and of dealing a fifth
as many test rows alike; then what the generator reports.
A Dirichlet that cannot give everyone ten rows makes all its ten draws, the slowest case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from subfleet.datasets.partition import partition, same_distribution

SIZES = ((50_000, 10_000), (5_000_000, 100_000))
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("iid", {}),
    *(("dirichlet", {"alpha": alpha}) for alpha in (1e-3, 0.1, 0.5, 1e3)),
    *(("pathological", {"classes_per_client": 2, "form": form}) for form in ("pfedme", "random")),
    ("pathological", {"classes_per_client": 5, "form": "random"}),
    ("shards", {"shards_per_client": 2}),
    *(("quantity", {"alpha": alpha}) for alpha in (1e-3, 0.5)),
)


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """What the call returns, and the least seconds that it took: by the clock, of the processor."""
    result, clock, cpu = None, float("inf"), float("inf")
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        result = call()
        clock = min(clock, time.perf_counter() - started[0])
        cpu = min(cpu, time.process_time() - started[1])
    return result, clock, cpu


def measure(rows: int, clients: int, classes: int, repeats: int) -> list[dict[str, Any]]:
    """One line a case."""
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(rows) % classes)
    test = draw.permutation(np.arange(rows // 5) % classes)
    lines = []
    for kind, options in CASES:
        part, seconds, cpu = timed(
            lambda k=kind, o=options: partition(k, labels, clients, **o), repeats
        )
        alpha = options.get("alpha")
        _, alike, _ = timed(
            lambda p=part, a=alpha: same_distribution(p, labels, test, 0, alpha=a), repeats
        )
        lines.append(
            {"classes": classes, "options": options, "seconds": seconds, "cpu_seconds": cpu}
            | {"test_seconds": alike}
            | part.report.as_dict()
            | {"rows": rows}
        )
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    lines = [
        line
        for rows, clients in SIZES
        for classes in options.classes
        for line in measure(rows, clients, classes, options.repeats)
    ]
    if options.json:
        print(json.dumps(lines))
        return
    print(
        "| rows | clients | classes | partition | s | CPU s | test s | draws | rows moved | sizes |"
    )
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for line in lines:
        named = ", ".join(f"{name} {value}" for name, value in line["options"].items())
        print(
            f"| {line['rows']:,} | {line['clients']:,} | {line['classes']} "
            f"| {line['kind']} {named} | {line['seconds']:.3f} | {line['cpu_seconds']:.3f} "
            f"| {line['test_seconds']:.3f} | {line['draws']} | {line['moved']:,} "
            f"| {line['smallest']} to {line['largest']} |"
        )


if __name__ == "__main__":
    main()
