"""The four workloads: what every side trains, by torch and NumPy alone.

A client's rows are pixels drawn by NumPy's Philox keyed by the client's number, so every
side and every process sees the same bytes without a file. Labels are random too: what is
measured is speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR = 0.01


class PooledCNN(nn.Module):
    """Two padded convolutions, each with a pool of 2, then two linear layers."""

    def __init__(self, channels: tuple[int, int], hidden: int, kernel: int) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(first, second, kernel, padding=kernel // 2)
        self.fc1 = nn.Linear(second * 7 * 7, hidden)
        self.fc2 = nn.Linear(hidden, 62)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [rows, 62] of images [rows, 1, 28, 28]."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class CifarCNN(nn.Module):
    """The CIFAR-10 CNN of pfl-research: two unpadded 3x3 convolutions, one pool, 128 units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(64 * 14 * 14, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [rows, 10] of images [rows, 3, 32, 32]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(F.max_pool2d(x, 2).flatten(1))))


class LogisticRegression(nn.Module):
    """One linear layer over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 62)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [rows, 62] of images [rows, 1, 28, 28]."""
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Workload:
    """One row of the table: a model, its clients, and how they train for one epoch.

    `model` names the product's own network in its zoo. `rounds` are measured in one go
    beside the same number of rounds of the plain loop; an end-to-end run has `run_rounds`.
    `plain_rate` is the plain loop's clients/s on two cores, for estimates of time alone,
    as are those of the `peers`.
    """

    title: str
    model: str
    module: Callable[[], nn.Module]
    clients: int
    cohort: int
    samples: int
    batch: int
    rounds: int
    run_rounds: int
    plain_rate: float
    peers: dict[str, float]
    shape: tuple[int, ...] = (1, 28, 28)
    classes: int = 62

    def plain_module(self) -> nn.Module:
        """The network as a plain module, the same weights each time."""
        torch.manual_seed(0)
        return self.module()

    def pixels(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """One client's rows as they are stored: x uint8 [samples, *shape], y int64."""
        draw = np.random.Generator(np.random.Philox(key=client))
        x = draw.integers(0, 256, (self.samples, *self.shape), dtype=np.uint8)
        return x, draw.integers(0, self.classes, self.samples)

    def rows(self, client: int) -> tuple[Tensor, Tensor]:
        """One client's rows as a network takes them: x float32 from 0 to 1, y int64."""
        x, y = self.pixels(client)
        return torch.from_numpy(x).float().div_(255), torch.from_numpy(y)

    def cohort_of(self, round: int) -> list[int]:
        """The clients of a round."""
        drawn = np.random.default_rng(round).choice(self.clients, self.cohort, replace=False)
        return drawn.tolist()


def train(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    """One epoch of a client as anybody would write it: a fresh SGD optimiser, plain steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    edges = [*range(0, len(y), batch), len(y)]
    for first, last in pairwise(edges):
        optimizer.zero_grad()
        F.cross_entropy(model(x[first:last]), y[first:last]).backward()
        optimizer.step()


WORKLOADS = {
    "leaf_cnn": Workload(
        "LEAF CNN, 6.6 M",
        "leaf_cnn",
        lambda: PooledCNN((32, 64), 2048, 5),
        clients=1_000,
        cohort=20,
        samples=100,
        batch=20,
        rounds=1,
        run_rounds=8,
        plain_rate=8.0,
        peers={"flower": 3.5, "pfl": 6.1},
    ),
    "small_cnn": Workload(
        "CNN 8-16-64, 56 k",
        "small_cnn",
        lambda: PooledCNN((8, 16), 64, 3),
        clients=1_000,
        cohort=100,
        samples=100,
        batch=20,
        rounds=3,
        run_rounds=48,
        plain_rate=91.0,
        peers={"flower": 26.0, "pfl": 76.0},
    ),
    "cifar_cnn": Workload(
        "CIFAR CNN",
        "cifar_cnn",
        CifarCNN,
        clients=1_000,
        cohort=50,
        samples=50,
        batch=10,
        rounds=1,
        run_rounds=8,
        plain_rate=15.0,
        peers={"flower": 9.5, "pfl": 10.0},
        shape=(3, 32, 32),
        classes=10,
    ),
    "logreg": Workload(
        "logistic regression",
        "logreg",
        LogisticRegression,
        clients=10_000,
        cohort=1_000,
        samples=50,
        batch=10,
        rounds=3,
        run_rounds=48,
        plain_rate=1_034.0,
        peers={"flower": 15.0, "pfl": 266.0},
    ),
}
