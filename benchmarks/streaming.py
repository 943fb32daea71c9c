"""What streaming costs: rows held in memory beside rows that Ray Data streams from disk.

    python benchmarks/streaming.py [--repeats 3] [--rounds 48] [--skip-large]

Two workloads, each with the same clients and bytes on both sides: a small CNN (100
clients of 1,000 a round, 100 samples of 28 x 28, batch 20) and logistic regression (1,000 of
10,000, 50 samples, batch 10). "memory": every host holds all rows as arrays. "streamed":
Ray Data reads them from a store, a window of rounds ahead. "mapped": hosts read the store
themselves (run.stream = false). The three alternate; figures are means over the rounds
after the first window, so that the reading of later windows counts. All three must end
with the same parameters.

Then a data set three times the object store trains, streamed, and the memory of all of
Ray's processes is printed as it goes: it must stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from subfleet.cluster.start import ray_session
from subfleet.config import Experiment
from subfleet.core.scaling import INK
from subfleet.datasets import ClientRows, Federation, InMemory, Store, SyntheticFemnist
from subfleet.datasets.published import cache_folder
from subfleet.datasets.reader import Layout
from subfleet.datasets.stream import WINDOW_ROUNDS
from subfleet.datasets.writing import write_store
from subfleet.launch import launch
from subfleet.platform.metrics import read_metrics

WORKLOADS = {
    # model, clients, samples (80 % train), cohort, batch
    "small CNN": ("small_cnn", 1_000, 125, 100, 20),
    "logistic regression": ("logreg", 10_000, 63, 1_000, 10),
}
WAYS = ("memory", "streamed", "mapped")
SMALL_STORE = 100 << 20  # bytes of the object store for the large data set


def stored(source: str, seed: int = 0) -> Federation:
    """The store at `source`."""
    return Store(source, seed)


def in_memory(source: str, seed: int = 0) -> Federation:
    """The same clients as arrays, which every host gets whole."""
    data = Store(source, seed)
    every = np.arange(data.num_clients)
    parts = [data.block(every, part) for part in ("train", "test")]
    owner = np.concatenate([np.repeat(every, np.diff(part.offsets)) for part in parts])
    train = np.repeat([True, False], [len(part.y) for part in parts])
    order = np.argsort(owner, kind="stable")
    return InMemory(
        np.concatenate([part.x for part in parts])[order],
        np.concatenate([part.y for part in parts])[order],
        parts[0].offsets + parts[1].offsets,
        num_classes=data.num_classes,
        scale=data.scale,
        train=train[order],
    )


def make_store(clients: int, samples: int) -> Path:
    """A store of synthetic writers with equally many samples, made once."""
    path = cache_folder() / f"streaming-{clients}-{samples}"
    if path.exists():
        return path
    print(f"making {path} ...", flush=True)
    data = SyntheticFemnist(clients, mean_samples=samples, sigma=0.0)
    layout = Layout(data.num_classes, data.input_shape, scale=INK)
    write_store(path, _clients(data), name="streaming", layout=layout, source={})
    return path


def _clients(data: Federation) -> Iterator[ClientRows]:
    for first in range(0, data.num_clients, 200):
        ids = np.arange(first, min(first + 200, data.num_clients))
        block = data.block(ids, "all")
        for i, client in enumerate(ids):
            rows = slice(block.offsets[i], block.offsets[i + 1])
            test = np.zeros(rows.stop - rows.start, bool)
            yield ClientRows(f"{client:07d}", block.x[rows], block.y[rows], test)


def experiment(workload: str, way: str, rounds: int, store: Path) -> Experiment:
    """One run of a workload with its rows in memory, streamed or mapped."""
    model, _, _, cohort, batch = WORKLOADS[workload]
    factory = "in_memory" if way == "memory" else "stored"
    return Experiment(
        data={"name": f"streaming:{factory}", "source": str(store)},
        model={"name": model},
        algorithm={"name": "fedavg"},
        fleet={"tiers": [{"name": "all", "share": 1.0, "width": 1.0}]},
        train={"lr": 0.02, "batch_size": batch, "epochs": 1},
        run={
            **{"rounds": rounds, "cohort": cohort, "stream": way == "streamed"},
            **{"eval_every": 0, "eval_clients": 10, "checkpoint_every": 0},
        },
    )


def run(workload: str, way: str, rounds: int, store: Path) -> tuple[float, str]:
    """Mean seconds of a round after the first window, and the digest of the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        ended = launch(experiment(workload, way, rounds, store), out=Path(folder) / "run")
        totals = [
            record["seconds"]["total"] for record in read_metrics(ended.path / "metrics.jsonl")
        ]
    return statistics.mean(totals[WINDOW_ROUNDS:]), ended.summary["params_sha256"]


