"""Sampling units by importance so that a given share of them is kept on average.

ADDS (adaptive differentiable sampling), equations 12 to 18. For a group of C units with
importance b_c, keep ratio alpha and inexactness epsilon:

    p_c = sigmoid((b_c - beta) / epsilon)                                               (13)
    beta solves  sum_c p_c = alpha C                                                (12, 14)
    d p_c / d alpha = C p_c (1 - p_c) / sum_i p_i (1 - p_i)                         (17, 18)

All groups at once: G groups, padded to the C units of the largest; `real` [G, C] says
which entries are units. Everything runs under `torch.func.vmap`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 100  # at most: six to ten are usual
EXACT = 1e-13  # how far sum p may be from alpha C, relative to C
FULL = 1.0 - 1e-6  # from this keep ratio on all units are kept
LEAST_EPSILON = 1e-6  # below it draws are those of the limit; far below, 1 / epsilon overflows


class Sampling(NamedTuple):
    """Probabilities and their slopes; entries that are no unit are 0."""

    beta: Tensor  # float64 [G]
    p: Tensor  # float64 [G, C]
    slope: Tensor  # d p / d alpha, float64 [G, C]


def sampling(importance: Tensor, ratio: Tensor, epsilon: Tensor, real: Tensor) -> Sampling:
    """The probability with which each unit is kept, and how it moves with the ratio.

    `importance` [G, C], `ratio` [G] in (0, 1], `epsilon` > 0 a scalar, `real` bool [G, C].
    A ratio of 1 keeps every unit, with slope 0. An epsilon below LEAST_EPSILON counts as that.

    >>> b, real = torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.ones(1, 4, dtype=torch.bool)
    >>> found = sampling(b, torch.tensor([0.5]), torch.tensor(0.1), real)
    >>> round(float(found.beta), 6), [round(p, 6) for p in found.p[0].tolist()]
    (0.322668, [0.09738, 0.226763, 0.684239, 0.991619])
    """
    b, epsilon = importance.double(), epsilon.double().clamp(min=LEAST_EPSILON)
    count = real.sum(1)  # C_g
    wanted = ratio.double().clamp(max=FULL) * count
    beta = _shift(b, wanted, epsilon.expand_as(wanted).contiguous(), real)
    z = (b - beta.unsqueeze(1)) / epsilon
    whole = (ratio >= FULL).unsqueeze(1)
    p = torch.where(whole, torch.ones_like(z), torch.sigmoid(z)) * real
    # p (1 - p) underflows for small epsilon: in logarithms, relative to the largest of a
    # group. What is left is the limit, in which the boundary unit alone moves.
    logs = torch.where(real, F.logsigmoid(z) + F.logsigmoid(-z), float("-inf"))
    v = torch.exp(logs - logs.amax(1, keepdim=True))
    slope = count.unsqueeze(1) * v / v.sum(1, keepdim=True)
    return Sampling(beta, p, torch.where(whole, torch.zeros_like(slope), slope))


# An operation of its own, since it ends when it is exact: it looks at values, which a function
# under vmap cannot. A row stops moving when it is there, whatever the others still do, so that
# mapped clients are simply more rows.
@torch.library.custom_op("subfleet::keep_shift", mutates_args=())
def _shift(b: Tensor, wanted: Tensor, epsilon: Tensor, real: Tensor) -> Tensor:
    """Beta [G]: Newton's steps inside a bracket that shrinks, halved where they do not help.

    `b` [G, C], `wanted` and `epsilon` [G], float64; `real` bool [G, C].
    """
    low, high = _bracket(b, wanted, epsilon.unsqueeze(1), real)
    beta, width = (low + high) / 2, high - low
    bound = EXACT * b.shape[1]
    for _ in range(ITERATIONS):
        p = torch.sigmoid((b - beta.unsqueeze(1)) / epsilon.unsqueeze(1)) * real
        surplus = p.sum(1) - wanted  # falls as beta grows
        away = surplus.abs() > bound  # not so for NaN, of a client that will be left out
        if not bool(away.any()):
            break
        low = torch.where(surplus > 0, beta, low)
        high = torch.where(surplus > 0, high, beta)
        # beta + h / |h'|;  h'(beta) = -sum p (1 - p) / epsilon
        newton = beta + surplus * epsilon / (p * (1 - p)).sum(1).clamp(min=1e-300)
        helps = (newton >= low) & (newton <= high) & ((newton - beta).abs() <= width / 2)
        step = torch.where(away, torch.where(helps, newton, (low + high) / 2), beta)
        beta, width = step, (step - beta).abs()
    return beta


@_shift.register_fake
def _(b: Tensor, wanted: Tensor, epsilon: Tensor, real: Tensor) -> Tensor:
    return torch.empty_like(wanted)


@_shift.register_vmap
def _(info, in_dims, *given: Tensor) -> tuple[Tensor, int]:
    rows = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(given, in_dims, strict=True)
    ]
    found = _shift(*(tensor.reshape(-1, *tensor.shape[2:]) for tensor in rows))
    return found.view(info.batch_size, -1), 0


def _bracket(b: Tensor, wanted: Tensor, epsilon: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of beta [G], from the importances in falling order, b_1 >= b_2 >= ...

    For every m > n = alpha C:  n >= m sigmoid((b_m - beta) / epsilon), for every m < n:
    n <= m + (C - m) sigmoid((b_{m+1} - beta) / epsilon).
    """
    top = torch.where(real, b, float("-inf")).sort(dim=1, descending=True).values
    n, count = wanted.unsqueeze(1), real.sum(1, keepdim=True)
    m = torch.arange(1, b.shape[1] + 1, device=b.device).expand_as(b)
    above = (m > n) & (m <= count)
    from_below = top - epsilon * torch.logit(torch.where(above, n / m, 0.5))
    before = m - 1  # pairs with b_m
    below = (before < n) & (m <= count)
    share = torch.where(below, (n - before) / (count - before).clamp(min=1), 0.5)
    from_above = top - epsilon * torch.logit(share.clamp(max=1.0))
    low = torch.where(above, from_below, float("-inf")).amax(1)
    return low, torch.where(below, from_above, float("inf")).amin(1)
