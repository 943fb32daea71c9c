"""Numbers of devices drawn from their laws, and who is there at a time: arrays over clients."""

from __future__ import annotations

import numpy as np

from subfleet.core.device import Quantity


def drawn(quantity: Quantity, uniform: np.ndarray) -> np.ndarray:
    """A number for each row of uniforms in (0, 1), float64 [n] from float64 [n, 2].

    >>> drawn(Quantity.of("latency_s", {"uniform": [1, 3]}), np.array([[0.25, 0.5]])).tolist()
    [1.5]
    """
    first, second = quantity.first, quantity.second
    if quantity.law == "constant":
        return np.full(len(uniform), first)
    if quantity.law == "uniform":
        found = first + (second - first) * uniform[:, 0]
    else:
        # Box and Muller: two uniforms make a normal.
        normal = np.sqrt(-2 * np.log(uniform[:, 0])) * np.cos(2 * np.pi * uniform[:, 1])
        if quantity.law == "normal":
            found = first + second * normal
        else:
            found = first * np.exp(second * normal)
    return np.clip(found, quantity.low, quantity.high)


def presence(
    begins: np.ndarray, lengths: np.ndarray, local: np.ndarray, period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until each client is there (0 where it is), and how long it then stays.

    `begins` and `lengths` are [n, W], windows of a client that has fewer have length 0;
    `local` [n] is the time within the period. Who has no window never comes: (inf, 0).

    >>> wait, stay = presence(np.array([[22.0]]), np.array([[8.0]]), np.array([2.0]), 24.0)
    >>> wait.tolist(), stay.tolist()
    ([0.0], [4.0])
    """
    since = np.mod(local[:, None] - begins, period)  # the window last began so long ago
    inside = (since < lengths) | (lengths >= period)
    left = np.where(lengths >= period, np.inf, lengths - since)
    stay = np.where(inside, left, 0.0).max(axis=1, initial=0.0)
    wait = np.where(lengths > 0, np.mod(begins - local[:, None], period), np.inf)
    first = wait.min(axis=1, initial=np.inf)
    there = inside.any(axis=1)
    lasts = np.where((wait == first[:, None]) & (lengths > 0), lengths, 0.0)
    return np.where(there, 0.0, first), np.where(there, stay, lasts.max(axis=1, initial=0.0))
