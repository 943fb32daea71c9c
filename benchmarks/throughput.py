"""Clients a second: the engine alone, whole runs on Ray, and peers, each beside a plain loop.

    python benchmarks/throughput.py [--workload small_cnn] [--kinds engine,end-to-end,peers]

Four workloads of one local epoch each. The plain loop is a module, an SGD optimiser and a
sum in two processes of one thread (one process on a GPU), its rows read beforehand; it
runs beside everything else, in turn, so that ratios outlive a change of machine.

- engine: the engine in two processes of one thread, as hosts are: the same rows in memory,
  no reduction but each bundle's own sum. Needs torch and NumPy alone (and PYTHONPATH=.
  where subfleet is not installed); with --device cuda it runs on a GPU.
- end-to-end: `subfleet run` with two hosts: rows streamed from a store, training,
  reduction, server step, metrics; mean of the rounds in a steady state. Also where a
  round's time goes, and how long the small CNN's first round takes from the command on.
- peers: Flower and pfl, where `make bench-peers` has installed them.

Rates are medians over the pairs, ratios medians with least and most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from sides import matmul, measure, peers
from sides.engine_alone import How
from sides.workloads import WORKLOADS

from subfleet.core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("engine", "end-to-end", "peers")
START_S = {"processes": 8.0, "run": 10.0, "flower": 20.0, "pfl": 10.0, "command": 16.0}
FIRST_ROUNDS = 3


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--workload", action="append", choices=WORKLOADS, help="repeatable; all by default")
    add("--repeats", type=int, default=5, help="pairs of each figure")
    add("--kinds", default="engine,end-to-end,peers", help="of these, with commas between")
    add("--engine", choices=("auto", "loop", "traced", "vmap"), default="auto")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--compiled", action="store_true", help="compile the engine's steps")
    add("--engine-record", help="an engine.json whose choices to use instead")
    add("--mapped", action="store_true", help="hosts read the store themselves: no streaming")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--peers", type=Path, default=ROOT / ".bench-peers", help="where the peers are installed")
    add("--json", help="a file for all figures; - prints them instead of tables")
    options = arguments.parse_args(words)
    options.kinds = [kind for kind in options.kinds.split(",") if kind]
    if wrong := [kind for kind in options.kinds if kind not in KINDS]:
        arguments.error(f"--kinds: {', '.join(wrong)} is none of {', '.join(KINDS)}")
    if options.repeats < 1:
        arguments.error(f"--repeats {options.repeats}: give 1 or more")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            arguments.error("--device cuda: torch sees no GPU here")
        options.kinds = [kind for kind in options.kinds if kind == "engine"]
    options.workload = options.workload or list(WORKLOADS)
    options.installed = peers.installed(options.peers.absolute())
    return options


def estimate(options: argparse.Namespace) -> float:
    """About how many seconds all of it takes on two cores."""
    seconds, repeats = 15.0, options.repeats
    for name in options.workload:
        work = WORKLOADS[name]
        round_s = work.cohort / work.plain_rate
        if "engine" in options.kinds:
            seconds += 2 * START_S["processes"] + 2 * (repeats + 1) * work.rounds * round_s
        if "end-to-end" in options.kinds:
            rounds = work.rounds + work.run_rounds
            seconds += START_S["processes"] + repeats * (START_S["run"] + rounds * round_s)
        for peer in options.installed if "peers" in options.kinds else ():
            seconds += START_S["processes"] + START_S[peer]
            seconds += (repeats + 1) * work.cohort / work.peers[peer] + 3 * work.rounds * round_s
    if "end-to-end" in options.kinds:
        seconds += FIRST_ROUNDS * START_S["command"]
    return seconds


def measured(options: argparse.Namespace, how: How, say: Any) -> dict[str, Any]:
    """All figures that were asked for, by workload and kind."""
    found: dict[str, Any] = {"machine": measure.machine(options.device), "how": vars(how)}
    narrow = how.dtype != "float32" or how.record is not None
    found["matmul_flops_per_s"] = {
        dtype: matmul.rate(options.device, dtype, measure.PROCESSES[options.device], repeats=3)
        for dtype in ("float32", *(["bfloat16"] if narrow else []))
    }
    found["workloads"] = {}
    for name in options.workload:
        figures = found["workloads"][name] = {}
        if "engine" in options.kinds:
            say(f"{name}: engine ...")
            figures["engine"] = measure.engine(name, options.device, how, options.repeats)
        if "end-to-end" in options.kinds:
            say(f"{name}: end to end ...")
            figures["end-to-end"] = measure.end_to_end(
                name, how, options.repeats, stream=not options.mapped
            )
        for peer, python in options.installed.items() if "peers" in options.kinds else ():
            say(f"{name}: {peers.PEERS[peer]} ...")
            figures[peer] = measure.one_peer(peer, python, name, options.repeats)
    if "end-to-end" in options.kinds:
        say("the first round, from the command on ...")
        found["first_round_s"] = measure.first_round(how, FIRST_ROUNDS)
    return found


def print_tables(found: dict[str, Any]) -> None:
    """Everything as Markdown."""
    machine, rates = found["machine"], found["matmul_flops_per_s"]
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "device" and v)
    print(f"\n{machine['device']}; {versions}")
    shares = ", ".join(f"{value / 1e9:,.0f} GFLOP/s {dtype}" for dtype, value in rates.items())
    print(f"large matrix products: {shares}\n")
    print("| workload | side | clients/s | plain loop | ratio | of the product rate |")
    print("| --- | --- | ---: | ---: | --- | ---: |")
    for name, figures in found["workloads"].items():
        for side, one in figures.items():
            dtype = one.get("choice", {}).get("dtype", "float32")
            print(
                f"| {WORKLOADS[name].title} | {_title(side, one)} | {one['own']:,.1f} "
                f"| {one['plain']:,.1f} | {_spread(one)} "
                f"| {100 * one['flops_per_s'] / rates[dtype]:.1f} % |"
            )
    _print_against_peers(found["workloads"])
    _print_phases(found["workloads"])
    if "first_round_s" in found:
        times = sorted(found["first_round_s"])
        spread = f"{statistics.median(times):.1f} s ({times[0]:.1f}–{times[-1]:.1f})"
        print(f"\nfirst round of the small CNN, from the command on: {spread}")


def _title(side: str, one: dict[str, Any]) -> str:
    if side in peers.PEERS:
        return f"{peers.PEERS[side]} {one['version']}"
    choice = one["choice"]
    words = [choice["way"]]
    words += [str(choice["side_by_side"])] if choice["way"] == "vmap" else []
    words += [choice["dtype"]] if choice["dtype"] != "float32" else []
    words += ["compiled"] if choice["compiled"] else []
    if "utilisation" in one:
        busy = one["utilisation"]
        words.append("utilisation unknown" if busy is None else f"GPU {busy:.0f} % busy")
    return f"{side} ({', '.join(words)})"


def _spread(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.2f} ({one['ratio_least']:.2f}–{one['ratio_most']:.2f})"


def _print_against_peers(workloads: dict[str, Any]) -> None:
    """End to end over each peer, both as ratios to the plain loop that ran beside them."""
    for name, figures in workloads.items():
        for peer, title in peers.PEERS.items():
            if peer in figures and "end-to-end" in figures:
                ratio = figures["end-to-end"]["ratio"] / figures[peer]["ratio"]
                print(f"\n{WORKLOADS[name].title}: end to end {ratio:.1f} times {title}")


def _print_phases(workloads: dict[str, Any]) -> None:
    runs = {n: f["end-to-end"]["phases"] for n, f in workloads.items() if "end-to-end" in f}
    if not runs:
        return
    names = list(dict.fromkeys(key for phases in runs.values() for key in phases))
    names = [key for key in names if key not in ("total", "overhead")]
    print(f"\n| ms of a round | {' | '.join(names)} | total | outside training |")
    print(f"| --- |{' ---: |' * (len(names) + 2)}")
    for name, phases in runs.items():
        cells = [f"{1e3 * phases.get(key, 0.0):,.1f}" for key in [*names, "total"]]
        cells.append(f"{100 * phases['overhead']:.1f} %")
        print(f"| {WORKLOADS[name].title} | {' | '.join(cells)} |")


def main() -> None:
    options = parsed()
    how = How(options.engine, options.dtype, options.compiled, options.engine_record)

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    place = "on two quiet cores" if options.device == "cpu" else "on two cores, less on a GPU"
    say(f"about {estimate(options) / 60:.0f} min {place}")
    if "peers" in options.kinds and (missing := peers.PEERS.keys() - options.installed.keys()):
        names = " and ".join(sorted(peers.PEERS[peer] for peer in missing))
        say(f"{names} left out: not in {options.peers}; install with `make bench-peers`")
    try:
        found = measured(options, how, say)
    except InputError as error:
        sys.exit(str(error))
    if options.json == "-":
        print(json.dumps(found))
        return
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print_tables(found)


if __name__ == "__main__":
    main()
