"""Where hosts go: so many on each node of the cluster, and what each reserves there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from subfleet.core.errors import InputError


@dataclass(frozen=True)
class Placement:
    """How many hosts each node should have, by its id, and what a host reserves of its node."""

    device: str
    on: dict[str, int]
    cpus: float
    gpus: float

    @property
    def hosts(self) -> int:
        """How many hosts there are in all."""
        return sum(self.on.values())

    def missing(self, there: Mapping[str, int]) -> list[str]:
        """The node of each host that is still to be started, given those on living nodes.

        A node that has hosts keeps them, and gets no more: what they reserve was counted when
        there were other nodes. Never more in all than the placement has.

        >>> Placement("cpu", {"a": 2, "b": 2}, 1.0, 0.0).missing({"a": 2})
        ['b', 'b']
        >>> Placement("cpu", {"a": 2, "b": 1}, 1.0, 0.0).missing({"a": 3})
        []
        """
        short = [
            node
            for node, wanted in self.on.items()
            for _ in range(0 if there.get(node) else wanted)
        ]
        return short[: max(0, self.hosts - sum(there.values()))]


def placement(nodes: Sequence[dict[str, Any]], wanted: int, device: str) -> Placement:
    """Hosts and their shares; `nodes` as Ray lists them, `wanted` 0 for as many as there is room.

    One host a core, or one a GPU. Hosts leave one core in all to the data tasks
    that feed them; a coordinator reserves nothing. Without a core anywhere there are none, as on
    a head that waits for its nodes.

    >>> node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}
    >>> placement([node], 0, "auto")
    Placement(device='cpu', on={'a': 2}, cpus=0.5, gpus=0.0)
    """
    alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    cpus = {node: int(resources.get("CPU", 0)) for node, resources in alive.items()}
    gpus = {node: int(resources.get("GPU", 0)) for node, resources in alive.items()}
    if device == "cuda" and not sum(gpus.values()):
        raise InputError(
            'run.device = "cuda": no node of the cluster has a GPU; use "auto" or "cpu"'
        )
    on_gpu = device == "cuda" or (device == "auto" and sum(gpus.values()) > 0)
    on = _spread(gpus if on_gpu else cpus, wanted)
    return Placement(
        device="cuda" if on_gpu else "cpu",
        on=on,
        cpus=_share(cpus, on, spare=1),
        gpus=_share(gpus, on, spare=0) if on_gpu else 0.0,
    )


def _spread(room: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Hosts by node: as many as its room, or of `wanted` ones a part in proportion to it."""
    on = {node: 0 if wanted else places for node, places in room.items() if places}
    for _ in range(wanted if on else 0):
        # The node that is least full once it has one more.
        on[min(on, key=lambda node: (on[node] + 1) / room[node])] += 1
    return {node: places for node, places in on.items() if places}


def _share(room: Mapping[str, int], on: Mapping[str, int], spare: int) -> float:
    """What each host gets, at most 1, when `spare` stays free in all: it fits on every node."""
    if not on:
        return 0.0
    total = max(0, sum(room.values()) - spare)
    # Rounded down to what Ray can count, a ten-thousandth.
    shares = [total * 10_000 // sum(on.values()) / 10_000]
    shares += [room[node] * 10_000 // places / 10_000 for node, places in on.items()]
    return min(1.0, *shares)
