"""Flower's simulation on one of the workloads: FedAvg, one core a client, no evaluation.

    python benchmarks/peers/flower_side.py small_cnn [--rounds 5]

Needs the environment of flower_requirements.txt. The last line is JSON: the seconds of
each round after the first, and those before the first one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import flwr
import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from sides.workloads import WORKLOADS, train  # noqa: E402

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("workload", choices=WORKLOADS)
arguments.add_argument("--rounds", type=int, default=5)
options = arguments.parse_args()
os.environ["RAY_ADDRESS"] = "local"  # else Ray joins any cluster of which it finds a trace
workload = WORKLOADS[options.workload]
seconds: list[float] = []
began = time.perf_counter()
first_round_end = 0.0


def arrays(model: torch.nn.Module) -> list:
    """The model's parameters as NumPy arrays."""
    return [value.detach().numpy() for value in model.parameters()]


class Client(NumPyClient):
    """A client that trains one epoch on its own rows."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters, config):
        """The trained parameters, the samples, no metrics."""
        torch.set_num_threads(1)
        model = workload.plain_module()
        with torch.no_grad():
            for own, given in zip(model.parameters(), parameters, strict=True):
                own.copy_(torch.from_numpy(given))
        train(model, *workload.rows(self.number), workload.batch)
        return arrays(model), workload.samples, {}


class TimedFedAvg(FedAvg):
    """FedAvg that notes when a round is handed out and when it is merged."""

    def configure_fit(self, *args, **named):
        """As FedAvg's."""
        self.handed_out = time.perf_counter()
        return super().configure_fit(*args, **named)

    def aggregate_fit(self, *args, **named):
        """As FedAvg's."""
        global first_round_end
        merged = super().aggregate_fit(*args, **named)
        now = time.perf_counter()
        first_round_end = first_round_end or now - began
        seconds.append(now - self.handed_out)
        return merged


def client(context) -> object:
    """The client of one simulated node."""
    return Client(int(context.node_config["partition-id"])).to_client()


def server(context) -> ServerAppComponents:
    """All clients are at hand, and a cohort of them trains in each round."""
    strategy = TimedFedAvg(
        fraction_fit=workload.cohort / workload.clients,
        fraction_evaluate=0.0,
        min_available_clients=workload.clients,
        initial_parameters=ndarrays_to_parameters(arrays(workload.plain_module())),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(options.rounds + 1))


run_simulation(
    ServerApp(server_fn=server),
    ClientApp(client_fn=client),
    num_supernodes=workload.clients,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
facts = {"version": flwr.__version__, "first_round_s": first_round_end, "seconds": seconds[1:]}
print(json.dumps(facts))
