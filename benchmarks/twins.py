"""The synthetic twins beside ADDS's Table 1; that they can be learnt, and that clients differ.

    python benchmarks/twins.py [--seeds 0] [--out cells/twins] [--only celeba,sent140]

Prints two Markdown tables. The first has the statistics of each twin under those
that ADDS reports (its means of FEMNIST and CelebA contradict its totals, so samples
over clients stand there). The second has accuracies of small networks, in percent,
mean over the seeds:

- majority: always the most frequent class; untrained: the network's first weights.
- central: trained on the rows of all training clients, tested on clients held out.
- alone / central on theirs / adapted: of ten clients, tested on their own test rows:
  trained on own rows only; the central network; that network after more steps on own rows.
- FedAvg own / shuffled: on the clients as they are, and with their rows shuffled
  between them, sizes kept; tested on clients held out. A pool is dealt by Dirichlet(0.1).

Finished cells are kept under `--out` by (configuration, seed) and not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subfleet.core.seeds import generator
from subfleet.datasets.census import census
from subfleet.datasets.federation import Block, Federation
from subfleet.datasets.partitioned import Partitioned
from subfleet.datasets.synthetic import TABLE_1, SyntheticFemnist
from subfleet.datasets.twin_celeba import SyntheticCelebA
from subfleet.datasets.twin_images import SyntheticImages
from subfleet.datasets.twin_sent140 import SyntheticSent140
from subfleet.datasets.twin_shakespeare import SyntheticShakespeare

ADDS = {  # clients, samples, classes, samples over clients, sd, least and most classes a client
    "femnist": (1062, 241_756, 62, 241_756 / 1062, 78, 9, 62),
    "celeba": (1213, 47_903, 2, 47_903 / 1213, 11, 1, 2),
    "shakespeare": (528, 625_127, 70, 1183, 1218, 2, 70),
    "sent140": (1330, 57_385, 2, 43, 19, 1, 2),
}


def _pool(preset: str, seed: int, rows: int) -> Partitioned:
    pool = SyntheticImages.like(preset, seed=seed, train=rows, test=0)
    return Partitioned(pool, seed, kind="dirichlet", alpha=0.1, clients=60)


MAKERS: dict[str, Callable[..., Federation]] = {
    "femnist": lambda seed, **options: SyntheticFemnist(seed=seed, **(TABLE_1 | options)),
    "celeba": SyntheticCelebA,
    "shakespeare": SyntheticShakespeare,
    "sent140": SyntheticSent140,
    "cifar10": lambda seed, **options: _pool("cifar10", seed, **options),
    "mnist": lambda seed, **options: _pool("mnist", seed, **options),
}


@dataclass(frozen=True)
class Setup:
    """How one twin is learnt; part of a cell's name, so a change runs it anew."""

    net: str
    lr: float
    epochs: int
    clients: int  # that train
    held: int  # that are held out
    rounds: int
    cohort: int
    seconds: int  # for the estimate: what a cell took where it was measured
    local_epochs: int = 5
    options: dict[str, Any] = field(default_factory=dict)


SETUPS = {
    "femnist": Setup("cnn", 0.05, 6, 30, 20, 16, 8, 45),
    "celeba": Setup("cnn", 0.1, 10, 100, 50, 40, 10, 40, options={"size": 32}),
    "shakespeare": Setup("letters", 0.2, 3, 40, 20, 20, 8, 20, local_epochs=2),
    "sent140": Setup("tweet", 0.5, 10, 300, 100, 40, 20, 15),
    "cifar10": Setup("cnn", 0.1, 8, 48, 12, 20, 8, 35, options={"rows": 7500}),
    "mnist": Setup("cnn", 0.1, 8, 48, 12, 20, 8, 25, options={"rows": 7500}),
}


