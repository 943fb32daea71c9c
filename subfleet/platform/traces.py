"""Traced functions: the same kernels in the same order, without Python in between.

A vmapped gradient spends over a millisecond a call on functorch's bookkeeping, more
than a small network's arithmetic. Traced once for each set of shapes, it becomes a
flat list of kernels. Tracing takes some 50 ms and needs no compiler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from subfleet.core.errors import RunFailed

_MOST = 32  # a loss made anew each round must not pile up traces


class Traces:
    """Traces by key and by the shapes of their arguments; the oldest go first."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()

    def call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, traced when its shapes are new.

        `function` is pure, from trees of tensors to a tree of tensors; its
        control flow depends on shapes and on `key` alone.
        """
        leaves, structure = pytree.tree_flatten(arguments)
        shapes = tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        where = (key, structure, shapes)
        if where not in self._held:
            self._held[where] = _traced(function, arguments)
            if len(self._held) > _MOST:
                self._held.popitem(last=False)
        return self._held[where](*arguments)


def _traced(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    try:
        module = make_fx(function)(*arguments)
    except Exception as error:  # whatever the author's loss raises under tracing
        raise RunFailed(
            f"the clients' loss cannot be mapped over clients side by side ({error}); "
            'set run.engine = "loop"'
        ) from error
    module.graph.eliminate_dead_code()
    module.recompile()
    return module.forward
