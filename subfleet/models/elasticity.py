"""Elastic depth and kernels: blocks that a sub-network may skip, kernels that it may shrink.

"Once-for-All: Train One Network and Specialize it for Efficient Deployment" (Cai et al.
2020) has both. Here they are added to any super-network, however it was made, as unit
groups of their own kind, so that index maps, aggregation, costs and bytes need no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core import seeds
from subfleet.core.bindings import Binding, Free, Unit, Window
from subfleet.core.cost import Layer
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.presence import When
from subfleet.core.supernet import Builder, SuperNetwork, drop_counters
from subfleet.core.units import UnitSpace


def elastic(
    net: SuperNetwork,
    *,
    stages: Iterable[Sequence[str]] = (),
    kernels: Mapping[str, Sequence[int]] | None = None,
    transforms: bool = False,
) -> SuperNetwork:
    """The same super-network, whose maps may also skip blocks and shrink kernels.

    Skipping block b is the map's `{"b.block": []}`, and its tensors are then nobody's;
    kernel size k' of layer l is `{"l.kernel": centre(k, k')}`.

    Args:
        net: A super-network without elastic depth and kernels.
        stages: The paths of submodules that may be skipped, stage by stage, each in the
            order of running. A block must be the identity where its weights are zero.
        kernels: For a convolution with a square kernel, the smaller sizes that it may
            have besides its own. Its padding shrinks along.
        transforms: Compute each smaller kernel from the next larger one's centre by a
            trained matrix, one for the layer (Once-for-all), instead of cropping.

    Raises:
        InputError: Naming the layer or the block, and what it lacks.

    >>> from subfleet.models import resnet18
    >>> net = elastic(resnet18(), stages=[["layer1.1"], ["layer2.1"]])
    >>> net.stages
    (('layer1.1.block',), ('layer2.1.block',))
    """
    if net.stages or net.space.when or net.space.kernels:
        raise InputError(
            f"model {net.name!r} is elastic already; name all stages and kernels in one call"
        )
    runs = tuple((stage,) if isinstance(stage, str) else tuple(stage) for stage in stages)
    blocks = tuple(path for stage in runs for path in stage)
    full = net.module(device="meta")
    _check_blocks(net, full, blocks)
    shrunk = tuple(
        _kernel_of(net, full, path, sizes, transforms) for path, sizes in (kernels or {}).items()
    )
    return replace(
        net,
        space=_space(net.space, blocks, shrunk),
        layers=tuple(_rows(net.layers, blocks, shrunk)),
        build=partial(_build, net.build, blocks, shrunk),
        stages=tuple(tuple(block_group(path) for path in stage) for stage in runs),
    )


def block_group(path: str) -> str:
    """The group that stands for a block."""
    return f"{path}.block"


def kernel_group(path: str) -> str:
    """The group that stands for the rows of a layer's kernel."""
    return f"{path}.kernel"


@dataclass(frozen=True)
class Kernel:
    """A convolution whose kernel may be smaller: `sizes` increase, the last is its own."""

    path: str
    sizes: tuple[int, ...]
    transforms: bool

    @property
    def group(self) -> str:
        """The group of the kernel's rows."""
        return kernel_group(self.path)

    @property
    def rows(self) -> Binding:
        """What a smaller kernel reads of the stored one.

        Transformed kernels of any smaller size follow from the centre in the second
        largest size.
        """
        return Window(self.group, self.sizes[-2]) if self.transforms else Unit(self.group)

    @property
    def matrices(self) -> dict[str, int]:
        """The transformation to each smaller size, by tensor name."""
        return {f"{self.path}.to_{k}": k for k in self.sizes[:-1]} if self.transforms else {}


# -- what a map may leave out


def _space(space: UnitSpace, blocks: Sequence[str], kernels: Sequence[Kernel]) -> UnitSpace:
    groups = dict(space.groups) | {block_group(path): 1 for path in blocks}
    axes, shapes = dict(space.axes), dict(space.shapes)
    when: dict[str, tuple[When, ...]] = {}
    for kernel in kernels:
        groups[kernel.group] = kernel.sizes[-1]
        weight = f"{kernel.path}.weight"
        axes[weight] = (*axes[weight][:2], kernel.rows, kernel.rows)
        for name, size in kernel.matrices.items():
            axes[name], shapes[name] = (Free(), Free()), (size * size, size * size)
            when[name] = (When(kernel.group, most=size),)
    for name in shapes:
        if (group := _block_of(name, blocks)) is not None:
            when[name] = (*when.get(name, ()), When(group, least=1))
    sizes = {kernel.group: kernel.sizes for kernel in kernels}
    return UnitSpace(groups, axes, shapes, when, sizes)


def _rows(
    layers: Sequence[Layer], blocks: Sequence[str], kernels: Sequence[Kernel]
) -> Iterator[Layer]:
    """The cost rows, with those of the kernels' matrices."""
    elastic = {kernel.path: kernel for kernel in kernels}
    for layer in layers:
        block = _block_of(layer.name, blocks)
        if (kernel := elastic.get(layer.name)) is None:
            yield replace(layer, block=block)
            continue
        least = kernel.sizes[-2] if kernel.transforms else 1
        yield replace(layer, block=block, side=kernel.group, least=least)
        for name, size in kernel.matrices.items():
            yield Layer(
                name=name,
                kind="transform",
                inputs=Free(size * size),
                outputs=Free(size * size),
                kernel=size * size,
                block=block,
                side=kernel.group,
            )


def _block_of(name: str, blocks: Sequence[str]) -> str | None:
    return next((block_group(b) for b in blocks if f"{name}.".startswith(f"{b}.")), None)


def _build(
    build: Builder, blocks: Sequence[str], kernels: Sequence[Kernel], counts: Mapping[str, int]
) -> nn.Module:
    """The small module, without the blocks of which the counts keep nothing."""
    module = build(counts)
    for kernel in kernels:
        if (size := counts[kernel.group]) < kernel.sizes[-1]:
            _put(module, kernel.path, _smaller(module.get_submodule(kernel.path), kernel, size))
    for path in blocks:
        if counts[block_group(path)] == 0:
            _put(module, path, nn.Identity())
    return module


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    setattr(module.get_submodule(above), name, part)


# -- kernels


class TransformedConv2d(nn.Conv2d):
    """A convolution whose kernel is computed from a larger one's centre, size by size.

    k_5 = M_5 centre_5(k_7), k_3 = M_3 centre_3(k_5): `weight` holds the centre that the
    chain begins with, `to_5` [25, 25] and `to_3` [9, 9] are shared by all channels and
    begin as the identity. `size` is the kernel's size in the end.
    """

    size: int
    chain: tuple[int, ...]  # sizes from the weight's own to `size`, decreasing

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the small kernel."""
        kernel = self.weight
        for size in self.chain:
            centre = _cropped(kernel, size).flatten(2)
            kernel = F.linear(centre, getattr(self, f"to_{size}")).unflatten(2, (size, size))
        return self._conv_forward(input, kernel, self.bias)


def _cropped(kernel: Tensor, size: int) -> Tensor:
    start = kernel.shape[-1] // 2 - size // 2
    return kernel[..., start : start + size, start : start + size]


def _smaller(layer: nn.Module, kernel: Kernel, size: int) -> nn.Conv2d:
    """The layer with a kernel of `size`, in place; a transformed one changes its class."""
    assert isinstance(layer, nn.Conv2d)
    full = kernel.sizes[-1]
    stored = max(size, kernel.sizes[-2]) if kernel.transforms else size
    layer.weight = nn.Parameter(_cropped(layer.weight.detach(), stored).clone())
    layer.kernel_size = (size, size)
    paddings = zip(layer.padding, layer.dilation, strict=True)
    layer.padding = tuple(int(p) - (full - size) // 2 * d for p, d in paddings)
    if kernel.transforms:
        layer.__class__ = TransformedConv2d
        assert isinstance(layer, TransformedConv2d)
        layer.size = size
        layer.chain = tuple(k for k in reversed(kernel.sizes[:-1]) if k >= size)
        for k in layer.chain:
            layer.register_parameter(f"to_{k}", nn.Parameter(torch.eye(k * k)))
    return layer


def _kernel_of(
    net: SuperNetwork, full: nn.Module, path: str, sizes: Sequence[int], transforms: bool
) -> Kernel:
    convs = {name for name, part in full.named_modules() if isinstance(part, nn.Conv2d)}
    refuse = partial(_refuse, net.name, path)
    if path not in convs:
        raise refuse("it is no Conv2d", did_you_mean(path, sorted(convs)))
    layer = full.get_submodule(path)
    assert isinstance(layer, nn.Conv2d)
    own, *others = {*layer.kernel_size}
    if f"{path}.weight" not in net.space.axes:
        raise refuse("its weights are frozen", "name layers that are trained")
    if type(layer) is not nn.Conv2d:
        raise refuse(
            f"a {type(layer).__name__} may depend on all of its kernel", "use a plain Conv2d"
        )
    if others or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise refuse(
            f"a kernel of {layer.kernel_size} with padding {layer.padding!r} in mode "
            f"{layer.padding_mode!r} cannot shrink",
            "give it a square kernel, and zeros as padding, in numbers",
        )
    chosen = tuple(sorted({*sizes, own}))
    if len(chosen) < 2 or any((own - k) % 2 or not 1 <= k <= own for k in chosen):
        raise refuse(
            f"kernel sizes {sorted(sizes)} beside its own of {own}",
            "give smaller sizes that differ from it by 2, 4, ...",
        )
    short = min(
        p - (own - chosen[0]) // 2 * d for p, d in zip(layer.padding, layer.dilation, strict=True)
    )
    if short < 0:
        raise refuse(
            f"padding {layer.padding} of a kernel of {own} leaves none for one of {chosen[0]}",
            "pad more, or leave the smallest size out",
        )
    return Kernel(path, chosen, transforms)


# -- blocks


def _refuse(model: str, path: str, problem: str, remedy: str) -> InputError:
    return InputError(f"model {model!r}, layer {path!r}: {problem}; {remedy}")


def _check_blocks(net: SuperNetwork, full: nn.Module, blocks: Sequence[str]) -> None:
    """Raise `InputError` unless each block is the identity when its weights are zero."""
    parts = [name for name, _ in full.named_modules() if name]
    for path in blocks:
        if path not in parts:
            raise _refuse(net.name, path, "there is no such block", did_you_mean(path, parts))
        if not any(name.startswith(f"{path}.") for name in net.space.shapes):
            raise _refuse(net.name, path, "it holds no weights", "name blocks with weights")
    for one, other in pairwise(sorted(f"{path}." for path in blocks)):
        if other.startswith(one):
            raise _refuse(net.name, other[:-1], f"it is inside {one[:-1]!r}", "name one of them")
    if blocks:
        _check_identity(net, blocks)


def _check_identity(net: SuperNetwork, blocks: Sequence[str]) -> None:
    module = drop_counters(net.module()).eval()
    module.load_state_dict(net.init(0))
    seen: dict[str, str] = {}
    for path in blocks:
        block = module.get_submodule(path)
        given: list[Any] = []  # as it came: the block may change its input in place
        block.register_forward_pre_hook(partial(_remember, given), with_kwargs=True)
        block.register_forward_hook(partial(_compare, seen, path, given))
    x = net.example()
    if x.is_floating_point():
        x = seeds.uniform(torch.tensor(0), tuple(x.shape)).to(x.dtype)
    with torch.no_grad():
        module(x)
    for path in blocks:
        if problem := seen.get(path, "it is not called by itself"):
            raise _refuse(net.name, path, problem, "name residual blocks with a plain shortcut")
    small = _build(
        net.build, blocks, (), dict(net.space.groups) | dict.fromkeys(_groups(blocks), 0)
    )
    try:
        with torch.no_grad():
            drop_counters(small).eval()(x)
    except Exception as error:  # the user's code may look into a block that is gone
        raise _refuse(
            net.name,
            ", ".join(blocks),
            f"the network does not run without them ({type(error).__name__}: {error})",
            "let forward() call these blocks and look into none of them",
        ) from error


def _groups(blocks: Sequence[str]) -> list[str]:
    return [block_group(path) for path in blocks]


def _remember(given: list[Any], block: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
    given[:] = [tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs), named]


@torch.no_grad()
def _compare(
    seen: dict[str, str], path: str, given: list[Any], block: nn.Module, _: Any, output: Any
) -> None:
    """Note what keeps a block from being skipped; "" where nothing does."""
    inputs, named = given
    x = inputs[0] if len(inputs) == 1 and not named else None
    if not isinstance(output, Tensor) or not isinstance(x, Tensor) or output.shape != x.shape:
        seen[path] = "it does not turn one tensor into another of its shape"
        return
    kept = block._forward_hooks, block._forward_pre_hooks
    block._forward_hooks, block._forward_pre_hooks = type(kept[0])(), type(kept[1])()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in block.state_dict().items()}
    try:
        nothing = torch.func.functional_call(block, zeros, (x.clone(),))
    finally:
        block._forward_hooks, block._forward_pre_hooks = kept
    same = torch.equal(nothing, x)
    seen[path] = "" if same else "without its weights it is not the identity"
