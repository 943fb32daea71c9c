"""Merging on the hosts: subtrees of the reduction, so that few sums reach the coordinator.

A tree of eight neighbours is a subtree of the fixed one (`reduce.py`): who merges it
changes no bit. The coordinator is left with eight sums at most, whatever the round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from subfleet.core import aggregate
from subfleet.core.aggregate import Update
from subfleet.core.program import Params
from subfleet.core.units import UnitSpace
from subfleet.platform.bundles import Bundle, Merge
from subfleet.platform.reduce import ReductionTree

GROUP = 8  # sums a merge takes, and the most that the coordinator is left with; a power of two
LARGE = 1 << 20  # bytes; a smaller sum is added sooner than a host can be asked to

T = TypeVar("T")


def pays(shared: Iterable[Params]) -> bool:
    """Whether sums of these trees, in float64, are large enough to be merged on hosts."""
    sizes = (sum(leaf.numel() for leaf in tree.values()) for tree in shared)
    return 8 * max(sizes, default=0) >= LARGE


def merges(count: int, round: int) -> tuple[list[Merge], list[int]]:
    """The merges of the sums of bundles 0 .. count - 1, and whose sums are left, in order.

    >>> made, left = merges(17, round=1)
    >>> [(merge.number, merge.of[0], merge.of[-1]) for merge in made], left
    ([(17, 0, 7), (18, 8, 15)], [17, 18, 16])
    """
    made: list[Merge] = []
    left = list(range(count))
    while len(left) > GROUP:
        groups = [left[i : i + GROUP] for i in range(0, len(left), GROUP)]
        left = []
        for of in groups:
            if len(of) > 1:
                made.append(Merge(count + len(made), round, tuple(of)))
            # One alone moves up as it is, as in the tree.
            left.append(made[-1].number if len(of) > 1 else of[0])
    return made, left


def merged(sums: Sequence[Update], space: UnitSpace) -> Update:
    """The sum of neighbours, as the subtree has it."""
    tree: ReductionTree[Update] = ReductionTree(
        len(sums), lambda a, b: aggregate.merge(a, b, space, reuse=True)
    )
    for number, one in enumerate(sums):
        tree.add(number, one)
    return tree.result()


def by_group(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Bundles reordered so that those of a merge go out together, groups as they first come.

    Then few sums wait at a time.
    """
    order: dict[int, list[Bundle]] = {}
    for bundle in bundles:
        order.setdefault(bundle.number // GROUP, []).append(bundle)
    return [bundle for group in order.values() for bundle in group]


class HeldSums(Generic[T]):
    """The sums of one call of `Executor.run` that stay on hosts, until a merge has taken them.

    `T` is what stands for a sum: an object reference.
    """

    def __init__(self, bundles: Sequence[Bundle]):
        self._bundles = {bundle.number: bundle for bundle in bundles}
        merges = [bundle for bundle in bundles if isinstance(bundle, Merge)]
        self._merge_of = {number: merge for merge in merges for number in merge.of}
        self._missing = {merge.number: len(merge.of) for merge in merges}
        self._held: dict[int, T] = {}
        self._ready: list[Merge] = []

    def stays(self, bundle: Bundle) -> bool:
        """Whether a merge takes this bundle's sum."""
        return bundle.number in self._merge_of

    def hold(self, bundle: Bundle, reference: T) -> None:
        """This bundle's sum is there; those that it was merged from need not stay."""
        if self.stays(bundle):
            self._held[bundle.number] = reference
            merge = self._merge_of[bundle.number]
            self._missing[merge.number] -= 1
            if not self._missing[merge.number]:
                self._ready.append(merge)
        if isinstance(bundle, Merge):
            for number in bundle.of:
                self._held.pop(number, None)

    def of(self, merge: Merge) -> list[T]:
        """What stands for the sums that a merge takes, in order."""
        return [self._held[number] for number in merge.of]

    def ready(self) -> list[Merge]:
        """The merges that can begin now; each is named once, and again after `lost`."""
        found, self._ready = self._ready, []
        return found

    def lost(self, merge: Merge) -> list[Bundle]:
        """Sums that this merge takes are gone: the bundles to run again before it is `ready`.

        All that it is made of is made again, also what is still held: losses are rare.
        """
        self._missing[merge.number] = len(merge.of)
        again: list[Bundle] = []
        for number in merge.of:
            self._held.pop(number, None)
            bundle = self._bundles[number]
            again += self.lost(bundle) if isinstance(bundle, Merge) else [bundle]
        return again


def apart(result: Any) -> tuple[Any, Update | None]:
    """A bundle's result without its sum, and the sum."""
    return replace(result, update=None), result.update
