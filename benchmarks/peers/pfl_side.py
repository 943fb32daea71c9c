"""pfl's simulation on one of the workloads: federated averaging, one process, two threads.

    python benchmarks/peers/pfl_side.py small_cnn [--rounds 5] [--threads 2]

Needs the environment of pfl_requirements.txt. The last line is JSON: the seconds of each
round after the first, and those before the first one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

from sides.workloads import LR, WORKLOADS

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("workload", choices=WORKLOADS)
arguments.add_argument("--rounds", type=int, default=5)
arguments.add_argument("--threads", type=int, default=2)
options = arguments.parse_args()
torch.set_num_threads(options.threads)
workload = WORKLOADS[options.workload]


class Network(torch.nn.Module):
    """The workload's network with the two methods that pfl asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = workload.plain_module()

    def forward(self, x):
        """The body's scores."""
        return self.body(x)

    def loss(self, x, y, eval=False):
        """Mean cross-entropy."""
        return F.cross_entropy(self(x), y)

    def metrics(self, x, y, eval=False):
        """None: nothing is evaluated."""
        return {}


class Stamps(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def after_central_iteration(self, *args, **named):
        """Never asks for an end, and measures nothing else."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def client(number: int) -> Dataset:
    """The rows of one client."""
    return Dataset(list(workload.rows(int(number))), user_id=str(number))


stamps = Stamps()
network = Network()
users = FederatedDataset(client, get_user_sampler("random", list(range(workload.clients))))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=options.rounds + 1,
        evaluation_frequency=1_000_000_000,
        train_cohort_size=workload.cohort,
        val_cohort_size=None,
    ),
    backend=SimulatedBackend(training_data=users, val_data=users),
    model=PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    ),
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LR, local_batch_size=workload.batch
    ),
    model_eval_params=None,
    callbacks=[stamps],
)
ends = stamps.times
rounds = [end - begin for begin, end in itertools.pairwise(ends)]
facts = {"version": "0.6.0", "first_round_s": rounds[0], "seconds": rounds[1:]}
print(json.dumps(facts))
