"""A number for each unit of several groups, as one tensor: [G, C], padded with zeros.

And the numbers that say how much a unit matters: the scale of its norm, and what it passes
on to the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from subfleet.core.bindings import Binding, Block, Concat, Unit, extent, groups_of
from subfleet.core.masks import readers
from subfleet.core.supernet import SuperNetwork
from subfleet.core.watching import Passed


class UnitRows:
    """The groups of channels and neurons of a super-network, a row each.

    >>> from subfleet.models import small_cnn
    >>> rows = UnitRows(small_cnn(input_shape=(1, 8, 8), num_classes=3, channels=(4, 6)))
    >>> rows.groups, rows.real.sum(1).tolist()
    (('conv1', 'conv2', 'fc1'), [4, 6, 64])
    """

    def __init__(self, net: SuperNetwork):
        self._net = net
        self.groups = net.space.widths
        self.sizes = tuple(net.space.size(group) for group in self.groups)
        self._sized = tuple(zip(self.groups, self.sizes, strict=True))
        widest = torch.arange(max(self.sizes, default=0))
        self.real = widest < torch.tensor(self.sizes, dtype=torch.int64).unsqueeze(1)  # [G, C]

    def by_group(self, rows: Tensor) -> dict[str, Tensor]:
        """A tensor [C_g] for each group."""
        return {g: rows[i, :size] for i, (g, size) in enumerate(self._sized)}

    def stacked(self, found: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """[G, C]: the rows that were found, in place of those of `like`."""
        width = self.real.shape[1]
        return torch.stack(
            [
                torch.nn.functional.pad(found[g].to(like.dtype), (0, width - len(found[g])))
                if g in found
                else like[i]
                for i, g in enumerate(self.groups)
            ]
        )

    @cached_property
    def scales(self) -> dict[str, str]:
        """The scale of the norm right behind each group's units, where there is one."""
        found: dict[str, str] = {}
        for layer in self._net.layers:
            name = f"{layer.name}.weight"
            scales = layer.kind == "norm" and name in self._net.parameters
            if scales and isinstance(layer.outputs, Unit):
                found.setdefault(layer.outputs.group, name)
        return {group: name for group, name in found.items() if group in self.groups}

    @cached_property
    def _readers(self) -> dict[str, list[tuple[str, Binding]]]:
        """The layers that read each group, and the binding of their inputs."""
        found: dict[str, list[tuple[str, Binding]]] = {}
        for name, binding in readers(self._net).items():
            for group in set(groups_of(binding)) & set(self.groups):
                found.setdefault(group, []).append((name.rpartition(".")[0], binding))
        return found

    @cached_property
    def _read_by(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for group, layers in self._readers.items():
            for name, _ in layers:
                found.setdefault(name, set()).add(group)
        return found

    def passed_on(self, seen: Iterable[tuple[Passed, Tensor]]) -> dict[str, Tensor]:
        """What came to the first reader of each group met: [B, C_g, positions].

        `seen` gives layers and a number for each of their inputs: the inputs themselves, or
        their relevance.
        """
        values: dict[str, Tensor] = {}
        unmet = set(self._readers)
        for one, value in seen:
            values.setdefault(one.name, value)
            unmet -= self._read_by.get(one.name, set())
            if not unmet:
                break
        found = {}
        for group, layers in self._readers.items():
            met = next(((name, b) for name, b in layers if name in values), None)
            if met is not None:
                found[group] = self._of(group, met[1], values[met[0]])
        return found

    def _of(self, group: str, binding: Binding, value: Tensor) -> Tensor:
        first, each = _place(binding, group, self._net.space.groups)
        size = self._net.space.size(group)
        return value[:, first : first + size * each].reshape(len(value), size, -1)


def _place(binding: Binding, group: str, groups: Mapping[str, int]) -> tuple[int, int]:
    """Where a group's units begin on an axis, and how many neighbours each has there."""
    first = 0
    for part in binding.parts if isinstance(binding, Concat) else (binding,):
        match part:
            case Unit(own) if own == group:
                return first, 1
            case Block(own, each) if own == group:
                return first, each
        first += extent(part, groups)
    raise AssertionError(f"{binding!r} does not read {group!r}")
