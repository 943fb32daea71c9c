"""An experiment's settings in one list, as runs are compared by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """An experiment's settings by dotted key: booleans, numbers and strings.

    >>> fleet = {"tiers": [{"name": "high", "width": 1.0}, {"name": "low", "width": 0.5}]}
    >>> dict(settings({"fleet": fleet, "run": {"seed": 3}, "train": {"milestones": [10, 20]}}))
    {'fleet.tiers.high.width': 1.0, 'fleet.tiers.low.width': 0.5, 'run.seed': 3,
     'train.milestones': '10, 20'}
    """
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            # Tables of a list are known by their names, where they have one.
            named = {v.get("name", i): v for i, v in enumerate(value)}
            value = {n: {k: v[k] for k in v if k != "name"} for n, v in named.items()}
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", value
