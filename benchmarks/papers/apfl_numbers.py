"""What APFL reports, its rows, and what is smaller in the scaled-down tables."""

from __future__ import annotations

from typing import Any

SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cinic10": "CINIC-10"}
PARTITIONS = {"iid": "IID", "dirichlet": "non-IID (Dirichlet 0.5)"}
FLEETS = {"high": "HIGH CAPACITY (50/30/20 %)", "low": "LOW CAPACITY (20/30/50 %)"}
METHODS = {"fedavg": "FedAvg ×0.5", "feduniform": "FedUniform", "fedcs": "FedCS"}

# Accuracy in percent, global / local, of Table 1; FedAvg has one network and one column.
PAPER: dict[str, dict[str, dict[str, str]]] = {
    "cifar10": {
        "iid": {
            "fedavg": "92.10",
            "feduniform-high": "92.58 / 92.55",
            "fedcs-high": "92.74 / 92.75",
            "feduniform-low": "91.66 / 91.68",
            "fedcs-low": "92.63 / 92.64",
        },
        "dirichlet": {
            "fedavg": "89.49",
            "feduniform-high": "92.47 / 92.52",
            "fedcs-high": "93.08 / 93.29",
            "feduniform-low": "92.38 / 92.45",
            "fedcs-low": "92.82 / 93.05",
        },
    },
    "cifar100": {
        "iid": {
            "fedavg": "66.36",
            "feduniform-high": "68.1 / 67.80",
            "fedcs-high": "68.39 / 68.46",
            "feduniform-low": "67.61 / 67.51",
            "fedcs-low": "67.83 / 68.15",
        },
        "dirichlet": {
            "fedavg": "64.6",
            "feduniform-high": "65.83 / 65.46",
            "fedcs-high": "66.01 / 65.60",
            "feduniform-low": "65.69 / 65.39",
            "fedcs-low": "65.86 / 65.44",
        },
    },
    "cinic10": {
        "iid": {
            "fedavg": "77.63",
            "feduniform-high": "79.21 / 79.19",
            "fedcs-high": "79.33 / 79.31",
            "feduniform-low": "78.76 / 78.78",
            "fedcs-low": "79.01 / 79.02",
        },
        "dirichlet": {
            "fedavg": "60.21",
            "feduniform-high": "71.11 / 73.57",
            "fedcs-high": "74.51 / 75.38",
            "feduniform-low": "71.04 / 72.22",
            "fedcs-low": "73.04 / 74.42",
        },
    },
}
ROWS = tuple(PAPER["cifar10"]["iid"])

# What is smaller than in the files.
# Rounds. With the search 8 come before, so that all rows are evaluated in the same ones.
WARM_UP, TRAINING = 7, 20
SMALL: dict[str, Any] = {
    **{"model.width": 0.25, "model.divisor": 2, "model.stem_stride": 2},
    **{"train.epochs": 2, "train.batch_size": 32, "train.lr": 0.01},
    **{"run.rounds": TRAINING, "run.eval_every": 4},
}
SMALL_FEDAVG: dict[str, Any] = {"model.width": 0.125}
SMALL_FEDCS: dict[str, Any] = {
    **{"algorithm.warm_up": WARM_UP, "algorithm.min_units": 2, "algorithm.samples": 128},
    **{"algorithm.lazy": True, "run.rounds": WARM_UP + 1 + TRAINING},
}


def title(row: str) -> str:
    """A row in words."""
    method, _, fleet = row.partition("-")
    return METHODS[method] + (f", {fleet.upper()}" if fleet else "")
