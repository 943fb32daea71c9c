"""The report's curves and bars: groups of runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from subfleet.dashboards.comparison import (
    AXES,
    Group,
    Spread,
    curve,
    fairness_by_tier,
    spread,
    to_target,
)
from subfleet.dashboards.drawing import HATCHES, Drawing, Picture, large_numbers, look, plain
from subfleet.dashboards.plots import COLOURS

NAMES = {
    "acc_global": "global accuracy",
    "acc_own": "own networks' accuracy",
    "acc_local": "local accuracy",
    "loss_train": "training loss",
    "loss_global": "global loss",
}


def curves(groups: Sequence[Group], key: str, against: str) -> Picture | None:
    """A metric against an axis, a curve a group with its sd over seeds; None where none has it."""
    name, words = NAMES.get(key, key), AXES[against].words
    rows, ends = [], []
    with Drawing() as drawing:
        axes = drawing.axes
        for number, group in enumerate(groups):
            found = curve(group.runs, key, against)
            if not found.x:
                continue
            x, mean, sd = (np.array(column) for column in found[:3])
            line = axes.plot(x, mean, label=plain(group.label), **look(number, len(x)))[0]
            if max(found.runs) > 1:
                band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
                axes.fill_between(x, mean - sd, mean + sd, **band)
            rows += [
                {"group": group.label, against: at, key: m, "sd": s, "runs": n}
                for at, m, s, n in zip(*found, strict=True)
            ]
            ends.append(f"{group.label}: {mean[-1]:.3g} at {x[-1]:.4g}")
        axes.set_xlabel(words)
        axes.set_ylabel(name)
        if against != "rounds":
            large_numbers(axes)
        axes.grid()
        drawing.legend(columns=2 if max(len(group.label) for group in groups) < 24 else 1)
    if not rows:
        return None
    title = f"{name.capitalize()} against {words}"
    alt = f"{title}, a curve a group. At the end: {'; '.join(ends)}."
    return Picture(f"{key}-{against}", title, alt, drawing.svg, rows)


def target_bars(groups: Sequence[Group], key: str, target: float) -> Picture | None:
    """Rounds until a metric is first at least `target`; None where no run gets there."""
    found = [(group, to_target(group, key, target)) for group in groups]
    if not any(costs["reached"] for _, costs in found):
        return None
    rows: list[dict[str, Any]] = []
    with Drawing(height=0.8 + 0.35 * len(groups)) as drawing:
        for place, (group, costs) in enumerate(found):
            rounds: Spread | None = costs.get("rounds")
            row = {"group": group.label, "reached": costs["reached"], "of": costs["of"]}
            for name in AXES:
                if name in costs:
                    row |= {name: costs[name].mean, f"{name}_sd": costs[name].known_sd}
            rows.append(row)
            if rounds is not None:
                bar = {"color": COLOURS[place % len(COLOURS)], "alpha": 0.75}
                drawing.axes.barh(place, rounds.mean, xerr=rounds.sd or None, **bar)
        _label_rows(drawing, [group.label for group in groups])
        drawing.axes.set_xlabel("rounds")
    title = f"Rounds to {NAMES.get(key, key)} {target:g}"
    told = [
        f"{row['group']}: {row['rounds']:.4g}" if "rounds" in row else f"{row['group']}: never"
        for row in rows
    ]
    alt = f"{title}, a bar a group. {'; '.join(told)}."
    return Picture("to-target", title, alt, drawing.svg, rows)


def tier_bars(groups: Sequence[Group]) -> Picture | None:
    """Last known accuracy of each tier's sub-network on the evaluated clients, mean over seeds."""
    rows = []
    for group in groups:
        last = [_last(run.records, "acc_tier") for run in group.runs]
        for tier in dict.fromkeys(name for tiers in last for name in tiers):
            over = spread([tiers[tier] for tiers in last if tiers.get(tier) is not None])
            if over is not None:
                row = {"group": group.label, "tier": tier, "accuracy": over.mean}
                rows.append(row | {"sd": over.known_sd, "runs": over.count})
    title = "Global accuracy by tier"
    alt = f"{title}: each tier's sub-network of the last model, a bar a tier in each group."
    return _bars("tiers", title, alt, groups, rows, "accuracy", "sd")


