"""A workload's clients as a prepared store on disk, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sides.workloads import Workload

from subfleet.core.scaling import PIXELS
from subfleet.datasets import ClientRows, Store
from subfleet.datasets.published import cache_folder
from subfleet.datasets.reader import Layout
from subfleet.datasets.writing import write_store


def opened(source: str, seed: int = 0) -> Store:
    """The data set of a run: all rows of a client train."""
    return Store(source, seed, test_share=0.0)


def made(workload: Workload) -> Path:
    """The workload's store in the cache of prepared data."""
    path = cache_folder() / f"throughput-{workload.model}-{workload.clients}-{workload.samples}"
    if not path.exists():
        layout = Layout(workload.classes, workload.shape, scale=PIXELS)
        write_store(path, _clients(workload), name=workload.model, layout=layout, source={})
    return path


def _clients(workload: Workload) -> Iterator[ClientRows]:
    for client in range(workload.clients):
        x, y = workload.pixels(client)
        yield ClientRows(f"{client:07d}", x, y, np.zeros(len(y), bool))
