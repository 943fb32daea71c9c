"""FEMNIST in three tiers: what budgeted sub-networks win over the smallest network for all.

    python benchmarks/femnist_tiers.py --source FOLDER [--seeds 0,1,2] [--rounds 100]

FOLDER holds LEAF's train/ and test/ JSON files. Finished cells are kept under
`--out` and not run again. Prints a Markdown table, mean ± sd over the seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from subfleet.config import Experiment
from subfleet.sweep import cells, plus_minus, run_cells, table

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "FedAvg, everybody at full width": {"algorithm.name": "fedavg", "algorithm.width": 1.0},
    "FedPA, tiers 1 / 0.5 / 0.25": {"algorithm.name": "fedpa"},
    "FedAvg, everybody at width 0.5": {"algorithm.name": "fedavg", "algorithm.width": 0.5},
    "FedAvg, everybody at width 0.25": {"algorithm.name": "fedavg", "algorithm.width": 0.25},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--source", required=True, help="folder of LEAF's FEMNIST")
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--rounds", type=int, default=100)
    arguments.add_argument("--out", type=Path, default=Path("cells/femnist_tiers"))
    options = arguments.parse_args()
    base = Experiment.load(ROOT / "examples" / "femnist.toml").with_values(
        {"data.source": str(Path(options.source).resolve()), "run.rounds": options.rounds}
    )
    todo = cells(base, [int(s) for s in options.seeds.split(",")], ARMS, options.out)
    started = time.perf_counter()
    runs = run_cells(todo, say=print)
    print(f"\n{time.perf_counter() - started:.0f} s\n")
    print("| fleet | parameters of a client, mean | accuracy on held-out writers |")
    print("| --- | ---: | ---: |")
    for row in table(todo, runs):
        print(f"| {row['cell']} | {row['params_mean']:,.0f} | {plus_minus(row, 'acc_global')} |")


if __name__ == "__main__":
    main()
