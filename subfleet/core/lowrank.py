"""Weights of a dense layer that one client's few rows have moved, before they are multiplied out.

Each step of SGD adds to a matrix W [O, I] a product of two thin ones, the gradient at the
layer's outputs, [B, O], and its inputs, [B, I]. A client of R rows in all has moved W by at
most rank R:

    W_k = s_k W + L_k^T X_k        L_k [R, O], X_k [R, I]

and so has a sum over clients, whose product is made once, of all their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subfleet.core import wide

_MANY = 1 << 20  # entries of factors that may always wait to be multiplied out
_BASES = 4  # matrices that clients began with, held likewise


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left^T right`, [O, I], of [R, O] and [R, I]."""
    return torch.mm(left.t(), right)


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """`scale * base + left^T right`; `multiply` is how such products are made."""

    base: Tensor  # [O, I], one object for all clients that were sent it
    scale: float
    left: Tensor  # [R, O]
    right: Tensor  # [R, I]
    multiply: Callable[[Tensor, Tensor], Tensor] = product

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.base.shape

    def numel(self) -> int:
        """Entries of the matrix."""
        return self.base.numel()

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.multiply(self.left, self.right).add_(self.base, alpha=self.scale)


def dense(tensors: Mapping[str, Tensor | LowRank]) -> dict[str, Tensor]:
    """The tensors, all of them multiplied out."""
    return {n: v.dense() if isinstance(v, LowRank) else v for n, v in tensors.items()}


@dataclass
class Owed:
    """A sum over clients of one matrix that is not made yet: sum_k a_k W_k."""

    shape: torch.Size
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    bases: dict[int, tuple[Tensor, float]] = field(default_factory=dict)  # each W, sum a_k s_k
    multiply: Callable[[Tensor, Tensor], Tensor] = product
    weights: list[float] = field(default_factory=list)  # a_k
    rows: int = 0

    def add(self, value: LowRank, weight: float) -> None:
        """Adds one client with its weight."""
        self.weights.append(weight)
        self.left.append(value.left)
        self.right.append(value.right)
        self.rows += value.right.shape[0]
        _, before = self.bases.get(id(value.base), (value.base, 0.0))
        self.bases[id(value.base)] = (value.base, before + weight * value.scale)
        self.multiply = value.multiply

    def is_much(self, value: LowRank) -> bool:
        """Whether to multiply out before this one is added: what is held is larger than the matrix.

        Not where its rows lie next to those that are held, and need not be copied to them.
        """
        if len(self.bases) > _BASES:
            return True
        outputs, inputs = self.shape
        factors, matrix = self.rows * (outputs + inputs), outputs * inputs
        return factors > max(matrix, _MANY) and not _follows(self.right[-1], value.right)

    def multiplied(self, total: Tensor | None) -> Tensor:
        """The float64 total with the products that are owed; it is written to, if there is one."""
        left, right = _joined(self.left), _joined(self.right)
        rows = torch.tensor([factor.shape[0] for factor in self.left])
        weights = torch.tensor(self.weights).repeat_interleave(rows)
        left = left * weights.unsqueeze(1).to(left.device)
        self.left, self.right, self.weights, self.rows = [], [], [], 0
        found = self.multiply(left, right)
        if len(self.bases) > _BASES:
            total = self._with_bases(total)
        if not math.isfinite(float(torch.linalg.vector_norm(found))):  # beyond float32
            found = product(left.double(), right.double())
        return _plus(total, found.cpu(), 1.0)

    def settled(self, total: Tensor | None) -> Tensor:
        """The float64 total with all that is owed; it is written to, if there is one."""
        if self.left:
            total = self.multiplied(total)
        return self._with_bases(total)

    def _with_bases(self, total: Tensor | None) -> Tensor:
        for base, weight in self.bases.values():
            total = _plus(total, base.cpu(), weight)
        self.bases = {}
        assert total is not None
        return total


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether the rows of two matrices lie one after the other in the same memory."""
    return (
        one.data_ptr() + one.nbytes == other.data_ptr()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.is_contiguous()
        and other.is_contiguous()
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all matrices; not copied where they lie so in memory."""
    if not all(map(_follows, parts, parts[1:])) or not parts[0].is_contiguous():
        return torch.cat(parts)
    width = parts[0].shape[1]
    return parts[0].as_strided((sum(part.shape[0] for part in parts), width), (width, 1))


def _plus(total: Tensor | None, tensor: Tensor, weight: float) -> Tensor:
    if total is None:
        return wide.widened(tensor, weight)
    wide.add_(total, tensor, weight)
    return total
