"""Rewrites of a traced gradient: fewer passes over memory, the same mathematics.

A traced gradient is a flat graph of aten kernels (`subfleet.platform.traces`). Small
kernels on a CPU wait for memory more than for arithmetic, so these rewrites pay:

    relu, then max pool  ->  max pool, then relu: a quarter of the elements, same gradient
    w <- w - lr * (g^T x)  ->  one product that adds into w: the gradient is never stored
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule

Node = Any  # a torch.fx.Node, whose arguments may be anything at all
aten: Any = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
TRANSPOSES = (aten.t.default, aten.transpose.int)
_PRODUCTS = (aten.mm.default, aten.bmm.default)
# What makes a tensor of its own, alone or as the first of several; a split's items are views.
_OWN = (*_PRODUCTS, aten.convolution.default, aten.addmm.default)
_FIRST_OWN = (aten.max_pool2d_with_indices.default, aten.native_batch_norm.default)


def tidy(module: GraphModule, *, in_place: bool = True) -> None:
    """Take out what does nothing, move ReLUs behind max pools, let ReLUs work in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    for node in _calls(graph, aten.relu.default):
        _behind_pool(graph, node)
    for node in _calls(graph, aten.relu.default):
        before = node.args[0]
        if in_place and _is_own(before) and len(before.users) == 1:
            node.target = aten.relu_.default
    graph.eliminate_dead_code()
    module.recompile()


def _is_own(node: Node) -> bool:
    """Whether nothing else lies in the memory of what a node makes."""
    if node.target is operator.getitem:
        return node.args[1] == 0 and node.args[0].target in _FIRST_OWN
    return node.target in _OWN


def _calls(graph: Graph, *targets: Any) -> Iterator[Node]:
    return (n for n in list(graph.nodes) if n.op == "call_function" and n.target in targets)


def _shape(node: Any) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta") if hasattr(node, "meta") else None
    return None if meta is None else tuple(meta.shape)


def _does_nothing(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.detach.default:
        return True
    if node.target is aten.mul.Scalar:
        return type(node.args[1]) is int and node.args[1] == 1
    reshapes = node.target in RESHAPES or node.target is aten.expand.default
    return reshapes and None is not _shape(node) == _shape(node.args[0])


def _behind_pool(graph: Graph, relu: Node) -> None:
    """pool(relu(x)) is relu(pool(x)); where a whole window is negative no gradient passes."""
    users: dict[Any, list[Node]] = {}
    for user in relu.users:
        users.setdefault(user.target, []).append(user)
    found = [
        users.pop(target, [])
        for target in (
            aten.max_pool2d_with_indices.default,
            aten.max_pool2d_with_indices_backward.default,
            aten.threshold_backward.default,
        )
    ]
    if users or [len(nodes) for nodes in found] != [1, 1, 1]:
        return
    (pool,), (pool_back,), (relu_back,) = found
    if relu_back.args[0] is not pool_back or list(pool_back.users) != [relu_back]:
        return
    x, pooled = relu.args[0], next(user for user in pool.users if user.args[1] == 0)
    pool.args = (x, *pool.args[1:])
    with graph.inserting_after(pooled):
        after = graph.call_function(aten.relu.default, (pooled,))
    pooled.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    with graph.inserting_before(pool_back):
        back = graph.call_function(aten.threshold_backward.default, (pool_back.args[0], after, 0))
    pool_back.args = (back, x, *pool_back.args[2:])
    relu_back.replace_all_uses_with(pool_back)


# -- gradients that are products


def factored(module: GraphModule, places: Collection[int]) -> list[int]:
    """Let the graph return two factors where one of these leaves is their product.

    For each leaf 0, or if it is now two, matrices left and right whose product, for every
    client of a batch of them, is the gradient: how many columns and rows these have. Whoever
    adds the gradient to something then need not store it.
    """
    graph = module.graph
    end: Node = graph.output_node()
    leaves: list[Node] = []
    products = []
    with graph.inserting_before(end):
        for place, leaf in enumerate(end.args[0]):
            factors, rows = _factors(graph, leaf) if place in places else ([], 0)
            leaves += factors or [leaf]
            products.append(rows)
    end.args = (leaves,)
    graph.eliminate_dead_code()
    module.recompile()
    return products


def _factors(graph: Graph, gradient: Node) -> tuple[list[Node], int]:
    """A gradient as a product of two matrices, through transposes and changes of type.

    They, and the rows that they sum over; none where it is no such product.
    """
    node, turned = gradient, False
    while node.target in (*TRANSPOSES, aten._to_copy.default):
        if node.target in TRANSPOSES and not swaps_last(node):
            return [], 0
        turned ^= node.target in TRANSPOSES
        node = node.args[0]
    if node.target not in _PRODUCTS or len(node.users) != 1:
        return [], 0
    left, right = node.args
    rows = left.meta["tensor_meta"].shape[-1]
    if turned:
        left, right = _turned(graph, right), _turned(graph, left)
    dtype = gradient.meta["tensor_meta"].dtype
    return [_as(graph, left, dtype), _as(graph, right, dtype)], rows


def swaps_last(node: Node) -> bool:
    """Whether a transposition is of matrices, and not of what there are several of."""
    if node.target is aten.t.default:
        return True
    shape = _shape(node)
    return shape is not None and {axis % len(shape) for axis in node.args[1:3]} == {
        len(shape) - 2,
        len(shape) - 1,
    }


def _turned(graph: Graph, node: Node) -> Node:
    turned = graph.call_function(aten.transpose.int, (node, -2, -1))
    turned.meta = dict(node.meta)  # for its dtype
    return turned


def _as(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    meta = node.meta.get("tensor_meta")
    if meta is not None and meta.dtype == dtype:
        return node
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