class Tweet(nn.Module):
    """Each token votes for each class: logistic regression on a bag of words."""

    def __init__(self, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        self.votes = nn.Embedding(vocabulary, num_classes, padding_idx=0)
        nn.init.zeros_(self.votes.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [rows, classes] of tokens [rows, tokens]."""
        return self.votes(x).sum(1)


class Letters(nn.Module):
    """The last eight letters' vectors side by side, then two linear layers."""

    def __init__(self, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 12)
        self.hidden, self.out = nn.Linear(96, 96), nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [rows, classes] of letters [rows, letters]."""
        return self.out(torch.relu(self.hidden(self.embedding(x[:, -8:]).flatten(1))))


def network(kind: str, data: Federation) -> nn.Module:
    """The small network of a setup."""
    if kind != "cnn":
        return (Tweet if kind == "tweet" else Letters)(data.vocabulary, data.num_classes)  # type: ignore[attr-defined]
    channels, size, _ = data.input_shape
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * (size // 4) ** 2, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, data.num_classes))


class Rows:
    """A block's rows as the network takes them."""

    def __init__(self, data: Federation, block: Block) -> None:
        x = torch.from_numpy(block.x)
        tokens = hasattr(data, "vocabulary")
        self.x = x.long() if tokens else data.scale.apply(x.float())
        self.y, self.offsets = torch.from_numpy(block.y), block.offsets

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """The rows of one client."""
        some = slice(int(self.offsets[client]), int(self.offsets[client + 1]))
        return self.x[some], self.y[some]


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int) -> None:
    """Plain SGD in batches of 20."""
    optimiser = torch.optim.SGD(net.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(20):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    guess = torch.cat([net(some).argmax(1) for some in x.split(500)])
    return 100 * (guess == y).float().mean().item()


def fed_avg(net: nn.Module, setup: Setup, rows: Rows, seed: int) -> None:
    """Trains `net` in place: a mean of the clients' networks, weighted by their samples."""
    for round in range(setup.rounds):
        draw = generator(seed, "cohort", round=round)
        total = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
        cohort = draw.choice(setup.clients, setup.cohort, replace=False)
        samples = sum(len(rows.of(client)[1]) for client in cohort)
        for client in cohort:
            own, (x, y) = copy.deepcopy(net), rows.of(client)
            train(own, x, y, setup.lr, setup.local_epochs)
            for name, value in own.state_dict().items():
                total[name] += value * (len(y) / samples)
        net.load_state_dict(total)


def run_cell(data: Federation, setup: Setup, seed: int) -> dict[str, float]:
    """All accuracies of one twin and seed."""
    ids = generator(seed, "clients").permutation(data.num_clients)
    mine, held = np.split(ids[: setup.clients + setup.held], [setup.clients])
    rows, tests = Rows(data, data.block(mine, "train")), Rows(data, data.block(mine[:10], "test"))
    fresh = Rows(data, data.block(held, "all"))
    torch.manual_seed(seed)
    first = network(setup.net, data)
    central = copy.deepcopy(first)
    train(central, rows.x, rows.y, setup.lr, setup.epochs)
    share = torch.bincount(fresh.y).max().item() / len(fresh.y)
    found = {"majority": 100 * share, "untrained": accuracy(first, fresh.x, fresh.y)}
    found["central"] = accuracy(central, fresh.x, fresh.y)
    own = {"alone": (first, 20), "central on theirs": (central, 0), "adapted": (central, 5)}
    for name, (start, epochs) in own.items():
        each = []
        for client in range(10):
            net = copy.deepcopy(start)
            # A fifth of the rate: a client's few rows would unlearn more than they teach.
            lr = setup.lr / 5 if start is central else setup.lr
            train(net, *rows.of(client), lr, epochs)
            each.append(accuracy(net, *tests.of(client)))
        found[name] = float(np.mean(each))
    shuffled = copy.copy(rows)
    order = torch.from_numpy(generator(seed, "shuffled rows").permutation(len(rows.y)))
    shuffled.x, shuffled.y = rows.x[order], rows.y[order]
    for name, some in (("FedAvg own", rows), ("FedAvg shuffled", shuffled)):
        net = copy.deepcopy(first)
        fed_avg(net, setup, some, seed)
        found[name] = accuracy(net, fresh.x, fresh.y)
    return found


def cell(name: str, seed: int, out: Path) -> dict[str, float]:
    """A cell's accuracies, from its file where there is one."""
    data, setup = MAKERS[name](seed=seed, **SETUPS[name].options), SETUPS[name]
    settings = {key: value for key, value in asdict(setup).items() if key != "seconds"}
    facts = [getattr(data, "fingerprint", data.name), settings, seed]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]
    file = out / f"{name}-s{seed}-{digest}.json"
    if not file.exists():
        start = time.perf_counter()
        found = run_cell(data, setup, seed) | {"seconds": time.perf_counter() - start}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1))
    return json.loads(file.read_text())


def print_statistics() -> None:
    """The twins' Table 1, ADDS's figures above ours."""
    print("\n| | clients | samples | classes | mean | sd | least classes | most |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, published in ADDS.items():
        ours = census(MAKERS[name](seed=0))
        keys = ("clients", "samples", "classes_present", "mean", "sd", "classes_min", "classes_max")
        for title, row in ((f"{name}, ADDS", published), ("twin", [ours[key] for key in keys])):
            print(f"| {title} | " + " | ".join(f"{v:,.1f}".removesuffix(".0") for v in row) + " |")


def main() -> None:
    arguments = argparse.ArgumentParser(description="The synthetic twins beside ADDS's Table 1")
    arguments.add_argument("--seeds", default="0")
    arguments.add_argument("--out", type=Path, default=Path("cells/twins"))
    arguments.add_argument("--only", default=",".join(SETUPS))
    options = arguments.parse_args()
    torch.set_num_threads(1)
    names, seeds = options.only.split(","), [int(s) for s in options.seeds.split(",")]
    most = sum(SETUPS[name].seconds for name in names) * len(seeds)
    print(f"{len(names) * len(seeds)} cells, about {most} s where none is finished", flush=True)
    print_statistics()
    rows = {}
    for name in names:
        found = [cell(name, seed, options.out) for seed in seeds]
        rows[name] = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    columns = list(next(iter(rows.values())))
    print("\n| | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.1f}" for key in columns) + " |")


if __name__ == "__main__":
    main()
