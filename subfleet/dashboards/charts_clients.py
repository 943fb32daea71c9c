"""The report's pictures of clients: who is served how well, by which network, on which data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from subfleet.dashboards.comparison import Group, fairness
from subfleet.dashboards.drawing import Drawing, Picture, look, plain
from subfleet.dashboards.read_runs import ReadRun

SHOWN = 60  # clients of a heat map
BARS = 120  # clients of a timeline
_STATUS = {
    "ok": ("#0072B2", "merged"),
    "skipped": ("#CC79A7", "not finite"),
    "late": ("#E69F00", "late"),
    "failed": ("#D55E00", "failed"),
    "unavailable": ("#999999", "left"),
}
_HATCH = {"late": "////", "failed": "xxxx", "unavailable": "....", "skipped": "oooo"}


def distribution(groups: Sequence[Group]) -> Picture | None:
    """The share of clients up to each local accuracy, in the last round that tested them."""
    rows, ends = [], []
    with Drawing() as drawing:
        for number, group in enumerate(groups):
            if not group.clients:
                continue
            accuracy = np.sort(np.concatenate([measured.accuracy for measured in group.clients]))
            if not len(accuracy):
                continue
            share = np.arange(1, len(accuracy) + 1) / len(accuracy)
            style = look(number, len(accuracy))
            drawing.axes.step(accuracy, share, where="post", label=plain(group.label), **style)
            rows += [
                {
                    "group": group.label,
                    "run": measured.run.label,
                    "round": measured.round,
                    "client": client,
                    "tier": tier,
                    "acc_local": float(value),
                }
                for measured in group.clients
                for client, tier, value in zip(
                    *(measured.client.tolist(), measured.tier.tolist(), measured.accuracy),
                    strict=True,
                )
            ]
            found = fairness(accuracy)
            ends.append(
                f"{group.label}: mean {found.mean:.3f}, worst tenth {found.worst10:.3f}, "
                f"sd {found.sd:.3f} over {found.clients:,} clients"
            )
        drawing.axes.set_xlabel("local accuracy")
        drawing.axes.set_ylabel("share of clients up to it")
        drawing.axes.set_ylim(0, 1.03)
        drawing.axes.grid()
        drawing.legend()
    if not rows:
        return None
    title = "Distribution of local accuracy over clients"
    alt = f"{title}, a rising curve a group. {'; '.join(ends)}."
    return Picture("distribution", title, alt, drawing.svg, rows)


def architectures(group: Group) -> Picture | None:
    """Units kept of each group by each client of the last round whose rows are on disk."""
    run, round, table = _last_rows(group, "units")
    if run is None or not run.groups:
        return None
    order = np.lexsort((table["client"].to_numpy(), np.array(table["tier"].to_pylist())))
    table = table.take(order[np.unique(np.linspace(0, len(order) - 1, SHOWN).astype(int))])
    names, sizes = list(run.groups), np.array(list(run.groups.values()))
    kept = [[int(count) for count in text.split()] for text in table["units"].to_pylist()]
    if not kept or any(len(counts) != len(names) for counts in kept) or not names:
        return None
    share = np.array(kept).T / sizes[:, None]
    clients, tiers = table["client"].to_pylist(), table["tier"].to_pylist()
    rows = [
        {"client": c, "tier": t, **dict(zip(names, counts, strict=True))}
        for c, t, counts in zip(clients, tiers, kept, strict=True)
    ]
    title = f"Sub-networks of round {round}: {group.label}"
    alt = (
        f"Heat map for {run.label}, round {round}: the share of units kept in {len(names)} groups "
        f"by {len(clients)} clients, in order of tier; {share.mean():.2f} in the mean, "
        f"from {share.min():.2f} to {share.max():.2f}."
    )
    svg = _heat(share, names, f"{len(clients)} clients, by tier", "share of units kept", vmax=1.0)
    return Picture(f"units-{group.label}", title, alt, svg, rows)


def coverage(group: Group) -> Picture | None:
    """Share of the merged clients that trained a unit, by unit group and round, in the first run.

    A mean over the units of a group: below 1 where some clients train a part of it.
    """
    run = next((run for run in group.runs if any("keep" in r for r in run.records)), None)
    if run is None:
        return None
    told = [record for record in run.records if isinstance(record.get("keep"), dict)]
    names = list(dict.fromkeys(name for record in told for name in record["keep"]))
    share = np.array([[r["keep"].get(name, np.nan) for r in told] for name in names], float)
    rows = [
        {"round": r["round"]}
        | {f"keep {name}": r["keep"].get(name) for name in names}
        | {f"least {name}": (r.get("coverage") or {}).get(name) for name in names}
        for r in told
    ]
    span = f"rounds {told[0]['round']} to {told[-1]['round']}"
    title = f"Coverage of the super-network: {group.label}"
    alt = (
        f"Heat map for {run.label}, {span}: the share of merged clients that trained a unit, mean "
        f"over each of {len(names)} groups; from {np.nanmin(share):.2f} to {np.nanmax(share):.2f}."
    )
    svg = _heat(share, names, span, "share of clients", vmax=1.0)
    return Picture(f"coverage-{group.label}", title, alt, svg, rows)


def skew(run: ReadRun) -> Picture | None:
    """Training rows by class of some clients, as shares of each client's."""
    if run.labels is None or not run.labels.num_rows:
        return None
    table = run.labels
    table = table.take(np.unique(np.linspace(0, table.num_rows - 1, SHOWN).astype(int)))
    counts = np.array(table["counts"].to_pylist(), float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-share.max(axis=1), share.argmax(axis=1)))
    clients = table["client"].to_numpy()[order]
    rows = [
        {"client": int(client)} | {f"class {c}": int(n) for c, n in enumerate(counts[place])}
        for client, place in zip(clients, order, strict=True)
    ]
    name = (run.environment.get("data") or {}).get("name", "data")
    classes = (share > 0).sum(axis=1)
    title = f"Labels of clients: {name} in {run.label}"
    alt = (
        f"Heat map: the shares of {share.shape[1]} classes in the training rows of "
        f"{len(order)} clients, by most frequent class. A client has {classes.mean():.1f} classes "
        f"in the mean, and {share.max(axis=1).mean():.0%} of its rows are of the most frequent one."
    )
    ticks = [str(c) for c in range(share.shape[1])]
    words = f"{len(order)} clients, by most frequent class"
    svg = _heat(share[order].T, ticks, words, "share of rows", side="class")
    return Picture(f"labels-{run.label}", title, alt, svg, rows)


