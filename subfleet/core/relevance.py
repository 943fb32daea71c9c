"""Layer-wise relevance: how much of the class scores is owed to each input of each layer.

The z+ rule (ADDS, equation 11):  R_i = sum_j (a_i w_ij)^+ / sum_i' (a_i' w_i'j)^+ R_j.
Biases have no share. Norms and activations pass relevance on as it is, the winner of a max
pool takes all. So the sum stays what it was, layer after layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

from subfleet.core.watching import Passed

SMALL = 1e-9  # against a division by 0
_MIXING = (nn.Linear, nn.Conv2d)
_RELU = (nn.ReLU, nn.ReLU6)
_AVERAGE = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_KEEPS_SIGNS = (*_AVERAGE, nn.MaxPool2d, nn.Flatten, nn.Identity, nn.modules.dropout._DropoutNd)
_KNOWN = (*_MIXING, *_RELU, *_KEEPS_SIGNS, nn.modules.batchnorm._BatchNorm)


def backwards(
    passed: Sequence[Passed], params: Mapping[str, Tensor], relevance: Tensor
) -> Iterator[tuple[Passed, Tensor]]:
    """Each layer with the relevance of its inputs, from the last layer to the first reached.

    `relevance` [B, classes] is that of the scores. Each layer costs another pass: stop asking
    when what is wanted has been met. Ends before a layer that is not known, or
    whose output is not, as it is, the next one's input: the network's own code did something
    in between.
    """
    following: Passed | None = None
    for one, rectified in reversed(list(zip(passed, _rectified(passed), strict=True))):
        if following is not None and one.output is not following.input:
            return
        if not isinstance(one.layer, _KNOWN):
            return
        relevance = _through(one, params, relevance, rectified)
        yield one, relevance
        following = one


def _rectified(passed: Sequence[Passed]) -> list[bool]:
    """Of each layer whether its input cannot be negative: it comes from a ReLU, unmixed since."""
    found, before = [], None
    for one in passed:
        known = before is not None and before[0] is one.input and before[1]
        found.append(known)
        after = isinstance(one.layer, _RELU) or (known and isinstance(one.layer, _KEEPS_SIGNS))
        before = (one.output, after)
    return found


def _through(
    one: Passed, params: Mapping[str, Tensor], relevance: Tensor, rectified: bool
) -> Tensor:
    layer, a = one.layer, one.input
    if isinstance(layer, _MIXING):
        weight = params[f"{one.name}.weight"]
        # (a w)^+ = a^+ w^+ + a^- w^-
        total, share = _shares(
            _mixing(layer, weight.clamp(min=0)), a if rectified else a.clamp(min=0)
        )
        if rectified:
            return share(relevance / (total + SMALL))
        rest, share_rest = _shares(_mixing(layer, weight.clamp(max=0)), a.clamp(max=0))
        owed = relevance / (total + rest + SMALL)
        return share(owed) + share_rest(owed)
    if isinstance(layer, _AVERAGE):
        total, share = _shares(layer.forward, a)
        return share(relevance / (total + SMALL))
    if isinstance(layer, nn.MaxPool2d):
        return vjp(layer.forward, a)[1](relevance)[0]
    return relevance.reshape(a.shape)


def _mixing(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nn.Linear):
        return lambda a: F.linear(a, weight)
    assert isinstance(layer, nn.Conv2d)
    return lambda a: layer._conv_forward(a, weight, None)


def _shares(
    mix: Callable[[Tensor], Tensor], a: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """sum_i a_i w_ij, and what turns one number for each j into one for each i: a_i w_ij ... ."""
    total, back, *_ = vjp(mix, a)
    return total, lambda owed: a * back(owed)[0]
