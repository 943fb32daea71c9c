"""Whole tensors and kernel sizes that depend on a map: elastic depth, elastic kernels.

A *block* that may be skipped is a unit group of one unit, which a map may leave out
altogether. The rows of a kernel are a unit group too, of which a map keeps the centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from subfleet.core.errors import InputError


@dataclass(frozen=True)
class When:
    """A tensor is there where a map keeps `least` to `most` units of `group`.

    >>> When("layer1.1.block", least=1).holds({"layer1.1.block": 0})
    False
    """

    group: str
    least: int = 0
    most: int | None = None

    def holds(self, counts: Mapping[str, int]) -> bool:
        """Whether the tensor is there when group g has `counts[g]` units."""
        count = counts[self.group]
        return self.least <= count and (self.most is None or count <= self.most)


def centre(size: int, kept: int) -> np.ndarray:
    """The indices of the centre of a kernel: from size // 2 - kept // 2 on; int64, (kept,).

    >>> centre(7, 3).tolist()
    [2, 3, 4]
    """
    start = size // 2 - kept // 2
    return np.arange(start, start + kept)


def check_kernel(group: str, size: int, allowed: tuple[int, ...], kept: np.ndarray) -> None:
    """Raise `InputError` unless the kept rows are the centre, in one of the allowed sizes."""
    if len(kept) not in allowed or not np.array_equal(kept, centre(size, len(kept))):
        sizes = ", ".join(str(k) for k in allowed)
        example = centre(size, min(allowed)).tolist()
        raise InputError(
            f"group {group!r}: the map keeps rows {kept[:8].tolist()} of a kernel of {size}; keep "
            f"its centre in one of the sizes {sizes}, such as {example}"
        )
