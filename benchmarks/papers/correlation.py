"""How two numbers of clients go together, with and without what a third one explains."""

from __future__ import annotations

import numpy as np

NAN = float("nan")


def correlation(xs: np.ndarray, ys: np.ndarray) -> float:
    """Pearson's coefficient; NaN where nothing varies.

    >>> round(correlation(np.array([0.0, 1.0, 2.0]), np.array([4.0, 2.0, 0.0])), 6)
    -1.0
    """
    if len(xs) < 2 or xs.std() == 0 or ys.std() == 0:
        return NAN
    return float(np.corrcoef(xs, ys)[0, 1])


def partial_correlation(xs: np.ndarray, ys: np.ndarray, given: np.ndarray) -> float:
    """Pearson's coefficient of what a straight line in `given` leaves of xs and of ys.

    Both may rise together for no other reason than that both rise with `given`:

    >>> given = np.array([0.0, 1.0, 2.0, 3.0])
    >>> xs, ys = given + [1, -1, -1, 1], given - [1, -1, -1, 1]
    >>> round(correlation(xs, ys), 3), round(partial_correlation(xs, ys, given), 3)
    (0.111, -1.0)
    """
    plain, of_x, of_y = correlation(xs, ys), correlation(xs, given), correlation(ys, given)
    if len(given) and given.std() == 0:
        return plain
    rest = (1 - of_x**2) * (1 - of_y**2)
    return float((plain - of_x * of_y) / np.sqrt(rest)) if rest > 1e-12 else NAN