def timeline(group: Group) -> Picture | None:
    """When each client of a round was done: of the round that left out the most.

    Simulated seconds where devices have profiles; else those of training on the hosts.
    """
    found = _worst_round(group)
    if found is None:
        return None
    run, round, table, key = found
    seconds = np.nan_to_num(table[key].to_numpy().astype(float))
    order = np.argsort(seconds, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, BARS).astype(int))]
    status = np.array(table["status"].to_pylist())
    rows = [
        {
            "client": table["client"][i].as_py(),
            "tier": table["tier"][i].as_py(),
            "status": str(status[i]),
            key: float(seconds[i]),
        }
        for i in order.tolist()
    ]
    with Drawing(height=3.0) as drawing:
        for name in dict.fromkeys(status[shown].tolist()):
            mine = status[shown] == name
            colour, words = _STATUS.get(name, ("#000000", name))
            drawing.axes.barh(
                *(np.flatnonzero(mine), seconds[shown][mine], 0.9),
                color=colour,
                label=plain(words),
                hatch=_HATCH.get(name, ""),
                edgecolor="white" if name in _HATCH else colour,
                linewidth=0,
            )
        drawing.axes.set_yticks([])
        drawing.axes.set_ylabel(f"{len(shown)} of {len(order):,} clients")
        simulated = key == "sim_seconds"
        drawing.axes.set_xlabel(f"{'simulated' if simulated else 'host'} seconds of the round")
        drawing.legend(columns=3)
    counts = {name: int((status == name).sum()) for name in dict.fromkeys(status.tolist())}
    told = ", ".join(f"{n} {_STATUS.get(name, ('', name))[1]}" for name, n in counts.items())
    title = f"Clients of round {round}: {group.label}"
    alt = (
        f"A bar a client of {run.label}, as long as it took: {told}. The median took "
        f"{np.median(seconds):.3g} s, the longest {seconds.max():.3g} s."
    )
    return Picture(f"timeline-{group.label}", title, alt, drawing.svg, rows)


def _worst_round(group: Group) -> tuple[ReadRun, int, pa.Table, str] | None:
    """The run, the round with the most left out, its rows, and the column of seconds."""
    for run in group.runs:
        lost = {r["round"]: (r.get("late") or 0) + (r.get("dropped") or 0) for r in run.records}
        # The newest of several: earlier ones hold compiling and cold caches.
        for round in sorted(lost, key=lambda r: (lost[r], r), reverse=True):
            table = run.clients(round)
            if not table.num_rows:
                continue
            for key in ("sim_seconds", "seconds"):
                if key in table.column_names and table[key].null_count < table.num_rows:
                    return run, round, table, key
            break
    return None


def _last_rows(group: Group, column: str) -> tuple[ReadRun | None, int, pa.Table]:
    """The last round of the first run that has a column of `clients/`, and its rows."""
    for run in group.runs:
        for record in reversed(run.records):
            table = run.clients(record["round"])
            if table.num_rows:
                if column in table.column_names and not table[column].null_count:
                    return run, record["round"], table
                break
    return None, 0, pa.table({})


def _heat(
    values: np.ndarray,
    names: Sequence[str],
    across: str,
    words: str,
    *,
    side: str = "unit group",
    vmax: float | None = None,
) -> bytes:
    """A heat map; rows are named as far as there is room."""
    every = max(1, -(-len(names) // 24))
    with Drawing(height=min(5.0, max(2.2, 0.9 + 0.14 * len(names)))) as drawing:
        options: dict[str, Any] = {"aspect": "auto", "cmap": "cividis", "vmin": 0, "vmax": vmax}
        image = drawing.axes.imshow(values, interpolation="nearest", **options)
        shown = range(0, len(names), every)
        drawing.axes.set_yticks(list(shown), [plain(names[i], 18) for i in shown], fontsize=7)
        drawing.axes.set_xticks([])
        drawing.axes.set_xlabel(across)
        drawing.axes.set_ylabel(side)
        drawing.figure.colorbar(image, ax=drawing.axes, label=words)
    return drawing.svg
