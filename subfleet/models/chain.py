"""Super-networks from a plain sequence of layers.

`chain` walks an `nn.Sequential` and derives the unit groups (one for each layer
that makes channels or neurons, named after it), the axis bindings, the cost rows
and a builder. The last layer's outputs are the classes and are never dropped.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subfleet.core.cost import Layer
from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import Binding, Block, Free, Gates, Unit, UnitSpace, extent

# Layers without parameters, and the arguments that make another one like it.
_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.Identity: (),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
}
_CONV = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
_BATCH_NORM = ("eps", "momentum", "affine", "track_running_stats")


@dataclass(frozen=True)
class LayerSpec:
    """How to build one layer: fixed arguments, and arguments whose value a map decides."""

    name: str
    kind: type[nn.Module]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    bound: Mapping[str, Binding] = field(default_factory=dict)

    def build(self, counts: Mapping[str, int]) -> nn.Module:
        """The layer in which group g has `counts[g]` units."""
        widths = {argument: extent(binding, counts) for argument, binding in self.bound.items()}
        return self.kind(**self.fixed, **widths)


def build_chain(specs: tuple[LayerSpec, ...], counts: Mapping[str, int]) -> nn.Module:
    """The physically small `nn.Sequential` in which group g has `counts[g]` units."""
    return nn.Sequential(OrderedDict((spec.name, spec.build(counts)) for spec in specs))


def chain(
    name: str,
    layers: nn.Sequential | Sequence[nn.Module],
    input_shape: tuple[int, ...],
    *,
    fixed: Collection[str] = (),
) -> SuperNetwork:
    """A `SuperNetwork` from a sequence of layers, which may live on the meta device.

    `input_shape` is one sample's. Layers in `fixed` keep all their outputs. Knows
    Conv2d (full and depthwise), Linear, BatchNorm1d/2d, GroupNorm with one group,
    Flatten, pooling, dropout and activations; raises `InputError` with the layer's
    name for any other, and for shapes that do not fit.

    >>> net = chain("mlp", nn.Sequential(OrderedDict(
    ...     fc1=nn.Linear(4, 8), act=nn.ReLU(), fc2=nn.Linear(8, 3))), (4,))
    >>> dict(net.space.groups), net.cost().params
    ({'fc1': 8}, 56)
    """
    if not isinstance(layers, nn.Sequential):
        layers = nn.Sequential(*layers)  # named 0, 1, ...
    walk = _Walk(name, input_shape, frozenset(fixed), _classifier(name, layers))
    # Walked on the meta device: shapes without arithmetic, and the caller's layers untouched.
    for layer_name, layer in _on_meta(layers):
        walk.step(layer_name, layer)
    unknown = sorted(set(fixed) - walk.seen)
    if unknown:
        raise InputError(f"model {name!r}: fixed layers {unknown} do not exist; name its layers")
    if walk.x.dim() != 2:
        raise InputError(
            f"model {name!r} ends in shape {tuple(walk.x.shape[1:])}; end it with class scores"
        )
    return SuperNetwork(
        name=name,
        space=UnitSpace(walk.groups, walk.axes, walk.shapes),
        layers=tuple(walk.layers),
        build=partial(build_chain, tuple(walk.specs)),
        input_shape=tuple(input_shape),
        num_classes=int(walk.x.shape[1]),
        elastic=tuple(walk.groups),
        statistics=frozenset(walk.statistics),
    )


def features(name: str, layers: nn.Sequential, input_shape: tuple[int, ...]) -> int:
    """How many numbers the layers make of one sample: the inputs of a following Linear."""
    x = torch.empty(1, *input_shape, device="meta")
    for layer_name, layer in _on_meta(layers):
        x = _apply(name, layer_name, layer, x)
    return x[0].numel()


def _on_meta(layers: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Copies of the layers that compute shapes only; a layer used twice comes twice."""
    return list(copy.deepcopy(layers).to("meta").eval()._modules.items())  # pyright: ignore