def compare(repeats: int, rounds: int, ways: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Seconds a round of every workload and way."""
    found: dict[str, dict[str, list[float]]] = {}
    for workload, (_, clients, samples, _, _) in WORKLOADS.items():
        store = make_store(clients, samples)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats):
            digests = set()
            # In turn, each first in some repeat: the machine's speed drifts.
            for way in np.roll(list(times), repeat).tolist():
                seconds, digest = run(workload, way, rounds, store)
                times[way].append(seconds)
                digests.add(digest)
            assert len(digests) == 1, f"{workload}: the ways of reading differ in their results"
        found[workload] = times
    return found


class Memory(threading.Thread):
    """The memory of this process and all below it, each second: own, and shared with others."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Adds up proportional set sizes, in which a shared page counts once."""
        while not self.over.wait(1.0):
            self.samples.append(sum(_pss(pid) for pid in _processes()))


def _processes() -> set[int]:
    """This process and all below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # it ended while we looked
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _pss(pid: int) -> int:
    """Proportional set size in bytes, without pages of files (the mapped store is a cache)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"]


@contextmanager
def small_ray() -> Iterator[None]:
    """Ray with a small object store, able to import this file."""
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=SMALL_STORE,
    )
    try:
        yield
    finally:
        ray.shutdown()


def large(rounds: int) -> dict[str, object]:
    """Trains on three times the object store's size; memory in fifths of the run."""
    import ray

    samples = 125
    clients = 3 * SMALL_STORE // (samples * 784) + 1
    store = make_store(clients, samples)
    size = (store / "rows.arrow").stat().st_size
    # `launch` uses the Ray that it finds.
    with small_ray():
        have = int(ray.cluster_resources()["object_store_memory"])
        watch = Memory()
        watch.start()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tables = experiment("small CNN", "streamed", rounds, store)
            launch(tables, out=Path(folder) / "run")
        seconds = time.perf_counter() - started
        watch.over.set()
        watch.join()
    fifths = [max(part) / 1e6 for part in np.array_split(watch.samples, 5) if len(part)]
    return {
        "data_mb": size / 1e6,
        "object_store_mb": have / 1e6,
        "read_mb": rounds * 100 * samples * 0.8 * 784 / 1e6,
        "seconds": seconds,
        "peak_mb_by_fifth": fifths,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--rounds", type=int, default=48, help="more than 16")
    arguments.add_argument("--large-rounds", type=int, default=100)
    arguments.add_argument("--skip-large", action="store_true")
    arguments.add_argument("--skip-mapped", action="store_true")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    with ray_session(None):
        found = compare(options.repeats, options.rounds, WAYS[: 2 if options.skip_mapped else 3])
    big = None if options.skip_large else large(options.large_rounds)
    if options.json:
        print(json.dumps({"seconds": found, "large": big}))
        return
    ways = list(next(iter(found.values())))
    heads = ["workload", *(f"{way}, s a round" for way in ways)]
    print(f"| {' | '.join([*heads, *(f'{way} / memory' for way in ways[1:])])} |")
    print(f"| --- |{' ---: |' * (2 * len(ways) - 1)}")
    for workload, times in found.items():
        cells = [f"{statistics.median(times[way]):.3f}" for way in ways]
        for way in ways[1:]:
            ratios = sorted(a / b for a, b in zip(times[way], times["memory"], strict=True))
            cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})")
        print(f"| {workload} | {' | '.join(cells)} |")
    if big is not None:
        print(
            f"\n{big['data_mb']:.0f} MB of data, {big['object_store_mb']:.0f} MB of object store, "
            f"{big['read_mb']:.0f} MB read in {big['seconds']:.0f} s; peak memory of all "
            "processes in each fifth of the run, MB: "
            + ", ".join(f"{value:.0f}" for value in big["peak_mb_by_fifth"])
        )


if __name__ == "__main__":
    main()
