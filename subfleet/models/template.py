"""A module's template on the meta device, and the physically small modules made from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subfleet.core.bindings import Binding, extent
from subfleet.core.errors import InputError
from subfleet.core.supernet import DRAWS

Init = Callable[[nn.Module], None]

_RESETS = ("reset_parameters", "_reset_parameters")


@dataclass(frozen=True, eq=False)
class Template:
    """The module without its weights, and what depends on the widths.

    `tensors`: the bindings of each tensor's axes, with extents. `sizes`: attributes of
    layers that say a width, as (path, attribute, bindings). `filled`: tensors that are
    one number throughout in the user's module (a norm's weights, say), and that number.
    `init` is the user's own initialisation, after each layer's `reset_parameters`;
    `draws`: whether the forward pass in training calls for random numbers.
    """

    module: nn.Module
    tensors: Mapping[str, tuple[Binding, ...]]
    sizes: tuple[tuple[str, str, tuple[Binding, ...]], ...]
    filled: Mapping[str, float]
    init: Init | None = None
    draws: bool = False


def build_small(template: Template, counts: Mapping[str, int]) -> nn.Module:
    """The physically small module in which group g has `counts[g]` units."""
    module = copy.deepcopy(template.module)
    setattr(module, DRAWS, template.draws)
    for path, attribute, bindings in template.sizes:
        layer, old = module.get_submodule(path), [extent(b, counts) for b in bindings]
        several = isinstance(getattr(layer, attribute), tuple)
        setattr(layer, attribute, tuple(old) if several else old[0])
    for name, axes in template.tensors.items():
        shape = [extent(binding, counts) for binding in axes]
        layer, leaf = _home(module, name)
        tensor = torch.empty(shape, dtype=getattr(layer, leaf).dtype)
        # By attribute: recurrent layers keep a list of their weights up to date.
        setattr(layer, leaf, nn.Parameter(tensor) if leaf in layer._parameters else tensor)
    device = torch.get_default_device()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            layer._buffers["num_batches_tracked"] = torch.tensor(0)  # until the layer is reset
    if device.type != "meta":
        _initialise(module, template)
    # Constants last: a frozen layer's reset would draw them anew.
    for small, given in zip(module.modules(), template.module.modules(), strict=True):
        for leaf in small._non_persistent_buffers_set & set(small._buffers):
            if (constant := given._buffers[leaf]) is not None:
                small._buffers[leaf] = constant.to(device, copy=True)
    return module


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _home(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


@torch.no_grad()
def _initialise(module: nn.Module, template: Template) -> None:
    for layer in module.modules():
        for name in _RESETS:
            if callable(reset := getattr(layer, name, None)):
                reset()
    for name, number in template.filled.items():
        layer, leaf = _home(module, name)
        getattr(layer, leaf).fill_(number)
    if template.init is not None:
        template.init(module)


# -- the user's module made ready


def place(layer: str) -> str:
    """A layer's path in words; "" is the module itself."""
    return f"layer {layer!r}" if layer else "the module itself"


def prepared(model: str, module: nn.Module) -> nn.Module:
    """A copy whose state dictionary holds what is trained, and running statistics, only.

    Frozen parameters and other buffers become constants outside the state dictionary.
    Raises `InputError` for tensors that two names share.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"model {model!r} is a scripted module, whose Python cannot be followed; "
            "give the module that it was made from"
        )
    seen: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(tensor):
            raise InputError(
                f"model {model!r}, {place(_path(name))}: its size is not known before "
                "it has run; run the module once on a batch, then give it"
            )
        first = seen.setdefault(id(tensor), name)
        if first != name:
            raise InputError(
                f"model {model!r}, {place(_path(name))}: {name!r} and {first!r} are "
                "one tied tensor; give each layer weights of its own"
            )
    module = copy.deepcopy(module)
    for layer in module.modules():
        for leaf, tensor in list(layer._parameters.items()):
            if tensor is not None and not tensor.requires_grad:
                del layer._parameters[leaf]
                layer.register_buffer(leaf, tensor.data, persistent=False)
        if not isinstance(layer, nn.modules.batchnorm._NormBase):
            layer._non_persistent_buffers_set.update(layer._buffers)
    return module


def bare(module: nn.Module) -> nn.Module:
    """A copy with constants as they are, and everything else on the meta device."""
    module = copy.deepcopy(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        layer, leaf = _home(module, name)
        empty = tensor.detach().to("meta")
        if leaf in layer._parameters:
            setattr(layer, leaf, nn.Parameter(empty))
        else:
            layer._buffers[leaf] = empty
    return module


def filled(model: str, module: nn.Module, init: Init | None) -> dict[str, float]:
    """Parameters of one number throughout; `InputError` for those no fresh run can draw again."""
    numbers: dict[str, float] = {}
    for name, tensor in module.named_parameters():
        resets = any(hasattr(layer, reset) for layer in _above(module, name) for reset in _RESETS)
        number = None if tensor.is_meta or tensor.numel() == 0 else _one_number(tensor)
        # A single number that its layer drew is no constant.
        if number is not None and (tensor.numel() > 1 or not resets):
            numbers[name] = number
        elif not resets and init is None:
            raise InputError(
                f"model {model!r}, {place(_path(name))}: {name!r} has drawn values, "
                "and its module no reset_parameters() to draw them anew from a run's seed; give it "
                "that method, or supernet an init=function(module)"
            )
    return numbers


def _above(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module that holds a tensor, and those around it."""
    steps = name.split(".")[:-1]
    for depth in range(len(steps) + 1):
        yield module.get_submodule(".".join(steps[:depth]))


def _one_number(tensor: Tensor) -> float | None:
    first = tensor.detach().flatten()[0]
    return float(first) if bool((tensor == first).all()) else None
