"""Federated algorithms, one a file; `ALGORITHMS` is what configuration knows by name."""

from subfleet.algorithms.fedavg import FedAvg
from subfleet.algorithms.fedpa import FedPA
from subfleet.algorithms.fedrolex import FedRolex
from subfleet.algorithms.stc import STC
from subfleet.core.algorithm import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedpa": FedPA,
    "fedrolex": FedRolex,
    "stc": STC,
}
