"""ClientHost: a long-lived Ray actor that stands for thousands of clients."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray import cloudpickle

from subfleet.core.aggregate import Update
from subfleet.datasets.federation import Federation
from subfleet.platform.bundles import Bundle, BundleResult, Merge
from subfleet.platform.engine import Work
from subfleet.platform.executor import as_tensors
from subfleet.platform.merging import apart
from subfleet.platform.worker import Worker

INLINE_BYTES = 90_000  # Ray itself puts arguments from 100 kB on


@ray.remote
class ClientHost:
    """Runs bundles one after the other on its share of the cores, or of a GPU.

    Restarted by Ray when its process dies; nothing that matters lives in it.
    """

    def __init__(self, work: Work, federation: Federation, device: str):
        self.worker = Worker(work, federation, device)

    def pid(self) -> int:
        """The process behind this host; also says that it is up."""
        return os.getpid()

    def run(
        self, bundle: Bundle, versions: list[int], parts: list[str], *objects: Any
    ) -> BundleResult:
        """Runs one bundle on the trees it names and the tables of its rows.

        `objects`: a tree for each of `versions`, then a table for each of `parts`. Ray
        fetches arguments, but not references inside a list. A merge takes sums alone.
        """
        if isinstance(bundle, Merge):
            return self.worker.merge(bundle, objects)
        trees, tables = objects[: len(versions)], objects[len(versions) :]
        shared = {v: as_tensors(tree) for v, tree in zip(versions, trees, strict=True)}
        by_part: dict[str, list[Any]] = {}
        for part, table in zip(parts, tables, strict=True):
            by_part.setdefault(part, []).append(table)
        return self.worker.run(bundle, shared, by_part)

    @ray.method(num_returns=2)
    def run_apart(self, *args: Any) -> tuple[BundleResult, Update | None]:
        """`run`, with the sum as an object of its own, for a host to take."""
        return apart(self.run(*args))


class Hosts(list[Any]):
    """Host actors, and the references they are made from: gone, Ray could not restart them."""

    def __init__(self, actors: Iterable[Any], made_from: Sequence[Any]):
        super().__init__(actors)
        self.made_from = made_from


def start_hosts(
    count: int, work: Work, federation: Federation, *, device: str, cpus: float, gpus: float
) -> Hosts:
    """Starts `count` hosts, `cpus` and `gpus` each; Ray restarts those that die."""
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}
    actor: Any = ClientHost
    made_from = [_put_if_large(work), _put_if_large(federation)]
    actors = (actor.options(**options).remote(*made_from, device) for _ in range(count))
    return Hosts(actors, made_from)


def _put_if_large(thing: Any) -> Any:
    """A reference where hosts would else get a copy each (word vectors, rows in memory).

    What is small goes along as it is: Ray warns, on the terminal, of references.
    """
    pickled = cloudpickle.dumps(thing)  # pyright: ignore[reportPrivateImportUsage]
    small = len(pickled) < INLINE_BYTES
    return thing if small else ray.put(thing)
