"""From what hosts return to the numbers of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from subfleet.core import aggregate
from subfleet.core.algorithm import Reduced, RoundPlan
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.platform.bundles import BundleResult
from subfleet.platform.engine import OK, SKIPPED

_UPLOADED = (
    *("client", "num_samples", "loss", "acc_local", "seconds", "params", "macs", "units"),
    *("flops", "bytes_up", "steps"),
)


@dataclass(frozen=True)
class Evaluated:
    """Accuracy and loss of each view on the evaluated clients, sample-weighted.

    `own` is what `own_accuracy` says of the clients' own networks, empty if not measured.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    samples: int
    own: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def merged(
        cls,
        results: Iterable[BundleResult],
        views: Mapping[str, IndexMap],
        tiers_of: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Evaluated:
        """Sums bundles in order of their number, so that arrival leaves no trace.

        `tiers_of` gives the names of clients' tiers, by which own networks are told apart.
        """
        tables = [r.table for r in sorted(results, key=lambda r: r.number)]
        accuracy, loss, samples = {}, {}, 0
        for name in views:
            correct, lost, count = (
                sum(float(table[f"{name}/{what}"].sum()) for table in tables)
                for what in ("correct", "loss", "count")
            )
            accuracy[name] = correct / count if count else float("nan")
            loss[name] = lost / count if count else float("nan")
            samples = int(count)
        own = {}
        if tiers_of is not None and tables and "own_count" in tables[0]:
            names = ("client", "own_correct", "own_loss", "own_count")
            columns = {name: np.concatenate([table[name] for table in tables]) for name in names}
            own = own_accuracy(columns, tiers_of(columns["client"]))
        return cls(accuracy, loss, samples, own)


def client_columns(
    results: Sequence[BundleResult],
    tier_names: Sequence[str],
    bytes_down: Mapping[int, tuple[int, int]],
    charged: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The columns of `clients/` for one round, a row per client, in bundle order.

    Also `bytes_map`, both ways together, which the parts do not hold. `charged` is the table
    of those who did not train; they come last.
    """
    tables = [*(result.table for result in results), *([charged] if charged else [])]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in _UPLOADED}
    tiers = np.concatenate([table["tier"] for table in tables])
    columns["tier"] = np.array(tier_names)[tiers]
    columns["status"] = np.concatenate([table["status"] for table in tables])
    down = np.array([bytes_down[client] for client in columns["client"].tolist()], np.int64)
    columns["bytes_down"] = down[:, 0]
    columns["bytes_map"] = np.concatenate([table["bytes_map"] for table in tables]) + down[:, 1]
    return columns


def local_accuracy(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean, sample sd and worst tenth of clients' own accuracy before merging, also by tier.

    >>> tiers = np.array(["high", "low", "low"])
    >>> one = local_accuracy({"acc_local": np.array([0.5, 1.0, np.nan]), "tier": tiers})
    >>> one["acc_local"], round(one["acc_local_sd"], 4), one["acc_local_worst10"]
    (0.75, 0.3536, 0.5)
    >>> one["acc_local_tier"]
    {'high': 0.5, 'low': 1.0}
    """
    known = ~np.isnan(columns["acc_local"])
    if not known.any():
        return {}
    accuracy, tiers = columns["acc_local"][known], columns["tier"][known]
    found: dict[str, Any] = _local(accuracy)
    by_tier = {tier: _local(accuracy[tiers == tier]) for tier in np.unique(tiers).tolist()}
    return found | {
        f"{key}_tier": {tier: values[key] for tier, values in by_tier.items()} for key in found
    }


def _local(accuracy: np.ndarray) -> dict[str, float]:
    return {"acc_local": float(np.sort(accuracy).mean())} | over_clients("acc_local", accuracy)


def over_clients(name: str, accuracy: np.ndarray) -> dict[str, float]:
    """Sample sd and worst tenth over clients."""
    ordered = np.sort(accuracy)
    return {
        f"{name}_sd": float(ordered.std(ddof=1)) if len(ordered) > 1 else 0.0,
        f"{name}_worst10": float(ordered[: max(1, len(ordered) // 10)].mean()),
    }


def own_accuracy(columns: Mapping[str, np.ndarray], tiers: np.ndarray) -> dict[str, Any]:
    """What `metrics.jsonl` says of the evaluated clients' own networks; nothing without samples.

    Accuracies and the loss are weighted by samples, the spread is over clients.

    >>> found = own_accuracy(
    ...     {
    ...         "own_correct": np.array([1.0, 4.0, 0.0]),
    ...         "own_loss": np.array([2.0, 3.0, 0.0]),
    ...         "own_count": np.array([2, 8, 0]),
    ...     },
    ...     np.array(["low", "high", "high"]),
    ... )
    >>> found["acc_own"], found["loss_own"], found["acc_own_sd"], found["acc_own_tier"]
    (0.5, 0.5, 0.0, {'high': 0.5, 'low': 0.5})
    """
    tested = columns["own_count"] > 0
    correct, loss, count = (columns[f"own_{n}"][tested] for n in ("correct", "loss", "count"))
    if not len(count):
        return {}
    names, tier = np.unique(tiers[tested], return_inverse=True)
    by_tier = np.bincount(tier, correct) / np.bincount(tier, count)
    return {
        "acc_own": float(correct.sum() / count.sum()),
        **over_clients("acc_own", correct / count),
        "acc_own_tier": dict(zip(names.tolist(), by_tier.tolist(), strict=True)),
        "loss_own": float(loss.sum() / count.sum()),
    }


def round_record(
    round: int,
    columns: dict[str, np.ndarray],
    *,
    phase: str,
    local: Mapping[str, Any] | None,
    evaluated: Evaluated | None,
    coverage: Mapping[str, np.ndarray],
    retries: int,
    trained_s: float,
    out_of_memory: int = 0,
) -> dict[str, Any]:
    """One line of `metrics.jsonl` but its `seconds`; takes `bytes_map` out of the columns.

    `coverage` is what `coverage_counts` says.
    """
    merged = columns["status"] == OK
    trained = np.isin(columns["status"], (OK, SKIPPED))
    samples = columns["num_samples"][merged]
    seen = merged & ~np.isnan(columns["loss"])
    weights = columns["num_samples"][seen]
    record: dict[str, Any] = {
        "round": round,
        "phase": phase,
        "loss_train": float(np.average(columns["loss"][seen], weights=weights))
        if weights.sum()
        else float("nan"),
        **(local or {}),
        "clients": int(merged.sum()),
        "samples": int(samples.sum()),
        "bytes_up": int(columns["bytes_up"].sum()),
        "bytes_down": int(columns["bytes_down"].sum()),
        "bytes_map": int(columns.pop("bytes_map").sum()),
        "flops": float(columns["flops"].sum()),
        "clients_per_s": int(trained.sum()) / trained_s,
        "retries": retries,
        "out_of_memory": out_of_memory,
        "dropped": 0,
        "late": 0,
    }
    if coverage:
        least = {group: int(counts_C.min()) for group, counts_C in coverage.items()}
        record |= {"coverage_min": min(least.values()), "coverage": least}
        if record["clients"]:
            record["keep"] = {
                group: float(counts_C.mean()) / record["clients"]
                for group, counts_C in coverage.items()
            }
    if evaluated is not None:
        tiers = {name: value for name, value in evaluated.accuracy.items() if name != "global"}
        record |= {
            "acc_global": evaluated.accuracy["global"],
            "loss_global": evaluated.loss["global"],
            "acc_tier": tiers,
            **evaluated.own,
        }
    return record


def mean_cost(columns: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Mean parameters and MACs of the sub-networks of a round's clients."""
    return float(columns["params"].mean()), float(columns["macs"].mean())


class Sent(NamedTuple):
    """Bytes that a task's client downloads, the map's part of them, and what it sends at most."""

    down: int
    map: int
    up: int


def sent(net: SuperNetwork, plan: RoundPlan) -> list[Sent]:
    """What each task's client is sent and may send, in order of the tasks.

    Both ways that is the dense sub-network and its map, where the task does not say otherwise.
    """
    cache: dict[tuple[int, bytes], Sent] = {}
    out = []
    for task in plan.tasks:
        key = (task.shared, task.map.key)
        if key not in cache:
            entries = net.space.cut_numel(plan.shared[task.shared], task.map)
            map_bytes = task.map.wire_bytes(net.space)
            dense = 4 * entries + map_bytes
            cache[key] = Sent(dense, map_bytes, dense)
        found = cache[key]
        if task.bytes_down is not None:
            found = found._replace(down=task.bytes_down, map=0)
        out.append(found if task.bytes_up is None else found._replace(up=task.bytes_up))
    return out


def bytes_down(net: SuperNetwork, plan: RoundPlan) -> dict[int, tuple[int, int]]:
    """What each client downloads: (all bytes, the map's part)."""
    messages = zip(plan.tasks, sent(net, plan), strict=True)
    return {task.client: (message.down, message.map) for task, message in messages}


def coverage_counts(net: SuperNetwork, reduced: Reduced) -> dict[str, np.ndarray]:
    """How many clients trained each unit, by group; nothing where updates are collected."""
    return {} if isinstance(reduced, list) else aggregate.coverage_counts(reduced, net.space)
