"""Logistic regression, 1,000 of 10,000 clients a round: subfleet on Ray beside a plain loop.

    python benchmarks/logreg_end_to_end.py [--repeats 5] [--rounds 12]

Both train the same clients on the same bytes (784 -> 62, 50 samples, batch 10, one
epoch, SGD 0.01), drawn by NumPy's Philox keyed by the client's number and held in
memory. The plain loop is two processes of one thread, each with a module and an SGD
optimiser, summing up parameters: no framework at all. Ours is everything: Ray, reading
of blocks, training, indexed reduction, server step, metrics. They alternate in one run.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from subfleet.cluster.start import ray_session
from subfleet.config import Experiment
from subfleet.core.scaling import Scaling
from subfleet.datasets import Block
from subfleet.launch import launch

CLIENTS, COHORT, SAMPLES, BATCH, CLASSES, LR = 10_000, 1_000, 50, 10, 62, 0.01
FLOWER = 15.0  # clients/s that Flower 1.41 reached on two such cores


def client_data(client: int) -> tuple[np.ndarray, np.ndarray]:
    """One client's bytes, the same for both sides."""
    g = np.random.Generator(np.random.Philox(key=client))
    return g.random((SAMPLES, 1, 28, 28), dtype=np.float32), g.integers(0, CLASSES, SAMPLES)


class MemoryStore:
    """A `Federation` over two arrays in shared memory files; every sample trains.

    Rows are as the plain loop has them. One held-out client in five is never evaluated here.
    """

    name, num_clients, num_classes = "philox", CLIENTS, CLASSES
    input_shape, scale = (1, 28, 28), Scaling()

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def _map(self, name: str) -> np.ndarray:
        if name not in self.__dict__:
            self.__dict__[name] = np.load(Path(self.folder) / f"{name}.npy", mmap_mode="r")
        return self.__dict__[name]

    def __reduce__(self) -> tuple:
        return MemoryStore, (self.folder,)

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """Everything trains."""
        return np.full(len(ids), 0 if part == "test" else SAMPLES, np.int64)

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """Rows by class."""
        y = self._map("y")[ids]
        return np.stack([np.bincount(row, minlength=CLASSES) for row in y])

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The rows of the clients."""
        count = 0 if part == "test" else SAMPLES
        x = self._map("x")[ids, :count].reshape(-1, 1, 28, 28)
        y = self._map("y")[ids, :count].reshape(-1)
        return Block(x, y, np.arange(len(ids) + 1) * count)


def prepare(folder: Path) -> None:
    """Draws all clients into two files that live in memory."""
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (CLIENTS, SAMPLES, 1, 28, 28))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.int64, (CLIENTS, SAMPLES))
    for client in range(CLIENTS):
        x[client], y[client] = client_data(client)


def plain_worker(inbox: mp.Queue, outbox: mp.Queue, folder: str) -> None:
    """Half of the plain loop: waits for client numbers, trains them, says how long it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(784, CLASSES)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = (np.load(Path(folder) / f"{n}.npy", mmap_mode="r") for n in ("x", "y"))
    while (clients := inbox.get()) is not None:
        data = [(torch.from_numpy(x[c].copy()), torch.from_numpy(y[c].copy())) for c in clients]
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        began = time.perf_counter()
        for xs, ys in data:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for i in range(0, SAMPLES, BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(xs[i : i + BATCH].flatten(1)), ys[i : i + BATCH]).backward()
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name] += value
        outbox.put(time.perf_counter() - began)


class PlainLoop:
    """Two processes of one thread, kept alive between rounds; their data are read beforehand."""

    def __init__(self, folder: str) -> None:
        context = mp.get_context("spawn")
        self.inboxes, self.outbox = [context.Queue() for _ in range(2)], context.Queue()
        self.processes = [
            context.Process(target=plain_worker, args=(box, self.outbox, folder))
            for box in self.inboxes
        ]
        for process in self.processes:
            process.start()
        self.round(0)  # warm-up: kernels are built on the first call

    def round(self, number: int) -> float:
        """Seconds of one round's training alone: the slower process's."""
        ids = np.random.default_rng(number).choice(CLIENTS, COHORT, replace=False)
        for part, box in enumerate(self.inboxes):
            box.put(ids[part::2].tolist())
        return max(self.outbox.get() for _ in self.inboxes)

    def stop(self) -> None:
        """Ends the processes."""
        for box in self.inboxes:
            box.put(None)
        for process in self.processes:
            process.join()


def ours(folder: str, rounds: int) -> list[float]:
    """Whole seconds of each round but the first, of a run on Ray."""
    experiment = Experiment(
        data={"name": "logreg_end_to_end:MemoryStore", "folder": folder},
        model={"name": "logreg"},
        train={"lr": LR, "batch_size": BATCH, "epochs": 1},
        run={
            "rounds": rounds,
            "cohort": COHORT,
            "eval_every": 0,
            "eval_clients": 1,
            "checkpoint_every": 0,
            "hosts": 2,
        },
    )
    with tempfile.TemporaryDirectory() as out:
        run = launch(experiment, out=Path(out) / "run")
        # The last round evaluates; the first builds kernels.
        return [record["seconds"]["total"] for record in run.metrics[1:-1]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--rounds", type=int, default=12)
    options = arguments.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        prepare(Path(folder))
        plain, mine = PlainLoop(folder), []
        loops = []
        with ray_session(None):
            for repeat in range(options.repeats):
                loops.append(statistics.median(plain.round(10 * repeat + r) for r in range(1, 6)))
                mine.append(statistics.median(ours(folder, options.rounds)))
        plain.stop()
    pairs = [loop / own for loop, own in zip(loops, mine, strict=True)]
    print("| | clients/s, median |")
    print("| --- | ---: |")
    print(f"| plain loop, 2 processes, training alone | {COHORT / statistics.median(loops):,.0f} |")
    print(f"| subfleet on Ray, whole rounds | {COHORT / statistics.median(mine):,.0f} |")
    print(
        f"\nratio {statistics.median(pairs):.2f} (median of {len(pairs)} pairs, "
        f"{min(pairs):.2f} to {max(pairs):.2f})"
    )
    print(
        f"against Flower 1.41's {FLOWER:.0f} clients/s: "
        f"{COHORT / statistics.median(mine) / FLOWER:.0f}x"
    )


if __name__ == "__main__":
    main()
