"""FEMNIST as LEAF writes it: JSON files of writers.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018). A file
holds {"users": [...], "num_samples": [...], "user_data": {user: {"x": [[784
floats]], "y": [ints]}}}; x is 28 x 28 row by row in [0, 1], 1 is paper; y is
0-9, A-Z, a-z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.core.scaling import INK
from subfleet.datasets import leaf
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

NUM_CLASSES = 62
SHAPE = (1, 28, 28)
PIXELS = 784


@dataclass(frozen=True)
class Femnist:
    """Handwritten digits and letters by some 3,500 writers, as LEAF's preprocess.sh writes them.

    A shard is one JSON file. x is uint8 [1, 28, 28], 255 the paper; LEAF's pixels
    are multiples of 1/255, so that rounding loses nothing (others move by 1/510
    at most). Faults, besides `leaf.read_users`: labels that are no integers in
    0..61; images not of 784 pixels; pixels that are no number in [0, 1].
    """

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        return "femnist"

    def shards(self, source: Path) -> list[Shard]:
        """The JSON files; see `leaf.shards`."""
        return leaf.shards(source)

    def layout(self, source: Path) -> Layout:
        """Images of 62 classes, by writer."""
        del source  # All of LEAF's files look alike.
        return Layout(NUM_CLASSES, SHAPE, scale=INK)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The writers of one file."""
        label = leaf.integer_below(NUM_CLASSES)
        for user in leaf.read_users(shard.path, faults):
            bound = f"an integer in 0..{NUM_CLASSES - 1}"
            y, labelled = leaf.labels_of(user, label, bound, faults)
            x, whole = _images(user.x, user.where, faults)
            x, y = x[labelled[whole]], y[labelled & whole]
            if len(y):
                yield ClientRows(user.name, x, y, np.full(len(y), shard.from_test))


def _images(rows: list[Any], where: str, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [whole images, 1, 28, 28], and which rows are whole images, bool [rows]."""
    problems = [_problem(row) for row in rows]
    if any(problems):
        for number, problem in enumerate(problems):
            if problem:
                faults.found("wrong image", f"{where}, sample {number}{problem}")
        rows = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    x = np.array(rows, dtype=np.float64).reshape(-1, PIXELS)
    whole = np.array([not problem for problem in problems], dtype=bool)
    return np.rint(x * 255).astype(np.uint8).reshape(-1, *SHAPE), whole


def _problem(row: Any) -> str:
    """What keeps a row from being 784 numbers, or ""."""
    if not isinstance(row, list) or len(row) != PIXELS:
        size = len(row) if isinstance(row, list) else "no"
        return f" has {size} pixels, not {PIXELS} (28 x 28); give images of that size"
    if not set(map(type, row)) <= {float, int}:
        number = next(n for n, pixel in enumerate(row) if type(pixel) not in (float, int))
        return f" has a pixel that is no number ({row[number]!r} at {number}); correct it"
    # Written so that NaN, which compares false, is found too.
    if not all(0 <= pixel <= 1 for pixel in set(row)):
        number = next(n for n, pixel in enumerate(row) if not 0 <= pixel <= 1)
        return (
            f", pixel {number} is {row[number]}, outside [0, 1]; "
            "scale the pixels or leave the sample out"
        )
    return ""