def _apply(model: str, name: str, layer: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            out = layer(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"model {model!r}, layer {name!r}: an input of shape {tuple(x.shape[1:])} does not "
            f"fit ({reason}); correct the layer's sizes or give the model a larger input"
        ) from error
    return out


def _classifier(name: str, layers: nn.Sequential) -> str:
    heads = [n for n, layer in layers._modules.items() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not heads:
        raise InputError(f"model {name!r} has no Conv2d and no Linear layer; give it one")
    return heads[-1]


class _Walk:
    """The state of `chain` while it follows one sample through the layers."""

    def __init__(
        self, model: str, input_shape: tuple[int, ...], fixed: frozenset[str], head: str
    ) -> None:
        self.model, self.fixed, self.head = model, fixed, head
        self.x: Tensor = torch.empty(1, *input_shape, device="meta")
        self.channels: Binding = Free(int(input_shape[0]))  # binding of axis 1 of x
        self.after_relu = False
        self.groups: dict[str, int] = {}
        self.axes: dict[str, tuple[Binding, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.layers: list[Layer] = []
        self.specs: list[LayerSpec] = []
        self.statistics: list[str] = []
        self.seen: set[str] = set()
        self.shared: set[int] = set()  # layers with weights, by identity

    def step(self, name: str, layer: nn.Module) -> None:
        self.seen.add(name)
        before, self.x = self.x, _apply(self.model, name, layer, self.x)
        if not isinstance(self.x, Tensor):
            raise self._refuse(name, "it returns more than one tensor", "return_indices=False")
        if any(True for _ in layer.parameters()):
            if id(layer) in self.shared:
                raise self._refuse(name, "it shares its weights with another layer", "use a copy")
            self.shared.add(id(layer))
        if isinstance(layer, nn.Conv2d):
            self._conv(name, layer, before)
        elif isinstance(layer, nn.Linear):
            self._linear(name, layer)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            self._norm(name, layer, "num_features", _options(layer, _BATCH_NORM))
        elif isinstance(layer, nn.GroupNorm):
            self._group_norm(name, layer)
        elif type(layer) in _PLAIN:
            self._plain(name, layer, before)
        else:
            known = "Conv2d, Linear, BatchNorm1d, BatchNorm2d, GroupNorm, "
            known += ", ".join(kind.__name__ for kind in _PLAIN)
            raise self._refuse(name, f"{type(layer).__name__} is not known", f"known: {known}")
        self.after_relu = isinstance(layer, nn.ReLU | nn.ReLU6)

    def _refuse(self, name: str, problem: str, remedy: str) -> InputError:
        return InputError(f"model {self.model!r}, layer {name!r}: {problem}; {remedy}")

    def _outputs(self, name: str, size: int) -> Binding:
        if name == self.head or name in self.fixed:
            return Free(size)
        self.groups[name] = size
        return Unit(name)

    def _bind(self, name: str, layer: nn.Module, axes: dict[str, tuple[Binding, ...]]) -> None:
        for leaf, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if leaf == "num_batches_tracked":
                continue
            self.axes[f"{name}.{leaf}"] = axes[leaf]
            self.shapes[f"{name}.{leaf}"] = tuple(tensor.shape)

    def _conv(self, name: str, layer: nn.Conv2d, before: Tensor) -> None:
        if before.dim() != 4:
            raise self._refuse(
                name,
                f"a convolution of one sample of shape {tuple(before.shape[1:])}",
                "give samples of shape (channels, height, width)",
            )
        depthwise = layer.groups > 1
        if depthwise and not layer.groups == layer.in_channels == layer.out_channels:
            raise self._refuse(
                name,
                f"a grouped convolution with {layer.groups} groups of {layer.in_channels} "
                "channels cannot be cut",
                "use groups=1, or depthwise with groups = in_channels = out_channels",
            )
        inputs = self.channels
        # A depthwise filter belongs to its input channel: no group of its own.
        outputs = inputs if depthwise else self._outputs(name, layer.out_channels)
        bound = {"in_channels": inputs, "out_channels": outputs}
        if depthwise:
            bound["groups"] = inputs
        fan_in = Free() if depthwise else inputs
        self._bind(name, layer, {"weight": (outputs, fan_in, Free(), Free()), "bias": (outputs,)})
        options = _options(layer, _CONV) | {"bias": layer.bias is not None}
        self.specs.append(LayerSpec(name, nn.Conv2d, options, bound))
        self.layers.append(
            Layer(
                name=name,
                kind="depthwise" if depthwise else "conv",
                inputs=inputs,
                outputs=outputs,
                kernel=layer.kernel_size[0] * layer.kernel_size[1],
                positions=self.x.shape[2] * self.x.shape[3],
                relu_positions=before.shape[2] * before.shape[3] if self.after_relu else 0,
                bias=layer.bias is not None,
            )
        )
        self.channels = outputs

    def _linear(self, name: str, layer: nn.Linear) -> None:
        if self.x.dim() != 2:
            raise self._refuse(
                name,
                f"a Linear layer on inputs of shape {tuple(self.x.shape[1:-1])} + (features,)",
                "put a Flatten before it",
            )
        inputs, outputs = self.channels, self._outputs(name, layer.out_features)
        self._bind(name, layer, {"weight": (outputs, inputs), "bias": (outputs,)})
        bias = layer.bias is not None
        bound = {"in_features": inputs, "out_features": outputs}
        self.specs.append(LayerSpec(name, nn.Linear, {"bias": bias}, bound))
        self.layers.append(
            Layer(name=name, kind="linear", inputs=inputs, outputs=outputs, bias=bias)
        )
        self.channels = outputs

    def _group_norm(self, name: str, layer: nn.GroupNorm) -> None:
        if layer.num_groups != 1:
            raise self._refuse(
                name,
                f"GroupNorm with {layer.num_groups} groups cannot be cut by channel",
                "use GroupNorm(1, channels) or BatchNorm2d",
            )
        options = {"num_groups": 1} | _options(layer, ("eps", "affine"))
        self._norm(name, layer, "num_channels", options)

    def _norm(self, name: str, layer: nn.Module, width: str, options: dict[str, Any]) -> None:
        own = (self.channels,)
        leaves = ("weight", "bias", "running_mean", "running_var")
        self._bind(name, layer, dict.fromkeys(leaves, own))
        self.statistics += [
            f"{name}.{leaf}" for leaf, _ in layer.named_buffers() if leaf.startswith("running")
        ]
        self.specs.append(LayerSpec(name, type(layer), options, {width: self.channels}))
        positions = self.x[0, 0].numel()
        self.layers.append(
            Layer(
                name=name,
                kind="norm",
                inputs=self.channels,
                outputs=self.channels,
                positions=positions,
            )
        )

    def _plain(self, name: str, layer: nn.Module, before: Tensor) -> None:
        if isinstance(layer, nn.Flatten):
            if layer.start_dim != 1 or self.x.dim() != 2:
                raise self._refuse(name, "only a whole sample can be flattened", "use Flatten()")
            self.channels = _flattened(self.channels, before[0, 0].numel())
        self.specs.append(LayerSpec(name, type(layer), _options(layer, _PLAIN[type(layer)])))


def _flattened(channels: Binding, positions: int) -> Binding:
    """Channel-major flattening: unit u becomes the indices u*e to u*e + e - 1."""
    match channels:
        case Free(int(size)):
            return Free(size * positions)
        case Unit(group) if positions > 1:
            return Block(group, positions)
        case Block(group, each):
            return Block(group, each * positions)
        case Gates():
            raise TypeError("a chain has no LSTM")
    return channels


def _options(layer: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in names}
