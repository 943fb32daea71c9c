"""The backbones of MetaGater, without their gates."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from subfleet.core.supernet import SuperNetwork
from subfleet.models.chain import chain
from subfleet.models.cnn import Layers, scaled


def _backbone(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: tuple[int, ...],
    pooled: tuple[int, ...],
    width: float,
) -> SuperNetwork:
    """3x3 convolutions with ReLU, a 2x2 max pool after those in `pooled`, average pool, FC."""
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        before = input_shape[0]
        for i, size in enumerate(channels, start=1):
            after = scaled(size, width)
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
            layers[f"relu{i}"] = nn.ReLU()
            if i in pooled:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            before = after
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(before, num_classes)
    return chain(name, nn.Sequential(layers), input_shape)


def metagater_a(
    *,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 10,
    channels: tuple[int, int, int] = (32, 64, 128),
    width: float = 1.0,
) -> SuperNetwork:
    """MetaGater's model (a): three 3x3 convolutions, of which the last is to be gated.

    The paper gives the order of layers, not the channels. Pools follow conv1 and conv2.
    Without norms, so that nothing but weights is learnt. `width` scales `channels`.
    """
    return _backbone(
        "metagater_a",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        pooled=(1, 2),
        width=width,
    )


def metagater_b(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    channels: tuple[int, int, int, int, int, int] = (64, 64, 128, 128, 256, 256),
    width: float = 1.0,
) -> SuperNetwork:
    """MetaGater's model (b): six 3x3 convolutions, of which the last two are to be gated.

    The paper gives the order of layers, not the channels. Pools follow conv2 and conv4.
    Without norms, so that nothing but weights is learnt. `width` scales `channels`.
    """
    return _backbone(
        "metagater_b",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        pooled=(2, 4),
        width=width,
    )
