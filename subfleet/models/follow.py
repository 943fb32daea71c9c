"""Following one sample through a module: every function it calls, seen with its tensors.

The module runs on the meta device under a `TorchFunctionMode`, so that any Python works
as long as it does not read values. Each function's rule (`subfleet.models.rules`,
`subfleet.models.layer_rules`) labels what it returns and makes axes equal; a function
without a rule fixes all units that it meets.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from subfleet.core.errors import InputError
from subfleet.models.axes import Axes, Label, Reason, free
from subfleet.models.template import place

READS_VALUES = frozenset(
    {
        *("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy"),
        *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
    }
)

PRODUCTS = frozenset(
    {
        *("einsum", "tensordot", "bilinear", "scaled_dot_product_attention", "cdist"),
        *("mv", "dot", "inner", "outer", "baddbmm", "addmm", "addbmm", "chain_matmul"),
    }
)

DRAWS_NUMBERS = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
        *("bernoulli", "bernoulli_", "multinomial", "normal", "normal_", "uniform_"),
        *("exponential_", "rrelu", "gumbel_softmax"),
    }
)


@dataclass(frozen=True)
class Row:
    """A row of the cost table in the making; see `subfleet.core.cost.Layer`."""

    name: str
    kind: str
    inputs: Label
    outputs: Label
    options: dict[str, Any]


@dataclass
class Found:
    """What following a module showed."""

    axes: Axes = field(default_factory=Axes)
    tensors: dict[str, list[Label]] = field(default_factory=dict)  # of the state dictionary
    rows: list[Row] = field(default_factory=list)
    sizes: dict[tuple[str, str], list[Label]] = field(default_factory=dict)  # of (layer, attribute)
    outputs: dict[str, Label] = field(default_factory=dict)  # of layers with weights
    unseen: dict[str, str] = field(default_factory=dict)  # layer -> a function without a rule
    uncounted: dict[str, str] = field(default_factory=dict)  # layer -> what costs beside the rows
    draws: bool = False  # from torch's generator, in code that is no dropout layer's


# Code between the user's and an error.
_OURS = tuple(
    os.path.dirname(file) + os.sep for file in (torch.__file__, os.path.dirname(__file__))
)


def users_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The last of the frames, outermost first, that is neither torch's nor this package's."""
    own = [
        (f.f_code.co_filename, at) for f, at in frames if not f.f_code.co_filename.startswith(_OURS)
    ]
    return f" at {os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


class NoRule(Exception):
    """A rule does not cover this use of its function."""


