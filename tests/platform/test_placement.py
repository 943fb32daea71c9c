"""Hosts go where there is room, and only as many as fit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.platform.placement import Placement, placement


def node(name: str, cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("nodes", "wanted", "device", "placed"),
    [
        ([node("a", 1)], 0, "auto", Placement("cpu", {"a": 1}, 0.0, 0.0)),
        ([node("a", 0)], 0, "auto", Placement("cpu", {}, 0.0, 0.0)),
        ([node("a", 0)], 3, "auto", Placement("cpu", {}, 0.0, 0.0)),
        ([node("a", 2)], 3, "auto", Placement("cpu", {"a": 3}, 0.3333, 0.0)),
        (
            [node("a", 16), node("b", 16)],
            0,
            "auto",
            Placement("cpu", {"a": 16, "b": 16}, 0.9687, 0.0),
        ),
        (
            [node("a", 16), node("b", 16, alive=False)],
            0,
            "cpu",
            Placement("cpu", {"a": 16}, 0.9375, 0.0),
        ),
        ([node("a", 0), node("b", 3)], 0, "cpu", Placement("cpu", {"b": 3}, 0.6666, 0.0)),
        ([node("a", 1), node("b", 3)], 2, "cpu", Placement("cpu", {"b": 2}, 1.0, 0.0)),
        ([node("a", 1), node("b", 1)], 3, "cpu", Placement("cpu", {"a": 2, "b": 1}, 0.3333, 0.0)),
        ([node("a", 16, 2)], 0, "auto", Placement("cuda", {"a": 2}, 1.0, 1.0)),
        ([node("a", 16, 1)], 4, "cuda", Placement("cuda", {"a": 4}, 1.0, 0.25)),
        (
            [node("a", 8, 1), node("b", 8, 2), node("c", 8)],
            0,
            "auto",
            Placement("cuda", {"a": 1, "b": 2}, 1.0, 1.0),
        ),
        ([node("a", 4, 1)], 0, "cpu", Placement("cpu", {"a": 4}, 0.75, 0.0)),
    ],
)
def test_hosts_share_what_the_nodes_have(
    nodes: list[dict[str, Any]], wanted: int, device: str, placed: Placement
) -> None:
    assert placement(nodes, wanted, device) == placed


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=6),
    st.integers(0, 30),
    st.sampled_from(["cpu", "auto"]),
)
def test_what_hosts_reserve_fits_on_every_node(
    sizes: list[tuple[int, int]], wanted: int, device: str
) -> None:
    nodes = [node(str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]
    where = placement(nodes, wanted, device)
    room = any(cpus for cpus, _ in sizes) or (device == "auto" and any(gpus for _, gpus in sizes))
    assert (where.hosts > 0) == room and (not wanted or where.hosts in (0, wanted))
    for name, hosts in where.on.items():
        cpus, gpus = sizes[int(name)]
        assert hosts * where.cpus <= cpus and hosts * where.gpus <= gpus
    assert Counter(where.missing({})) == where.on
    assert where.missing(where.on) == []


def test_a_node_that_joins_gets_its_hosts_and_one_that_is_lost_is_replaced() -> None:
    both = placement([node("a", 2), node("b", 1)], 0, "cpu")
    assert both.missing({"a": 2}) == ["b"]
    # A fixed number goes up only where hosts were lost.
    three = placement([node("a", 2), node("c", 1)], 3, "cpu")
    assert three.missing({"a": 2}) == ["c"]
    assert three.missing({"a": 3}) == []


def test_a_gpu_that_no_node_has_is_refused() -> None:
    with pytest.raises(InputError, match="no node of the cluster has a GPU"):
        placement([node("a", 4)], 0, "cuda")
