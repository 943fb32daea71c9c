"""Products of dense layers by the library that the engine record names.

torch multiplies float32 matrices with its BLAS. oneDNN, which it has for convolutions, does so
too, on some processors twice as fast; torch keeps that under a private name. The two differ in
the last bits: hence a choice of the record, and not of whoever multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from subfleet.core.lowrank import product

Library = Literal["blas", "onednn"]
Linear = Callable[[Tensor, Tensor], Tensor]
_SMALL = 1 << 21  # multiplications, below which oneDNN's preparations take as long as they save
_aten: Any = torch.ops.aten


def has_onednn() -> bool:
    """Whether this torch can multiply by oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_large(multiplications: int) -> bool:
    """Whether oneDNN is worth its preparations for a product of so many multiplications."""
    return multiplications >= _SMALL


def linear(library: Library) -> Linear:
    """`(x, w) -> x w^T`, [N, O], of [N, I] and [O, I], contiguous or transposed."""
    return _onednn if library == "onednn" else _blas


def outer(library: Library) -> Linear:
    """`(left, right) -> left^T right`, [O, I], of [R, O] and [R, I]."""
    return _onednn_outer if library == "onednn" else product


def _blas(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.t())


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_large(len(x) * w.numel()) or x.dtype != torch.float32:
        return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def _onednn_outer(left: Tensor, right: Tensor) -> Tensor:
    return _onednn(left.t(), right.t())


def _meta(node: Any) -> Any:
    return node.meta["tensor_meta"]


def _large(x: Any, w: Any) -> bool:
    count = _meta(x).shape[0] * math.prod(_meta(w).shape)
    return _meta(x).dtype == torch.float32 and is_large(count)


def by_onednn(module: torch.fx.GraphModule) -> None:
    """Let a traced graph's products of two float32 matrices go to oneDNN."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.mm.default:
            bias, (x, w) = None, node.args
        elif node.target is _aten.addmm.default and not node.kwargs:
            bias, x, w = node.args
        else:
            continue
        if _large(x, w) and (bias is None or len(_meta(bias).shape) == 1):
            with graph.inserting_before(node):
                turned = graph.call_function(_aten.t.default, (w,))
                node.replace_all_uses_with(graph.call_function(_onednn, (x, turned, bias)))
            graph.erase_node(node)
