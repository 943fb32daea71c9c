"""ClientHost: a long-lived Ray actor that stands for thousands of clients."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RaySystemError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from subfleet.core.aggregate import Update
from subfleet.core.errors import InputError
from subfleet.datasets.federation import Federation
from subfleet.platform.bundles import Bundle, BundleResult, Merge
from subfleet.platform.engine import Work
from subfleet.platform.merging import apart
from subfleet.platform.placement import Placement, placement
from subfleet.platform.ray_executor import as_tensors
from subfleet.platform.worker import Worker

INLINE_BYTES = 90_000  # Ray itself puts arguments from 100 kB on


@ray.remote
class ClientHost:
    """Runs bundles one after the other on its share of the cores, or of a GPU.

    Restarted by Ray when its process dies; nothing that matters lives in it.
    """

    def __init__(self, work: Sealed, federation: Sealed, device: str):
        self.refusal: InputError | None = None
        try:
            self.worker = Worker(work.opened(), federation.opened(), device)
        except InputError as error:
            # Ray would make a text of it. `pid` tells: there are no data on this node, say.
            node = ray.util.get_node_ip_address()
            self.refusal = InputError(f"on the cluster's node {node}: {error}")

    def pid(self) -> int:
        """The process behind this host; also says that it is up, or why it cannot be."""
        if self.refusal is not None:
            raise self.refusal
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


class Sealed:
    """Something that whoever opens it unpickles, so that it hears of what is wrong with it.

    What is large is put into the object store, of which hosts share one copy (word vectors,
    rows in memory). What is small goes along: Ray warns, on the terminal, of references.
    """

    def __init__(self, thing: Any):
        pickled = cloudpickle.dumps(thing)  # pyright: ignore[reportPrivateImportUsage]
        self._content = pickled if len(pickled) < INLINE_BYTES else ray.put(thing)

    def opened(self) -> Any:
        """The thing; raises what its unpickling raised."""
        if isinstance(self._content, bytes):
            return pickle.loads(self._content)
        try:
            return ray.get(self._content)
        except RaySystemError as error:
            raise error.client_exc from None


class Hosts:
    """The host actors of a run: each belongs to a node, and goes and comes with it.

    Ray starts a host anew, on its node, when its process dies. A node that is lost takes its
    hosts along; one that joins gets its own, once `look` has seen it. Whoever holds this may
    be another process than the one that started the first hosts.
    """

    def __init__(self, work: Work, federation: Federation, *, wanted: int, device: str):
        """Starts `wanted` hosts, as many as there is room for where it is 0.

        `device`: "cpu", "cuda" or "auto". InputError when no node has the device.
        """
        self.wanted = wanted
        self.actors: list[Any] = []
        self._nodes: list[str] = []  # of each actor
        # References in them must live as long as Ray may restart a host.
        self._made_from = Sealed(work), Sealed(federation)
        where = placement(ray.nodes(), wanted, device)
        self.device = where.device
        self._start(where, where.missing({}))

    def look(self) -> tuple[list[Any], list[Any]]:
        """Looks at the cluster's nodes; actors that were started, and those lost for good."""
        nodes = ray.nodes()
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        here = list(zip(self.actors, self._nodes, strict=True))
        lost = [actor for actor, node in here if node not in alive]
        for actor in lost:
            ray.kill(actor)
        self.actors = [actor for actor, node in here if node in alive]
        self._nodes = [node for _, node in here if node in alive]
        try:
            where = placement(nodes, self.wanted, self.device)
        except InputError:  # the nodes that had the device are gone; others may come
            return [], lost
        return self._start(where, where.missing(Counter(self._nodes))), lost

    def _start(self, where: Placement, nodes: Sequence[str]) -> list[Any]:
        actor: Any = ClientHost
        started = [
            actor.options(
                num_cpus=where.cpus,
                num_gpus=where.gpus,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(*self._made_from, self.device)
            for node in nodes
        ]
        self.actors += started
        self._nodes += nodes
        return started

    def kill(self) -> None:
        """Ends all hosts."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self._nodes = [], []
