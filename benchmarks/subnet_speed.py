"""What a step of training costs in a sub-network, relative to the full network.

    python benchmarks/subnet_speed.py [--models resnet18 mobilenet_v2] [--widths 1 0.5 0.25]
                                      [--batch 32] [--steps 3] [--repeats 7] [--json]

One client's training as the engine runs it on a CPU (its loop, memory format and one
thread) on random images of 32 pixels: seconds of the processor a step, the clock's on an
idle machine, median over repeats. The widths take turns, so that a machine whose speed
drifts slows all of them. A ratio is the median of the ratios within each turn; beside it
the ratio of multiply-accumulates, which is what could be had. Ends with status 1 where a
ratio misses its target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from subfleet import registry
from subfleet.algorithms.local import cross_entropy
from subfleet.config import ModelTable
from subfleet.core.budget import width_map
from subfleet.core.program import ClientTask, LocalRule, LossProgram, Stream
from subfleet.core.scaling import SIGNED
from subfleet.core.supernet import SuperNetwork
from subfleet.platform import loop
from subfleet.platform.chunks import Chunk
from subfleet.platform.record import candidates
from subfleet.platform.resident import Resident

TARGETS = {
    ("resnet18", 0.5): 0.35,
    ("resnet18", 0.25): 0.13,
    ("mobilenet_v2", 0.5): 0.50,
    ("mobilenet_v2", 0.25): 0.25,
}


@dataclass(frozen=True)
class Images:
    """The rows of one client."""

    x: np.ndarray
    y: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        """Where the client's rows begin and end."""
        return np.array([0, len(self.y)])


class Client:
    """One client of a width, ready to train over and over."""

    def __init__(self, net: SuperNetwork, width: float, batch: int, steps: int) -> None:
        self.steps, map = steps, width_map(net, width)
        variant, rows = net.space.counts(map), batch * steps
        self.macs = net.cost(map).macs
        draw = np.random.default_rng(0)
        images = Images(
            draw.integers(0, 256, (rows, *net.input_shape), np.uint8),
            draw.integers(0, net.num_classes, rows),
        )
        program = LossProgram(cross_entropy, LocalRule(lr=0.01), Stream(batch=batch))
        choice = candidates(
            net, variant, "cpu", "auto", "float32", ways=("traced", "loop"), round=1
        )[0]
        self.chunk = Chunk(
            net=net,
            program=program,
            choice=choice,
            tasks=[ClientTask(0, map, variant, 1.0, rows, 0)],
            positions=[0],
            blocks={"train": images},
            own=[None],
            shared={0: net.init(0)},
            seed=0,
            round=1,
            scale=SIGNED,
        )
        self.resident = Resident(net, map, choice)

    def step_seconds(self) -> float:
        """Trains the client once; seconds of the processor a step."""
        started = time.process_time()
        for _ in loop.run(self.chunk, self.resident):
            pass
        return (time.process_time() - started) / self.steps


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line a width, the first of them the full network."""
    given = {"input_shape": (3, 32, 32), "num_classes": 10}
    net = registry.build_model(ModelTable(name=name), **given)
    widths = [1.0, *(width for width in options.widths if width != 1)]
    clients = [Client(net, width, options.batch, options.steps) for width in widths]
    # Once beforehand: kernels choose their ways, and memory is mapped.
    first = sum(client.step_seconds() * client.steps for client in clients)
    print(f"{name}: about {first * options.repeats:.0f} s more", file=sys.stderr)
    turns = [[client.step_seconds() for client in clients] for _ in range(options.repeats)]
    lines = []
    for i, (width, client) in enumerate(zip(widths, clients, strict=True)):
        ratios = [turn[i] / turn[0] for turn in turns]
        lines.append(
            {
                "model": name,
                "width": width,
                "step_s": statistics.median(turn[i] for turn in turns),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "macs": client.macs,
                "macs_ratio": client.macs / clients[0].macs,
                "target": TARGETS.get((name, width)),
            }
        )
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    arguments.add_argument("--widths", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--steps", type=int, default=3, help="steps of a client")
    arguments.add_argument("--repeats", type=int, default=7, help="turns; medians are shown")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(1)  # as the engine does
    lines = [line for name in options.models for line in measure(name, options)]
    if options.json:
        print(json.dumps(lines))
    else:
        print("| model | width | ms a step | of the full network | least to most | MACs | target |")
        print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
        for line in lines:
            target = "" if line["target"] is None else f"{line['target']:.2f}"
            print(
                f"| {line['model']} | {line['width']:g} | {1e3 * line['step_s']:.1f} "
                f"| {line['ratio']:.3f} | {line['least']:.3f} to {line['most']:.3f} "
                f"| {line['macs_ratio']:.3f} | {target} |"
            )
    if any(line["target"] is not None and line["ratio"] > line["target"] for line in lines):
        sys.exit("a ratio is above its target")


if __name__ == "__main__":
    main()
