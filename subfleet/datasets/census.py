"""What a federation looks like: clients, samples, classes, and how uneven they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from subfleet.datasets.federation import Federation

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_AT_ONCE = 20_000  # clients whose label histograms are in memory together


def census(
    data: Federation, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Sizes and classes over all clients, as plain JSON.

    `sd` is the population's (divisor n), as LEAF reports it. `quantiles` and
    `class_quantiles` map a quantile to samples and to distinct classes a client.
    `progress(what, done, total)` hears how many clients were counted: those of a
    twin whose labels are drawn row by row may take minutes.

    >>> from subfleet.datasets.synthetic import SyntheticFemnist
    >>> found = census(SyntheticFemnist(50))
    >>> found["clients"], found["classes"], found["quantiles"]["1"] >= found["mean"]
    (50, 62, True)
    """
    sizes, classes, present = [], [], np.zeros(data.num_classes, dtype=np.int64)
    for start in range(0, data.num_clients, _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, data.num_clients))
        if progress:
            progress("clients counted", start, data.num_clients)
        counts = data.label_counts(ids, "all")
        sizes.append(data.sizes(ids, "all"))
        classes.append((counts > 0).sum(axis=1))
        present += counts.sum(axis=0)
    n, c = np.concatenate(sizes), np.concatenate(classes)
    every = np.arange(data.num_clients)
    return {
        "name": data.name,
        "clients": data.num_clients,
        "samples": int(n.sum()),
        "parts": {part: int(data.sizes(every, part).sum()) for part in ("train", "val", "test")},
        "mean": float(n.mean()),
        "sd": float(n.std()),
        "classes": data.num_classes,
        "classes_present": int((present > 0).sum()),
        "classes_min": int(c.min()),
        "classes_max": int(c.max()),
        "quantiles": _quantiles(n),
        "class_quantiles": _quantiles(c),
        "input_shape": list(data.input_shape),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES}