def fairness_bars(groups: Sequence[Group]) -> Picture | None:
    """Local accuracy of the worst tenth of clients, by tier."""
    rows = [
        {
            "group": group.label,
            "tier": tier,
            "worst10": over.mean,
            "sd": over.known_sd,
            "runs": over.count,
        }
        for group in groups
        for tier, found in fairness_by_tier(group).items()
        for over in [found["worst10"]]
    ]
    title = "Local accuracy of the worst tenth of clients, by tier"
    alt = f"{title}: a bar a tier in each group, mean and sd over runs."
    return _bars("worst10", title, alt, groups, rows, "worst10", "sd")


def _bars(
    name: str,
    title: str,
    alt: str,
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
    key: str,
    error: str,
) -> Picture | None:
    """A bar a row, the rows of a group together, tiers told apart by hatching."""
    if not rows:
        return None
    tiers = list(dict.fromkeys(row["tier"] for row in rows))
    labels = [group.label for group in groups]
    thick = 0.8 / len(tiers)
    with Drawing(height=0.9 + 0.16 * len(rows) + 0.1 * len(groups)) as drawing:
        for number, tier in enumerate(tiers):
            mine = [row for row in rows if row["tier"] == tier]
            at = [labels.index(row["group"]) - 0.4 + thick * (number + 0.5) for row in mine]
            drawing.axes.barh(
                at,
                [row[key] for row in mine],
                thick,
                xerr=[row[error] or 0.0 for row in mine],
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                ecolor="#444444",
                label=plain(tier),
            )
        _label_rows(drawing, labels)
        drawing.axes.set_xlabel("accuracy")
        drawing.legend(columns=min(3, len(tiers)))
    told = "; ".join(f"{row['group']}, {row['tier']}: {row[key]:.3f}" for row in rows[:12])
    return Picture(name, title, f"{alt} {told}.", drawing.svg, rows)


def _label_rows(drawing: Drawing, labels: Sequence[str]) -> None:
    """Names of groups beside their bars, from the top down."""
    drawing.axes.set_yticks(range(len(labels)), [plain(label, 24) for label in labels])
    drawing.axes.set_ylim(len(labels) - 0.4, -0.6)
    drawing.axes.grid(axis="x")


def phase_bars(groups: Sequence[Group]) -> Picture | None:
    """Wall-clock seconds a round by what they went into, means over the rounds of all runs."""
    rows = []
    for group in groups:
        told = [r.get("seconds") or {} for run in group.runs for r in run.records]
        told = [seconds for seconds in told if seconds]
        for phase in dict.fromkeys(name for seconds in told for name in seconds):
            if phase != "total":
                mean = sum(seconds.get(phase) or 0.0 for seconds in told) / len(told)
                rows.append({"group": group.label, "phase": phase, "seconds": mean})
    if not rows:
        return None
    labels = [group.label for group in groups]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    with Drawing(height=0.9 + 0.35 * len(groups)) as drawing:
        left = np.zeros(len(groups))
        for number, phase in enumerate(phases):
            width = np.zeros(len(groups))
            for row in rows:
                if row["phase"] == phase:
                    width[labels.index(row["group"])] = row["seconds"]
            fill = COLOURS[number % len(COLOURS)]
            hatch = HATCHES[number % len(HATCHES)]
            drawing.axes.barh(
                *(range(len(groups)), width),
                left=left,
                color=fill,
                hatch=hatch,
                edgecolor="white",
                label=plain(phase),
            )
            left += width
        _label_rows(drawing, labels)
        drawing.axes.set_xlabel("seconds a round")
        drawing.legend(columns=3)
    told = "; ".join(f"{label} {all:.3g} s" for label, all in zip(labels, left, strict=True))
    title = "Time of a round by part, means"
    return Picture("seconds", title, f"{title}, a bar a group: {told}.", drawing.svg, rows)


def _last(records: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    return next((r[key] for r in reversed(records) if isinstance(r.get(key), dict)), {})
