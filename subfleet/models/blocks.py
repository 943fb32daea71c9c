"""What the networks with residual blocks share."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core.cost import Layer
from subfleet.core.supernet import SuperNetwork
from subfleet.models.cnn import Norm, norm_layer


class StandardisedConv2d(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al. 2019, "Weight Standardization").

    Each output channel's weights are shifted and scaled to mean 0 and standard deviation 1
    over its inputs and its kernel. In a slice these are the *kept* inputs, as the small
    network knows no others: the full network with the other inputs at zero computes
    something else.
    """

    eps = 1e-5

    def standardised(self, weight: Tensor) -> Tensor:
        """The weights [O, I, k, k] that take part in the convolution."""
        # w <- (w - mean(w)) / (std(w) + eps), for each output
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.std((1, 2, 3), keepdim=True)  # NaN of a single weight, centred to 0
        return centred / (deviation.nan_to_num() + self.eps)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of a batch [B, I, H, W]."""
        return self._conv_forward(input, self.standardised(self.weight), self.bias)


def conv_norm(
    before: int,
    after: int,
    kernel: int,
    norm: Norm,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
    standardise: bool = False,
) -> nn.Sequential:
    """A convolution without bias ("same" padding), its norm, and an activation if any."""
    kind = StandardisedConv2d if standardise else nn.Conv2d
    conv = kind(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if (layer := norm_layer(norm, after)) is not None:
        layers["norm"] = layer
    if act is not None:
        layers["act"] = act()
    return nn.Sequential(layers)


class Scores(nn.Module):
    """Global average pooling [B, C, H, W] -> [B, C], and the classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, num_classes]."""
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def with_gates(net: SuperNetwork, gated: Callable[[str], bool]) -> SuperNetwork:
    """The network whose convolutions of the names for which `gated` holds count as gated.

    They are the rows to which the cost convention "dwnp" adds its 3 operations for each
    output: those of the blocks whose inner channels DWNP can drop.
    """

    def marked(row: Layer) -> Layer:
        is_conv = row.kind in ("conv", "depthwise")
        return dataclasses.replace(row, gated=True) if is_conv and gated(row.name) else row

    return dataclasses.replace(net, layers=tuple(marked(row) for row in net.layers))