class Call:
    """One call: arguments by position or name, and what it returned."""

    def __init__(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.name, self.args, self.kwargs, self.out = name, args, kwargs, out

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever it stands."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(tensors_in([*self.args, *self.kwargs.values()]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class Follower(TorchFunctionMode):
    """Labels the tensors of one forward pass and gathers in `found` what they show."""

    def __init__(
        self, model: str, module: nn.Module, found: Found, rules: dict[str, Callable[..., None]]
    ) -> None:
        super().__init__()
        self.model, self.module, self.found, self.rules = model, module, found, rules
        self.axes = found.axes
        self.calls: list[str] = []  # names of the functions followed, in order
        self.relus: set[int] = set()  # what a ReLU returned, by identity
        self._labels: dict[int, tuple[Tensor, list[Label]]] = {}  # keeps tensors, and so ids, alive
        self._names: dict[int, str] = {}
        self._parts = dict(module.named_modules())
        self._stack: list[str] = []
        self._used: set[str] = set()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name not in found.tensors:
                found.tensors[name] = [self.axes.fresh(size) for size in tensor.shape]
            self._labels[id(tensor)] = tensor, found.tensors[name]
            self._names[id(tensor)] = name

    def run(self, x: Tensor) -> Tensor:
        """One forward pass; `InputError` names the layer in which it fails."""
        hooks = []
        for name, part in self.module.named_modules():
            hooks.append(part.register_forward_pre_hook(self._enter(name)))
            hooks.append(part.register_forward_hook(self._leave))
        try:
            with torch.no_grad(), torch.device("meta"), self:  # where the code makes tensors, too
                out = self.module(x)
        except InputError:
            raise
        except Exception as error:  # the user's code may raise anything; it is the cause to show
            said = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
            line = users_line(traceback.walk_tb(error.__traceback__))
            raise self.refuse(
                f"a sample of shape {tuple(x.shape[1:])} cannot be followed{line} ({said})",
                "correct the layer, or the example input",
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(x):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"model {self.model!r} makes {shape} of a batch of {len(x)}; return class scores "
                "of shape (batch, classes)"
            )
        return out

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, *_: object) -> None:
        self._stack.pop()

    @property
    def layer(self) -> str:
        """The innermost module that is running, by its path; "" is the module itself."""
        return self._stack[-1] if self._stack else ""

    def refuse(self, problem: str, remedy: str) -> InputError:
        """An error that names the model and the layer."""
        where = f"layer {self.layer!r}" if self.layer else "its own forward()"
        return InputError(f"model {self.model!r}, {where}: {problem}; {remedy}")

    def because(self, cause: str) -> Reason:
        """A reason at the layer that is running."""
        return Reason(self.layer, cause)

    # -- labels

    def labels(self, tensor: Tensor) -> list[Label]:
        """The labels of a tensor's axes; of fixed length where nothing is known."""
        known = self._labels.get(id(tensor))
        return [free(size) for size in tensor.shape] if known is None else list(known[1])

    def label(self, tensor: Tensor, labels: Sequence[Label]) -> None:
        """Set the labels of what a function returned."""
        assert len(labels) == tensor.dim(), (self.calls[-1], labels, tensor.shape)
        self._labels[id(tensor)] = tensor, list(labels)
        self.relus.discard(id(tensor))

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is of the state dictionary itself."""
        return id(tensor) in self._names

    # -- layers

    def owner(self, weight: Tensor) -> str:
        """The path of the layer that a weight belongs to, used once only.

        For a weight that was computed (a standardised one) this is the running layer.
        """
        name = self._names.get(id(weight), f"{self.layer}.")
        if name in self._used:
            path = name.rpartition(".")[0]
            raise InputError(
                f"model {self.model!r}, {place(path)}: it is used twice, so that two places share "
                "its weights; give each a layer of its own"
            )
        self._used.add(name)
        path, _, leaf = name.rpartition(".")
        of_torch = any(
            kind.__module__.startswith("torch.nn.") and kind is not nn.Module
            for kind in type(self.part(path)).__mro__
        )
        return path if of_torch or not leaf else name

    def part(self, path: str) -> nn.Module | None:
        """The module at a path, if there is one."""
        return self._parts.get(path)

    def size(self, path: str, attribute: str, *labels: Label) -> None:
        """Note that an attribute of a layer says the length of an axis, or of several."""
        if hasattr(self.part(path), attribute):
            self.found.sizes[path, attribute] = list(labels)

    def row(self, name: str, kind: str, inputs: Label, outputs: Label, **options: Any) -> None:
        """Add a row to the cost table."""
        self.found.rows.append(Row(name, kind, inputs, outputs, options))

    def _in_dropout(self) -> bool:
        return isinstance(self.part(self.layer), nn.modules.dropout._DropoutNd)

    # -- functions

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", repr(func))
        if name == "__get__":
            name = f"get {func.__self__.__name__}"
        if name in READS_VALUES:
            line = users_line(reversed([*traceback.walk_stack(sys._getframe())]))
            raise self.refuse(
                f"the forward pass reads values of a tensor ({name}){line}, so that it may differ "
                "from sample to sample",
                "let it depend on shapes only, or compute with torch.where",
            )
        out = func(*args, **kwargs)
        returned = list(tensors_in(out))
        call = Call(name, args, kwargs, out)
        if name in DRAWS_NUMBERS or (_drops(call) and not self._in_dropout()):
            self.found.draws = True
        if name != "__setitem__" and (not returned or not call.tensors):
            return out
        self.calls.append(name)
        try:
            if name not in self.rules:
                raise NoRule(f"{name} is not known to keep units apart")
            self.rules[name](self, call)
        except NoRule as cause:
            self.found.unseen.setdefault(self.layer, name)
            if name in PRODUCTS or any(self.is_weight(tensor) for tensor in call.tensors):
                self.found.uncounted.setdefault(self.layer, name)
            for tensor in call.tensors:
                for label in self.labels(tensor):
                    self.axes.fix(label, self.because(str(cause)))
            for tensor in returned:
                self.label(tensor, [free(size) for size in tensor.shape])
        return out


def _drops(call: Call) -> bool:
    named = "dropout" in call.name
    return named and bool(call.arg(2, "training", True)) and call.arg(1, "p", 0.5) > 0
