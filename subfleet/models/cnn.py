"""Small convolutional networks and logistic regression."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.models.chain import chain, features

Norm = Literal["none", "batch", "group"]
Layers = OrderedDict[str, nn.Module]


def norm_layer(norm: Norm, channels: int) -> nn.Module | None:
    """BatchNorm, GroupNorm with one group, or nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(1, channels)
    if norm == "none":
        return None
    raise InputError(f"model.norm is {norm!r}; choose none, batch or group")


def scaled(size: int, width: float) -> int:
    """A hidden width times `width`, rounded, at least 1."""
    if not width > 0:
        raise InputError(f"model.width is {width}; give a number above 0")
    return max(1, round(size * width))


def pooled_cnn(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: tuple[int, ...],
    hidden: int,
    kernel: int,
    norm: Norm = "none",
    width: float = 1.0,
) -> SuperNetwork:
    """A conv ("same" padding), ReLU and pool 2 for each of `channels`; then FC, ReLU, FC."""
    wide = scaled(hidden, width)
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        before = input_shape[0]
        for i, size in enumerate(channels, start=1):
            after = scaled(size, width)
            layers[f"conv{i}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
            if (layer := norm_layer(norm, after)) is not None:
                layers[f"norm{i}"] = layer
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            before = after
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(features(name, nn.Sequential(layers), input_shape), wide)
        layers[f"relu{len(channels) + 1}"] = nn.ReLU()
        layers["fc2"] = nn.Linear(wide, num_classes)
    return chain(name, nn.Sequential(layers), input_shape)


def small_cnn(
    *,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 62,
    channels: tuple[int, ...] = (8, 16),
    hidden: int = 64,
    kernel: int = 3,
    norm: Norm = "none",
    width: float = 1.0,
) -> SuperNetwork:
    """A phone-sized CNN, 8-16-64 with 3x3 kernels: 55,518 parameters on FEMNIST.

    Each of `channels` is a convolution and a pool that halves the image: larger images
    want more of them, or the FC layer is nearly all of the network.
    """
    return pooled_cnn(
        "small_cnn",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        hidden=hidden,
        kernel=kernel,
        norm=norm,
        width=width,
    )


def leaf_cnn(
    *,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 62,
    channels: tuple[int, ...] = (32, 64),
    hidden: int = 2048,
    kernel: int = 5,
    norm: Norm = "none",
    width: float = 1.0,
) -> SuperNetwork:
    """LEAF's FEMNIST CNN (Caldas et al. 2018), 32-64-2048 with 5x5 kernels: 6.6 M parameters."""
    return pooled_cnn(
        "leaf_cnn",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        hidden=hidden,
        kernel=kernel,
        norm=norm,
        width=width,
    )


def cifar_cnn(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    channels: tuple[int, int] = (32, 64),
    hidden: int = 128,
    norm: Norm = "none",
    width: float = 1.0,
) -> SuperNetwork:
    """The CIFAR-10 CNN of pfl-research: two unpadded 3x3 convs, one pool, two FC layers."""
    first, second, wide = (scaled(size, width) for size in (*channels, hidden))
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        for i, (before, after) in enumerate([(input_shape[0], first), (first, second)], start=1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3)
            if (layer := norm_layer(norm, after)) is not None:
                layers[f"norm{i}"] = layer
            layers[f"relu{i}"] = nn.ReLU()
        layers["pool"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(features("cifar_cnn", nn.Sequential(layers), input_shape), wide)
        layers["relu3"] = nn.ReLU()
        layers["fc2"] = nn.Linear(wide, num_classes)
    return chain("cifar_cnn", nn.Sequential(layers), input_shape)


def logreg(*, input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 62) -> SuperNetwork:
    """Multinomial logistic regression. It has no hidden unit, hence no sub-network."""
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(math.prod(input_shape), num_classes)
    return chain("logreg", nn.Sequential(layers), input_shape)
