"""MobileNets: ADDS's, a chain of depthwise-separable blocks, and MobileNetV2 for 32 pixels."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.models.blocks import Scores, conv_norm, with_gates
from subfleet.models.chain import chain
from subfleet.models.cnn import Layers, Norm, norm_layer, scaled
from subfleet.models.elasticity import elastic
from subfleet.models.tracing import supernet
from subfleet.models.vgg import fully_connected

Variant = Literal["plain", "dwnp"]

_STAGES = (  # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_HEAD = 1280


# -- ADDS


def adds_mobilenet(
    *,
    input_shape: tuple[int, ...] = (3, 112, 112),
    num_classes: int = 2,
    channels: tuple[int, ...] = (64, 128, 256, 512, 512),
    hidden: tuple[int, ...] = (1024, 1024),
    norm: Norm = "batch",
    width: float = 1.0,
) -> SuperNetwork:
    """ADDS's MobileNet for CelebA: a 3x3 convolution, four depthwise-separable ones, three FC.

    ReLU-Conv-norm without conv bias, each of `channels` followed by a ceil-mode 2x2 max
    pool. At 112 pixels and with the 62 classes that the paper counts it has 9.95 M
    parameters and 124.5 M operations. A depthwise filter belongs to its input channel, so
    that there are 7 unit groups. `width` scales every hidden width.
    """
    name = "adds_mobilenet"
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        before = input_shape[0]
        for i, size in enumerate(channels, start=1):
            after = scaled(size, width)
            if i == 1:
                _relu_conv_norm(layers, "conv1", nn.Conv2d(before, after, 3, **_SAME), norm)
            else:
                depthwise = nn.Conv2d(before, before, 3, groups=before, **_SAME)
                _relu_conv_norm(layers, f"dw{i}", depthwise, norm)
                _relu_conv_norm(layers, f"pw{i}", nn.Conv2d(before, after, 1, bias=False), norm)
            layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)
            before = after
        layers["flatten"] = nn.Flatten()
        fully_connected(name, layers, input_shape, (*hidden, num_classes), width)
    return chain(name, nn.Sequential(layers), input_shape)


_SAME = {"padding": 1, "bias": False}


def _relu_conv_norm(layers: Layers, name: str, conv: nn.Conv2d, norm: Norm) -> None:
    layers[f"relu_{name}"] = nn.ReLU()
    layers[name] = conv
    if (layer := norm_layer(norm, conv.out_channels)) is not None:
        layers[f"norm_{name}"] = layer


# -- MobileNetV2


def make_divisible(size: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `size`, at least one; never below 0.9 of it.

    >>> [make_divisible(size) for size in (3, 12, 18, 24)]
    [8, 16, 24, 24]
    """
    nearest = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * size else nearest + divisor


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise, 1x1 projection; the input added where shapes agree."""

    def __init__(
        self,
        before: int,
        hidden: int,
        after: int,
        stride: int,
        norm: Norm,
        act: type[nn.Module],
        *,
        expands: bool,
        projects: bool,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        self.expand = conv_norm(before, hidden, 1, norm, act=act) if expands else None
        self.depthwise = conv_norm(
            hidden, hidden, kernel, norm, stride=stride, groups=hidden, act=act
        )
        self.project = conv_norm(hidden, after, 1, norm)
        self.shortcut: nn.Module | None = None
        if stride == 1 and before == after:
            self.shortcut = nn.Identity()
        elif stride == 1 and projects:
            self.shortcut = conv_norm(before, after, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        hidden = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(hidden))
        return out if self.shortcut is None else out + self.shortcut(x)


def mobilenet_v2(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    norm: Norm = "batch",
    width: float = 1.0,
    divisor: int = 8,
    stem_stride: int = 1,
    variant: Variant = "plain",
    depth: bool = False,
    kernels: tuple[int, ...] = (3,),
    transforms: bool = False,
) -> SuperNetwork:
    """MobileNetV2 (Sandler et al. 2018) for images of 32 pixels: 2.2 M parameters, 88 M operations.

    The stem's outputs, those of each stage and the hidden channels of each expanding block
    are unit groups, 24 in all; the head of 1,280 stays whole.

    Args:
        input_shape: One sample's.
        num_classes: Classes.
        norm: "batch", "group" (GroupNorm with one group) or "none".
        width: Scales all channels but the head's, which grows with widths above 1 only.
        divisor: Scaled channels are multiples of it. Small widths want 2, or all collapse.
        stem_stride: 2 halves the image at once and takes about a quarter of the operations.
        variant: "dwnp" is that of DWNP (Gao et al. 2024): the third stage does not halve the
            image, the first block expands too, projections stand where a skip changes the
            width, ReLU stands for ReLU6. It takes 304 M operations.
        depth: Blocks whose skip has no weights may be left out.
        kernels: Sizes of the depthwise kernels; the network has the largest, and
            sub-networks may have the others.
        transforms: Smaller kernels are computed by trained matrices (Once-for-all).
    """
    if divisor < 1 or stem_stride not in (1, 2):
        raise InputError(
            f"model.divisor is {divisor} and model.stem_stride {stem_stride}; "
            "give a divisor from 1 up, and a stem stride of 1 or 2"
        )
    if variant not in ("plain", "dwnp"):
        raise InputError(f"model.variant is {variant!r}; choose plain or dwnp")
    if not kernels or min(kernels) < 1 or any(kernel % 2 == 0 for kernel in kernels):
        raise InputError(f"model.kernels is {list(kernels)}; give odd sizes from 1 up")
    if transforms and len(set(kernels)) == 1:
        raise InputError(
            f"model.transforms is true, but model.kernels = {list(kernels)} is one size alone; "
            "give several, such as [3, 5]"
        )
    scaled(1, width)  # refuses widths that are not above 0
    with torch.device("meta"):
        module = _mobilenet_v2(
            input_shape[0], num_classes, norm, width, divisor, stem_stride, variant, max(kernels)
        )
    x = torch.empty(1, *input_shape, device="meta")
    net = supernet(
        module,
        x,
        name="mobilenet_v2",
        fixed={"head.conv": "widths leave the head whole, as the paper has it"},
    )
    net = elastic(
        net,
        stages=_skippable(module) if depth else (),
        kernels=_elastic_kernels(module, kernels),
        transforms=transforms,
    )
    net = replace(
        net,
        thinned=partial(
            _units, input_shape, norm, width, divisor, stem_stride, variant, max(kernels)
        ),
    )
    # DWNP gates blocks that have hidden channels of their own, and counts no shortcut.
    ungated = () if variant == "dwnp" else ("blocks.0.",)
    return with_gates(
        net,
        lambda row: (
            row.startswith("blocks.") and ".shortcut." not in row and not row.startswith(ungated)
        ),
    )


def _units(
    input_shape: tuple[int, ...],
    norm: Norm,
    width: float,
    divisor: int,
    stem_stride: int,
    variant: Variant,
    kernel: int,
    times: float,
) -> dict[str, int]:
    """The output channels of each convolution of the model of `times` the width.

    Groups are named after convolutions. Tracing that model would not do: where two stages
    round to the same width it has a skip between them, and one group in place of two.
    """
    with torch.device("meta"):
        module = _mobilenet_v2(
            input_shape[0], 1, norm, width * times, divisor, stem_stride, variant, kernel
        )
    layers = module.named_modules()
    return {name: layer.out_channels for name, layer in layers if isinstance(layer, nn.Conv2d)}


def _mobilenet_v2(
    before: int,
    num_classes: int,
    norm: Norm,
    width: float,
    divisor: int,
    stem_stride: int,
    variant: Variant,
    kernel: int,
) -> nn.Sequential:
    dwnp = variant == "dwnp"
    act = nn.ReLU if dwnp else nn.ReLU6
    stem = make_divisible(32 * width, divisor)
    layers: Layers = OrderedDict()
    layers["stem"] = conv_norm(before, stem, 3, norm, stride=stem_stride, act=act)
    before, blocks = stem, []
    for stage, (expansion, channels, depth, stride) in enumerate(_STAGES, start=1):
        after = make_divisible(channels * width, divisor)
        first = 1 if dwnp and stage == 3 else stride
        for step in [first] + [1] * (depth - 1):
            block = InvertedResidual(
                before,
                before * expansion,
                after,
                step,
                norm,
                act,
                kernel=kernel,
                expands=dwnp or expansion > 1,
                projects=dwnp,
            )
            blocks.append(block)
            before = after
    layers["blocks"] = nn.Sequential(*blocks)
    head = make_divisible(_HEAD * max(1.0, width), divisor)
    layers["head"] = conv_norm(before, head, 1, norm, act=act)
    layers["scores"] = Scores(head, num_classes)
    return nn.Sequential(layers)


def _blocks(module: nn.Module) -> list[tuple[str, InvertedResidual]]:
    return [(n, part) for n, part in module.named_modules() if isinstance(part, InvertedResidual)]


def _skippable(module: nn.Module) -> list[list[str]]:
    """The blocks with a plain skip, stage by stage: a block without one begins a stage."""
    stages: list[list[str]] = []
    for name, block in _blocks(module):
        if not isinstance(block.shortcut, nn.Identity):
            stages.append([])
        else:
            stages[-1].append(name)
    return [stage for stage in stages if stage]


def _elastic_kernels(module: nn.Module, kernels: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if len(set(kernels)) == 1:
        return {}
    return {f"{name}.depthwise.conv": kernels for name, _ in _blocks(module)}
