"""What merging costs the coordinator: 8, 64 and 512 partial sums of a 1 M-parameter model.

    python benchmarks/reduce.py [--partials 8,64,512] [--rounds 5] [--json FILE]

This process runs the real round loop and is the coordinator; two hosts on Ray train one client a
bundle, a single step on one image, so that every client makes a partial sum of 8 MB (float64) when
its turn comes. Each number of sums is reduced in two ways, by the same fixed tree:

    linear    every sum comes to the coordinator, which adds them all: n - 1 additions
    tree      hosts merge subtrees of eight; the coordinator adds what is left, eight at most

Printed for each are medians over the rounds: the seconds in which the coordinator merges; its
processor seconds a round in all, with planning and a call for every bundle; and the seconds a
round; and the peak of Ray's object store. Both ways must end with the same parameters, or
the status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.cluster.start import ray_session
from subfleet.cluster.watch import Watch
from subfleet.config import Experiment
from subfleet.launch import assemble
from subfleet.platform.ray_executor import RayExecutor
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

HOSTS = 2
HIDDEN = 1179  # of the small CNN: 999,923 parameters
AROUND = 2  # rounds that do not count: the first warms up, the last evaluates
WAYS = {"linear": False, "tree": True}


def experiment(partials: int, rounds: int) -> Experiment:
    """Rounds of so many clients, each a bundle."""
    return Experiment(
        data={"name": "synthetic_femnist", "clients": partials, "mean_samples": 10},
        model={"name": "small_cnn", "hidden": HIDDEN},
        algorithm={"name": "fedavg"},
        train={"batch_size": 1, "steps": 1},
        run={
            "rounds": rounds + AROUND,
            "cohort": partials,
            "bundle_clients": 1,
            "held_out": 0.0,
            "eval_every": 0,
            "eval_clients": 1,
            "checkpoint_every": 0,
            "engine": "loop",
        },
    )


class Processor:
    """An observer that notes this process's seconds, all threads, at the end of each round."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_start(self, info: dict[str, Any]) -> None:
        """Nothing to note."""

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Notes the seconds so far."""
        self.at.append(time.process_time())

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to note."""


def measure(setting: Experiment, on_hosts: bool) -> dict[str, Any]:
    """One run on a Ray of its own, its sums merged on hosts or all here."""
    job, processor = assemble(setting), Processor()
    with tempfile.TemporaryDirectory() as path, ray_session(None):
        from subfleet.platform.host import Hosts

        hosts = Hosts(job.work, job.federation, wanted=HOSTS, device="cpu")
        executor = RayExecutor(hosts)
        executor.merges = on_hosts
        folder = RunFolder.create(Path(path) / "run", "", "reduce")
        watch = Watch(folder.metrics, ray=True)
        watch.start()
        summary = Rounds(job, executor, folder, [processor]).run()
        watch.stop()
        lines = folder.metrics.read_text().splitlines()[1:-1]
    seconds = [json.loads(line)["seconds"] for line in lines]
    counted = zip(processor.at[:-2], processor.at[1:-1], strict=True)
    return {
        "merging_s": statistics.median(s.get("reduce", 0.0) for s in seconds),
        "server_s": statistics.median(s["server"] for s in seconds),
        "coordinator_cpu_s": statistics.median(after - before for before, after in counted),
        "round_s": statistics.median(s["total"] for s in seconds),
        "object_store_bytes": watch.peaks["object_store"],
        "params_sha256": summary["params_sha256"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| partial sums | merging, linear | tree | coordinator's processor, linear | tree "
        "| a round, linear | tree | object store, linear | tree |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row['partials']}"]
        for key in ("merging_s", "coordinator_cpu_s", "round_s"):
            cells += [f"{row[way][key]:.3f} s" for way in WAYS]
        cells += [f"{row[way]['object_store_bytes'] / 1e6:.0f} MB" for way in WAYS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The options; ends with status 2 for wrong ones."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--partials", default="8,64,512")
    arguments.add_argument("--rounds", type=int, default=5, help="that count, from 1 up")
    arguments.add_argument("--json", help="a file for the figures; - prints them, and no table")
    options = arguments.parse_args(words)
    given = options.partials.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in given):
        arguments.error(f"--partials {options.partials}: give whole numbers from 1 up, e.g. 8,64")
    if options.rounds < 1:
        arguments.error(f"--rounds {options.rounds}: give 1 or more")
    options.partials = [int(part) for part in given]
    return options


def main() -> None:
    options, rows = parsed(), []
    for partials in options.partials:
        setting = experiment(partials, options.rounds)
        row: dict[str, Any] = {"partials": partials}
        for way, on_hosts in WAYS.items():
            row[way] = measure(setting, on_hosts)
            took = f"{partials} partial sums, {way}: {row[way]['round_s']:.2f} s a round"
            print(took, file=sys.stderr, flush=True)
        rows.append(row)
    parameters = sum(value.numel() for value in assemble(setting).work.net.init(0).values())
    found = {"parameters": parameters, "hosts": HOSTS, "rows": rows}
    if options.json == "-":
        print(json.dumps(found))
    else:
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
        print(table(rows))
    for row in rows:
        if row["linear"]["params_sha256"] != row["tree"]["params_sha256"]:
            sys.exit(f"{row['partials']} partial sums: the two ways end with other parameters")


if __name__ == "__main__":
    main()
