"""Masks over units: what an index map does by cutting, as differentiable products.

A mask of group g is a tensor [C_g] of weights, 1 keeps a unit and 0 drops it. It acts where
a unit is *read*: on the columns of the layers that take the unit in. Whatever lies between
a unit and its readers (its norm, activation, pooling, a depthwise filter, a residual sum)
works channel by channel, so that nobody sees a dropped unit: the masked network is the
sliced one, and the derivative with respect to a mask is that of the unit's activation, for
dropped units too. A norm over several channels is the exception (`refuse_joint_norms`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subfleet.core.bindings import Binding, Block, Concat, Gates, Unit
from subfleet.core.errors import InputError
from subfleet.core.maps import IndexMap
from subfleet.core.space import Space
from subfleet.core.supernet import SuperNetwork

Masks = Mapping[str, Tensor]
"""A tensor [C_g] for each group that is masked; all of the others is kept."""


def along(binding: Binding, masks: Masks, space: Space) -> Tensor | None:
    """The mask of one axis, as long as the axis; None where nothing of it is masked.

    >>> along(Block("conv", 2), {"conv": torch.tensor([1.0, 0.0])}, Space({"conv": 2}, {}, {}))
    tensor([1., 1., 0., 0.])
    """
    match binding:
        case Unit(group):
            return masks.get(group)
        case Block(group, each) if group in masks:
            return masks[group].repeat_interleave(each)
        case Gates(group, gates) if group in masks:
            return masks[group].repeat(gates)
        case Concat(parts):
            return _side_by_side(parts, masks, space)
    return None


def _side_by_side(parts: tuple[Binding, ...], masks: Masks, space: Space) -> Tensor | None:
    found = [along(part, masks, space) for part in parts]
    like = next((mask for mask in found if mask is not None), None)
    if like is None:
        return None
    lengths = [len(space.indices(part, _ALL)) for part in parts]
    return torch.cat(
        [
            torch.ones(length, dtype=like.dtype, device=like.device) if mask is None else mask
            for mask, length in zip(found, lengths, strict=True)
        ]
    )


def readers(net: SuperNetwork) -> dict[str, Binding]:
    """The tensors that read units, and the binding of the axis (the second) by which they do.

    These are the weights of layers that mix their inputs; an embedding's columns and a
    depthwise filter belong to the units themselves.
    """
    embeddings = {f"{layer.name}.weight" for layer in net.layers if layer.kind == "embedding"}
    return {
        name: axes[1]
        for name, axes in net.space.axes.items()
        if len(axes) > 1 and name in net.parameters - embeddings
    }


def masked(
    params: Mapping[str, Tensor], masks: Masks, reads: Mapping[str, Binding], space: Space
) -> dict[str, Tensor]:
    """`params` in which the columns of `readers` are scaled by the masks of what they read."""
    scaled = dict(params)
    for name, binding in reads.items():
        mask = along(binding, masks, space)
        if mask is not None:
            weight = params[name]
            scaled[name] = weight * mask.view(1, -1, *[1] * (weight.dim() - 2))
    return scaled


def coverage(params: Mapping[str, Tensor], masks: Masks, space: Space) -> dict[str, Tensor]:
    """What the masks leave of each tensor: the product of its axes' masks, to be broadcast.

    Tensors that no mask touches are left out.
    """
    found: dict[str, Tensor] = {}
    for name, leaf in params.items():
        for axis, binding in enumerate(space.axes.get(name, ())):
            mask = along(binding, masks, space)
            if mask is not None:
                shape = [1] * leaf.dim()
                shape[axis] = -1
                mask = mask.view(shape)
                found[name] = found[name] * mask if name in found else mask
    return found


def joint_norm(net: SuperNetwork) -> tuple[str, nn.Module] | None:
    """The first norm that takes its mean over several channels, dropped ones included."""
    for name, layer in net.module(device="meta").named_modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            return name, layer
    return None


def refuse_joint_norms(net: SuperNetwork, who: str) -> None:
    """`InputError` where there is a `joint_norm`: there a mask is not a slice."""
    if (found := joint_norm(net)) is not None:
        name, layer = found
        raise InputError(
            f"model {net.name!r}, layer {name!r}: {type(layer).__name__} takes its mean over "
            f"several channels, so that {who} cannot drop some by a mask; use BatchNorm "
            '(norm = "batch") or no norm'
        )


_ALL = IndexMap.full()
