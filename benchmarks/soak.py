"""Whether memory stays level: two thousand short rounds, the resident sets as they go.

    python benchmarks/soak.py [--rounds 2000] [--local] [--json FILE]

Logistic regression, 10 of 200 clients a round, evaluated every tenth round, saved every
fiftieth. Each second the resident sets of the coordinator, of its hosts and of this
process are read, and how much shared memory Ray's object store has in use. What stands
at a tenth of the run (round 200 of 2,000) is compared with what stands at its end, as
medians over a twentieth of the run. Ends with status 1 where the coordinator and hosts
together grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from subfleet.cluster.watch import family, sizes_of, store_bytes
from subfleet.config import Experiment
from subfleet.launch import launch

ALLOWED = 1.05
ROLES = {"coordinator": "ray::Coordinator", "hosts": "ray::ClientHost"}
Sample = dict[str, int]


def experiment(rounds: int) -> Experiment:
    """Rounds so short that what each leaves behind would add up."""
    return Experiment(
        data={"name": "synthetic_femnist", "clients": 200, "mean_samples": 20},
        model={"name": "logreg"},
        algorithm={"name": "fedavg"},
        run={
            "rounds": rounds,
            "cohort": 10,
            "eval_every": 10,
            "eval_clients": 20,
            "checkpoint_every": 50,
        },
    )


class Watch(threading.Thread):
    """Reads the resident sets each second, with the round that was last written down."""

    def __init__(self, metrics: Path, interval_s: float) -> None:
        super().__init__(daemon=True)
        self.metrics, self.interval_s = metrics, interval_s
        self.samples: list[Sample] = []
        self.over = threading.Event()
        self._lines, self._read = 0, 0

    def run(self) -> None:
        """Samples from the first round on."""
        while not self.over.wait(self.interval_s):
            if (round := self._round()) > 0:
                self.samples.append({"round": round, **resident()})

    def _round(self) -> int:
        """The number of lines so far; only what is new is read."""
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            self._lines += new.count(b"\n")
        return self._lines


def resident() -> Sample:
    """Bytes of this process and of what runs below it, by role; and of the object store.

    "own" leaves out mapped files and pages shared with the object store.
    """
    found = {"driver": 0, "object_store": 0}
    found |= {key: 0 for role in ROLES for key in (role, f"{role}, own")}
    for pid in family(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            sizes = sizes_of(Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue  # it ended while we looked
        if pid == os.getpid():
            found["driver"] = sizes["VmRSS"]
        elif "raylet/raylet" in title:
            found["object_store"] += store_bytes(pid)
        for role, start in ROLES.items():
            if title.startswith(start):
                found[role] += sizes["VmRSS"]
                found[f"{role}, own"] += sizes["RssAnon"]
    return found


def middle(samples: list[Sample], first: int, last: int) -> Sample:
    """Medians of the samples of some rounds; the nearest one where there is none."""
    inside = [sample for sample in samples if first <= sample["round"] <= last]
    inside = inside or [min(samples, key=lambda s: abs(s["round"] - (first + last) / 2))]
    return {key: int(statistics.median(s[key] for s in inside)) for key in inside[0]}


def soak(rounds: int, *, local: bool) -> dict[str, Any]:
    """One run and what was seen of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        watch = Watch(out / "metrics.jsonl", interval_s=min(1.0, rounds / 1000))
        watch.start()
        started = time.perf_counter()
        launch(experiment(rounds), out=out, local=local)
        seconds = time.perf_counter() - started
        watch.over.set()
        watch.join()
    workers = ("driver",) if local else tuple(ROLES)
    samples = [sample for sample in watch.samples if all(sample[role] for role in workers)]
    span = max(1, rounds // 20)
    early = middle(samples, rounds // 10, rounds // 10 + span)
    late = middle(samples, rounds - span, rounds)
    grown = sum(late[role] for role in workers) / sum(early[role] for role in workers)
    return {
        "rounds": rounds,
        "seconds": seconds,
        "early": early,
        "late": late,
        "ratio": grown,
        "samples": samples,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=2000)
    arguments.add_argument("--local", action="store_true", help="in this process, without Ray")
    arguments.add_argument("--json", help="a file for all samples; - prints them, and no table")
    options = arguments.parse_args()
    if options.rounds < 10:
        arguments.error(f"--rounds {options.rounds}: give 10 or more")
    print(f"about {15 + 0.1 * options.rounds:.0f} s", file=sys.stderr, flush=True)
    found = soak(options.rounds, local=options.local)
    if options.json == "-":
        print(json.dumps(found))
    elif options.json:
        Path(options.json).write_text(json.dumps(found) + "\n")
    if options.json != "-":
        early, late = found["early"], found["late"]
        print(f"| MB | round {early['round']} | round {late['round']} | ratio |")
        print("| --- | ---: | ---: | ---: |")
        for role in [role for role in early if role != "round" and early[role]]:
            ratio = late[role] / early[role]
            print(f"| {role} | {early[role] / 1e6:,.0f} | {late[role] / 1e6:,.0f} | {ratio:.3f} |")
        print(f"\n{found['rounds']} rounds in {found['seconds']:.0f} s; ", end="")
        print(f"{'this process' if options.local else 'coordinator and hosts'}: ", end="")
        print(f"{found['ratio']:.3f} of round {early['round']}, at most {ALLOWED}")
    if found["ratio"] > ALLOWED:
        sys.exit(1)


if __name__ == "__main__":
    main()
