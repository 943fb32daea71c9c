"""Federated algorithms, one a file; `ALGORITHMS` is what configuration knows by name."""

from subfleet.algorithms.adds import ADDS
from subfleet.algorithms.centralised import Centralised
from subfleet.algorithms.fedavg import FedAvg
from subfleet.algorithms.fedcs import FedCS
from subfleet.algorithms.feddrop import FedDrop
from subfleet.algorithms.fedpa import FedPA
from subfleet.algorithms.fedprox import FedProx
from subfleet.algorithms.fedrolex import FedRolex
from subfleet.algorithms.feduniform import FedUniform
from subfleet.algorithms.pfedme import PFedMe
from subfleet.algorithms.stc import STC
from subfleet.core.algorithm import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "adds": ADDS,
    "centralised": Centralised,
    "fedavg": FedAvg,
    "fedcs": FedCS,
    "feddrop": FedDrop,
    "fedpa": FedPA,
    "fedprox": FedProx,
    "fedrolex": FedRolex,
    "feduniform": FedUniform,
    "pfedme": PFedMe,
    "stc": STC,
}
