"""A super-network and its sub-networks in rows: costs by layer, groups, bytes, memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from subfleet.core.bindings import extent, groups_of
from subfleet.core.cost import BYTES_PER_ENTRY, Convention, cost_table
from subfleet.core.memory import Optimizer, training_memory
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.models import explain

Row = dict[str, Any]
OTHERS = "(others)"
ITSELF = "(the module itself)"
_DEFINED = "kept by the model's definition"
_RECURRENT = re.compile(r"(?:weight|bias)_(ih|hh)_(l\d+(?:_reverse)?)")


@dataclass(frozen=True)
class Description:
    """What a sub-network holds and costs.

    `layers`: inputs and units kept and of how many, `params` (all that is trained),
    `weights` and `macs` (as the convention counts), `wire_bytes` (of every tensor).
    `groups`: units kept, and of how many. `memory`: bytes in training, by part.
    """

    layers: list[Row]
    groups: list[Row]
    total: Row
    memory: Row


def describe(
    net: SuperNetwork,
    map: IndexMap,
    *,
    convention: Convention = "macs",
    count_bias: bool = False,
    count_norm: bool = False,
    batch: int = 20,
    optimizer: Optimizer = "sgd",
) -> Description:
    """The sub-network of a map, from the index map alone.

    Raises `InputError` for a map of another network, an unknown convention, ...
    """
    counts, full = net.space.counts_by_group(map), dict(net.space.groups)
    table = cost_table(
        net.layers, net.space, map, convention, count_bias=count_bias, count_norm=count_norm
    )
    entries, trained = _entries(net, map)
    layers = []
    for layer, cost in table:
        skipped = layer.block is not None and counts[layer.block] == 0
        layers.append(
            {
                "layer": layer.name,
                "kind": layer.kind,
                "inputs": 0 if skipped else extent(layer.inputs, counts),
                "inputs_of": extent(layer.inputs, full),
                "units": 0 if skipped else extent(layer.outputs, counts),
                "of": extent(layer.outputs, full),
                "params": trained[layer.name],
                "weights": cost.params,
                "macs": cost.macs,
                "wire_bytes": entries[layer.name] * BYTES_PER_ENTRY,
            }
        )
    if entries[OTHERS]:
        others = dict.fromkeys(layers[0], 0) | {"layer": OTHERS, "kind": ""}
        wire_bytes = entries[OTHERS] * BYTES_PER_ENTRY
        layers.append(others | {"params": trained[OTHERS], "wire_bytes": wire_bytes})
    wire = net.wire_bytes(map)
    used = net.space.used(map)  # a block that is skipped uses none of its own groups
    kept = {group: count if group in used else 0 for group, count in counts.items()}
    total = {
        "units": sum(kept[group] for group in net.space.widths),
        "of": net.space.num_units,
        "params": net.stored_params(map, "local"),
        "weights": sum(cost.params for _, cost in table),
        "macs": sum(cost.macs for _, cost in table),
        "wire_bytes": wire.total,
        "map_bytes": wire.map,
    }
    groups = [{"group": g, "kept": kept[g], "of": size} for g, size in full.items()]
    memory = training_memory(net, map, batch=batch, optimizer=optimizer)
    held = {"batch": batch, "optimizer": optimizer, **memory._asdict(), "total": memory.total}
    return Description(layers, groups, total, held)


def _entries(net: SuperNetwork, map: IndexMap) -> tuple[Counter[str], Counter[str]]:
    """By row of the cost table: entries that a message carries, and those that are trained."""
    names = {layer.name for layer in net.layers}
    entries: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for tensor, shape in net.space.slice_shapes(map).items():
        row = next((name for name in _rows_of(tensor) if name in names), OTHERS)
        entries[row] += math.prod(shape)
        trained[row] += math.prod(shape) if tensor in net.parameters else 0
    return entries, trained


def _rows_of(tensor: str) -> Iterator[str]:
    """The rows that a tensor may be counted in, the likeliest first.

    >>> list(_rows_of("lstm.weight_hh_l0"))
    ['lstm', 'lstm.weight_hh_l0', 'lstm.l0', 'lstm.l0.hh']
    """
    path, _, leaf = tensor.rpartition(".")
    yield path
    yield tensor
    if found := _RECURRENT.fullmatch(leaf):
        yield f"{path}.{found[2]}"
        yield f"{path}.{found[2]}.{found[1]}"


# --- why units are kept ---------------------------------------------------------------------------


def reasons(net: SuperNetwork) -> list[Row]:
    """For each layer its unit groups, or why every sub-network keeps all of its units.

    The network's own module is traced again; what tracing would cut and the network does
    not was kept by whoever defined it, and may have said why.
    """
    findings = explain(net.module(), net.example())
    groups_at = {finding.layer: finding.groups for finding in findings}
    said = {group: why for layer, why in net.fixed.items() for group in groups_at.get(layer, ())}
    rows = []
    for layer, groups, reason in findings:
        own = list(_own_groups(net, layer))
        if groups and not own:
            whys = dict.fromkeys(said.get(group) or _DEFINED for group in groups)
            reason = "; ".join(whys)
        rows.append({"layer": layer or ITSELF, "groups": own, "reason": reason})
    return rows


def _own_groups(net: SuperNetwork, layer: str) -> Collection[str]:
    """The elastic groups that the layer's outputs belong to, by the binding of its weights."""
    found: dict[str, None] = {}
    for row in net.layers:
        if row.name == layer or row.name.startswith(f"{layer}."):
            found |= dict.fromkeys(groups_of(row.outputs))
    return [group for group in found if group in net.elastic]
