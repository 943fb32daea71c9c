"""The VGG-like network of ADDS for FEMNIST."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from subfleet.core.supernet import SuperNetwork
from subfleet.models.chain import chain, features
from subfleet.models.cnn import Layers, Norm, norm_layer, scaled


def fully_connected(
    name: str, layers: Layers, input_shape: tuple[int, ...], sizes: tuple[int, ...], width: float
) -> None:
    """Append ReLU-FC layers of `sizes`, of which the last, the classes, is not scaled."""
    before = features(name, nn.Sequential(layers), input_shape)
    hidden = [scaled(size, width) for size in sizes[:-1]]
    for i, size in enumerate((*hidden, sizes[-1]), start=1):
        layers[f"relu_fc{i}"] = nn.ReLU()
        layers[f"fc{i}"] = nn.Linear(before, size)
        before = size


def vgg(
    *,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 62,
    channels: tuple[int, ...] = (64, 128, 256),
    hidden: tuple[int, ...] = (1024, 1024),
    norm: Norm = "batch",
    width: float = 1.0,
) -> SuperNetwork:
    """ReLU-Conv-norm blocks without conv bias, each followed by a ceil-mode 2x2 max pool.

    The order is pre-activation, so the image passes a ReLU too (harmless: it is >= 0).
    On FEMNIST 28 -> 14 -> 7 -> 4 and the classifier is FC 4096-1024-1024-62, which
    reproduces the paper's table of sizes: 5.68 M parameters, 34.68 M operations.
    `width` scales every hidden width.
    """
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        before = input_shape[0]
        for i, size in enumerate(channels, start=1):
            after = scaled(size, width)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
            if (layer := norm_layer(norm, after)) is not None:
                layers[f"norm{i}"] = layer
            layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)
            before = after
        layers["flatten"] = nn.Flatten()
        fully_connected("vgg", layers, input_shape, (*hidden, num_classes), width)
    return chain("vgg", nn.Sequential(layers), input_shape)
