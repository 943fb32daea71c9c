"""ResNets for small images (He et al. 2016): a 3x3 stem at full resolution, basic blocks.

ResNet-18 and -34 have projection shortcuts: a stage's outputs are one unit group, and so
are the inner channels of each block. ResNet-56 has shortcuts without parameters, which
make its stages' widths hang together; only the inner channels of its blocks vary, as in
DWNP (Gao et al. 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.models.blocks import Scores, conv_norm, with_gates
from subfleet.models.cnn import Layers, Norm, scaled
from subfleet.models.elasticity import elastic
from subfleet.models.tracing import supernet


class PooledShortcut(nn.Module):
    """A shortcut without parameters: average pooling by the stride, then channels of zeros."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.added = stride, added

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + added, H / stride, W / stride], sizes rounded up."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.added))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and the input added to what they make."""

    def __init__(
        self, before: int, after: int, stride: int, norm: Norm, *, projects: bool, standardise: bool
    ) -> None:
        super().__init__()
        self.first = conv_norm(
            before, after, 3, norm, stride=stride, act=nn.ReLU, standardise=standardise
        )
        self.second = conv_norm(after, after, 3, norm, standardise=standardise)
        if stride == 1 and before == after:
            self.shortcut = nn.Identity()
        elif projects:
            self.shortcut = conv_norm(before, after, 1, norm, stride=stride)
        else:
            self.shortcut = PooledShortcut(stride, after - before)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def _resnet(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: Sequence[int],
    blocks: Sequence[int],
    norm: Norm,
    standardise: bool,
    width: float,
    projects: bool,
    depth: bool,
    fixed: Mapping[str, str] | None = None,
) -> SuperNetwork:
    """Stages of `blocks[i]` blocks of `channels[i]`; each but the first halves the image."""
    widths = [scaled(size, width) for size in channels]
    if not projects and widths != sorted(widths):
        raise InputError(
            f"model.channels is {list(channels)}: a shortcut without weights cannot have fewer "
            "channels than come in; give sizes that do not decrease"
        )
    with torch.device("meta"):
        layers: Layers = OrderedDict()
        layers["stem"] = conv_norm(
            input_shape[0], widths[0], 3, norm, act=nn.ReLU, standardise=standardise
        )
        before = widths[0]
        for stage, (after, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            parts = []
            for stride in strides:
                block = BasicBlock(
                    before, after, stride, norm, projects=projects, standardise=standardise
                )
                parts.append(block)
                before = after
            layers[f"layer{stage}"] = nn.Sequential(*parts)
        layers["head"] = Scores(before, num_classes)
        module = nn.Sequential(layers)
    net = supernet(
        module, torch.empty(1, *input_shape, device="meta"), name=name, fixed=fixed or {}
    )
    if depth:
        net = elastic(net, stages=_skippable(module))
    # DWNP counts the two convolutions of each block, and no shortcut.
    return with_gates(net, lambda row: ".first." in row or ".second." in row)


def _skippable(module: nn.Module) -> list[list[str]]:
    """The blocks with a plain shortcut, stage by stage."""
    stages: dict[str, list[str]] = {}
    for name, block in module.named_modules():
        if isinstance(block, BasicBlock) and isinstance(block.shortcut, nn.Identity):
            stages.setdefault(name.rpartition(".")[0], []).append(name)
    return list(stages.values())


def resnet18(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    channels: tuple[int, int, int, int] = (64, 128, 256, 512),
    norm: Norm = "batch",
    standardise: bool = False,
    width: float = 1.0,
    depth: bool = False,
) -> SuperNetwork:
    """ResNet-18 for images of 32 to 64 pixels: 11.2 M parameters, 555 M operations at 32.

    The stem is 3x3 with stride 1 and without a pool. `norm` "group" is GroupNorm(1, C);
    `standardise` gives the 3x3 convolutions standardised weights. `width` scales `channels`.
    With `depth` the blocks whose shortcut has no weights may be left out.
    """
    return _resnet(
        "resnet18",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        blocks=(2, 2, 2, 2),
        norm=norm,
        standardise=standardise,
        width=width,
        depth=depth,
        projects=True,
    )


def resnet34(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    channels: tuple[int, int, int, int] = (64, 128, 256, 512),
    norm: Norm = "batch",
    standardise: bool = False,
    width: float = 1.0,
    depth: bool = False,
) -> SuperNetwork:
    """ResNet-34 for images of 32 to 64 pixels: 21.3 M parameters, 1,159 M operations at 32.

    Options as of ResNet-18.
    """
    return _resnet(
        "resnet34",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        blocks=(3, 4, 6, 3),
        norm=norm,
        standardise=standardise,
        width=width,
        depth=depth,
        projects=True,
    )


def resnet56(
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    channels: tuple[int, int, int] = (16, 32, 64),
    norm: Norm = "batch",
    standardise: bool = False,
    width: float = 1.0,
    depth: bool = False,
) -> SuperNetwork:
    """ResNet-56 as DWNP has it, shortcuts without parameters: 853 k parameters, 125 M operations.

    Where the image is halved the shortcut is average pooling and channels of zeros, and only
    the inner channels of the 27 blocks vary. DWNP trains it with `norm` "group" and
    `standardise`; options as of ResNet-18.
    """
    return _resnet(
        "resnet56",
        input_shape=input_shape,
        num_classes=num_classes,
        channels=channels,
        blocks=(9, 9, 9),
        norm=norm,
        standardise=standardise,
        width=width,
        depth=depth,
        projects=False,
        fixed={"stem.conv": "the stream that blocks add to, which later stages widen by zeros"},
    )
