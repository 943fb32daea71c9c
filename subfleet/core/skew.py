"""How far a client's labels are from all classes being equally likely.

JSD(p, u) = H((p + u) / 2) - (H(p) + H(u)) / 2 in bits, p the client's label histogram, u
uniform; NJSD divides it by that of a client with a single class, so that it lies in [0, 1].
ADDS sets each client's penalty on size by it.
"""

from __future__ import annotations

import numpy as np


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log2(np.where(p > 0, p, 1.0)), axis=-1)


def _jsd(p: np.ndarray) -> np.ndarray:
    u = np.full_like(p, 1.0 / p.shape[-1])
    return _entropy((p + u) / 2) - (_entropy(p) + _entropy(u)) / 2


def njsd(label_counts: np.ndarray) -> np.ndarray:
    """NJSD of each row of counts, [..., classes] -> [...], 0 for rows without labels.

    >>> njsd(np.array([[5, 5, 0, 0], [3, 3, 3, 3], [7, 0, 0, 0]])).round(4)
    array([0.5672, 0.    , 1.    ])
    """
    counts = np.asarray(label_counts, np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    classes = counts.shape[-1]
    if classes == 1:
        return np.ones(counts.shape[:-1])
    p = np.where(total > 0, counts / np.maximum(total, 1), 1.0 / classes)
    return np.clip(_jsd(p) / _jsd(np.eye(1, classes)[0]), 0.0, 1.0)
