"""Which axes of a traced network hold the same units.

Every axis of every tensor has a *label*: parts side by side, each of them some units
of one variable (a unit group in the making), or of fixed length. Layers and functions
make labels equal; a variable that meets a label stands for it from then on. What
cannot be made equal is fixed, with the layer and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from subfleet.core.bindings import Binding, Block, Concat, Free, Gates, Unit


class Reason(NamedTuple):
    """Why the units of an axis are never dropped: the layer where it shows, and the cause."""

    layer: str
    cause: str

    def __str__(self) -> str:
        return f"{self.cause} (at {self.layer!r})" if self.layer else self.cause


@dataclass(frozen=True)
class Part:
    """`count` units with `each` neighbouring indices; variable None is of fixed length."""

    variable: int | None
    count: int
    each: int = 1

    @property
    def size(self) -> int:
        """The indices that the part takes up."""
        return self.count * self.each


Label = tuple[Part, ...]


def free(size: int) -> Label:
    """The label of an axis of fixed length."""
    return (Part(None, size),)


def size_of(label: Label) -> int:
    """The length of an axis with this label."""
    return sum(part.size for part in label)


def is_free(label: Label) -> bool:
    """Whether the label names no variable; one that it names may be fixed all the same."""
    return all(part.variable is None for part in label)


def block(label: Label, each: int) -> Label:
    """The label of an axis in which every index of `label` became `each` neighbours."""
    return _joined(replace(part, each=part.each * each) for part in label)


def concat(*labels: Label) -> Label:
    """The label of axes laid side by side."""
    return _joined(part for label in labels for part in label)


def _joined(parts) -> Label:
    """Fixed parts with `each` 1, neighbours among them as one."""
    joined: list[Part] = []
    for part in parts:
        if part.variable is None:
            before = joined.pop().count if joined and joined[-1].variable is None else 0
            part = Part(None, before + part.size)
        joined.append(part)
    return tuple(joined)


class Axes:
    """The variables of a traced network, what they stand for, and which of them are fixed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.makers: dict[int, list[str]] = {}  # the layers whose outputs a variable's units are
        self._order: dict[str, int] = {}  # of layers, as they run
        self.reasons: dict[int, Reason] = {}  # of fixed variables
        self._stands_for: dict[int, Label] = {}

    def fresh(self, size: int) -> Label:
        """A new variable; an axis of length 1 has nothing to drop and is fixed."""
        if size == 1:
            return free(1)
        self.sizes.append(size)
        return (Part(len(self.sizes) - 1, size),)

    def made(self, label: Label, layer: str) -> None:
        """Note that a layer makes the units of an axis."""
        self._order.setdefault(layer, len(self._order))
        for part in self.resolve(label):
            if part.variable is not None:
                makers = self.makers.setdefault(part.variable, [])
                if layer not in makers:
                    makers.append(layer)
                    makers.sort(key=self._order.__getitem__)

    def resolve(self, label: Label) -> Label:
        """The label in variables that stand for themselves."""
        parts: list[Part] = []
        for part in label:
            if part.variable in self._stands_for:
                parts += block(self.resolve(self._stands_for[part.variable]), part.each)
            else:
                parts.append(part)
        return _joined(parts)

    def fix(self, label: Label, reason: Reason) -> None:
        """Fix all units of an axis; the first reason stays."""
        for part in self.resolve(label):
            if part.variable is not None:
                self.reasons.setdefault(part.variable, reason)

    def reason(self, label: Label) -> Reason | None:
        """Why some of an axis is fixed, if a variable of it is."""
        own = (part.variable for part in self.resolve(label))
        return next((self.reasons[v] for v in own if v in self.reasons), None)

    def same(self, a: Label, b: Label, reason: Reason) -> None:
        """Make two axes hold the same units; fix both, for the reason, where they cannot."""
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if size_of(a) != size_of(b) or is_free(a) or is_free(b):
            self._fix_both(a, b, reason)
        elif len(a) == 1 and a[0].each == 1:
            self._stand_for(a[0], b, reason)
        elif len(b) == 1 and b[0].each == 1:
            self._stand_for(b[0], a, reason)
        else:
            self._pairwise(list(a), list(b), reason)

    def _fix_both(self, a: Label, b: Label, reason: Reason) -> None:
        self.fix(a, reason)
        self.fix(b, reason)

    def _stand_for(self, part: Part, label: Label, reason: Reason) -> None:
        variable = part.variable
        assert variable is not None
        if any(other.variable == variable for other in label):  # a unit beside itself
            self._fix_both((part,), label, reason)
            return
        self._stands_for[variable] = label
        if variable in self.reasons:
            self.fix(label, self.reasons[variable])
        if len(label) == 1 and label[0].each == 1:
            for layer in self.makers.get(variable, []):
                self.made(label, layer)

    def _pairwise(self, a: list[Part], b: list[Part], reason: Reason) -> None:
        """Two labels of several parts, or of blocks: equal part by part, or fixed."""
        while a and b:
            first, second = a.pop(0), b.pop(0)
            if first.size != second.size:
                longer, rest, short = (first, a, second)
                if second.size > first.size:
                    longer, rest, short = (second, b, first)
                if longer.variable is not None:  # cut in the midst of a group
                    self._fix_both((first, *a), (second, *b), reason)
                    return
                rest.insert(0, Part(None, longer.size - short.size))
                self.fix((short,), reason)
            elif first.each == second.each and None not in (first.variable, second.variable):
                self.same((replace(first, each=1),), (replace(second, each=1),), reason)
            else:
                self._fix_both((first,), (second,), reason)

    # -- in the end

    def groups(self) -> list[int]:
        """The variables that may be cut, as their first makers run: not fixed, made by a layer."""
        found = [
            variable
            for variable in range(len(self.sizes))
            if variable not in self._stands_for
            and variable not in self.reasons
            and variable in self.makers
        ]
        return sorted(found, key=lambda variable: self._order[self.makers[variable][0]])

    def binding(self, label: Label, names: Mapping[int, str]) -> Binding:
        """The axis binding of a label, given the names of the variables that are groups."""
        parts = _joined(
            part if part.variable in names else Part(None, part.size)
            for part in self.resolve(label)
        )
        if len(parts) > 2 and parts[0].each == 1 and len(set(parts)) == 1:
            # The same indices as a concatenation's; an LSTM's rows.
            return Gates(names[parts[0].variable], len(parts))  # pyright: ignore
        bound = tuple(_one(part, names) for part in parts)
        return bound[0] if len(bound) == 1 else Concat(bound)


def _one(part: Part, names: Mapping[int, str]) -> Binding:
    if part.variable is None:
        return Free(part.size)
    group = names[part.variable]
    return Unit(group) if part.each == 1 else Block(group, part.each)
