"""Rewrites of a traced gradient for whoever calls it: fewer kernels, sooner reached.

A small kernel takes less time than the way to it. Every bit stays:

    -ones_like(mean) / 20             is the same every time: found here, once
    t(t(x))                           is left out
    torch.ops.aten.mm.default(a, b)   becomes torch.mm(a, b), which gets there in half the time
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_arg

Node = Any  # a torch.fx.Node, whose arguments may be anything at all
_aten: Any = torch.ops.aten
_LARGEST = 1 << 16  # entries of what is found once, and then held
# Of a tensor they take the shape and the type alone.
_FILLED = (
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default),
)
# They write to statistics, and their schemas do not say so.
_WRITE_UNSAID = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
# Those that torch offers, with the same arguments, as a plain function or method too.
_NAMES = (
    "mm bmm addmm baddbmm convolution relu relu_ t transpose permute unsqueeze squeeze select "
    "gather scatter_add neg mean sum add sub mul div sigmoid tanh exp log where cat clone "
    "embedding _log_softmax _log_softmax_backward_data native_batch_norm native_group_norm"
)
_FUNCTIONS = frozenset(_NAMES.split())
_METHODS = frozenset({"view", "expand"})


def hasten(module: GraphModule) -> None:
    """Find once what never changes, leave out what undoes itself, call by the shortest way."""
    _untwist(module)
    _find_once(module)
    module.graph.eliminate_dead_code()  # as long as it sees what writes to its arguments
    for node in module.graph.nodes:
        _shorten(node)
    module.recompile()


def _untwist(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is _aten.t.default and (inner := node.args[0]).target is _aten.t.default:
            node.replace_all_uses_with(inner.args[0])
    module.graph.eliminate_dead_code()


def _find_once(module: GraphModule) -> None:
    """Replaces tensors made from the shape of others, and what follows from them, by values."""
    given_out = set(_given_out(module))
    values: dict[Node, Tensor] = {}
    for node in list(module.graph.nodes):
        if node in given_out or not _is_constant(node, values):
            continue
        found = node.target(*_told(node.args, values), **_told(node.kwargs, values))
        if not isinstance(found, Tensor) or found.numel() > _LARGEST:
            continue
        values[node] = found
        setattr(module, f"_{node.name}", found)
        with module.graph.inserting_before(node):
            held = module.graph.create_node("get_attr", f"_{node.name}")
        held.meta = dict(node.meta)
        values[held] = found
        node.replace_all_uses_with(held)


def _given_out(module: GraphModule) -> Iterator[Node]:
    """What is returned or written to, and what lies in the same memory: made anew each time."""
    for node in module.graph.nodes:
        if node.op == "output" or _writes(node):
            for argument in node.all_input_nodes:
                yield argument
                while _is_view(argument):
                    argument = argument.args[0]
                    yield argument


def _is_constant(node: Node, values: dict[Node, Tensor]) -> bool:
    """Whether a call always finds the same, as far as `values` are known."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or _writes(node):
        return False
    if node.target in _FILLED:
        return all("tensor_meta" in argument.meta for argument in node.all_input_nodes)
    inputs = node.all_input_nodes
    return bool(inputs) and all(argument in values for argument in inputs)


def _told(arguments: Any, values: dict[Node, Tensor]) -> Any:
    """Arguments with values in the place of nodes; where there is none, a tensor of its shape."""
    return map_arg(arguments, lambda node: values[node] if node in values else _like(node))


def _like(node: Node) -> Tensor:
    meta = node.meta["tensor_meta"]
    return torch.empty_strided(
        meta.shape, meta.stride, dtype=meta.dtype, device=node.meta["val"].device
    )


def _schema(node: Node) -> Any:
    return getattr(node.target, "_schema", None)


def _name(node: Node) -> str:
    """Of an operation of torch's own, without the overload; else empty."""
    schema = _schema(node)
    namespace, _, name = ("" if schema is None else schema.name).partition("::")
    return name if namespace == "aten" else ""


def _writes(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and (schema.is_mutable or _name(node) in _WRITE_UNSAID)


def _is_view(node: Node) -> bool:
    """Whether it may lie in the memory of its first argument."""
    if node.target is operator.getitem or _name(node) == "_unsafe_view":
        return True
    schema = _schema(node)
    return schema is not None and any(result.alias_info for result in schema.returns)


def _shorten(node: Node) -> None:
    if (name := _name(node)) in _FUNCTIONS:
        node.target = getattr(torch, name)
    elif name in _METHODS:
        node.op, node.target = "call_method", name
