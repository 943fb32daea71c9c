"""The reduction tree: partial sums merge pairwise by bundle number, always in the same tree.

Bundles arrive in any order. A pair is merged as soon as both halves are there,
so reduction runs beside training and the bits never depend on who was first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ReductionTree(Generic[T]):
    """Merges `count` leaves pairwise: (0,1), (2,3), ..., then those pairs, and so on.

    An odd one out at the end of a level moves up as it is.

    >>> tree = ReductionTree(3, lambda a, b: f"({a}{b})")
    >>> for number, leaf in [(2, "c"), (0, "a"), (1, "b")]:
    ...     tree.add(number, leaf)
    >>> tree.result()
    '((ab)c)'
    """

    def __init__(self, count: int, merge: Callable[[T, T], T]):
        self._widths = [count]
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))
        self._merge = merge
        self._waiting: dict[tuple[int, int], T] = {}

    def add(self, number: int, leaf: T) -> None:
        """Hands in leaf `number` (0-based), merging upwards as far as possible."""
        level, at, value = 0, number, leaf
        while level < len(self._widths) - 1:
            sibling = at ^ 1
            if sibling < self._widths[level]:
                if (level, sibling) not in self._waiting:
                    break
                other = self._waiting.pop((level, sibling))
                value = self._merge(other, value) if sibling < at else self._merge(value, other)
            level, at = level + 1, at // 2
        self._waiting[level, at] = value

    def result(self) -> T:
        """The root; KeyError while leaves are missing."""
        return self._waiting[len(self._widths) - 1, 0]
