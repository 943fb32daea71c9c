"""Traced functions: the same kernels in the same order, without Python in between.

A vmapped gradient spends over a millisecond a call on functorch's bookkeeping, more
than a small network's arithmetic. Traced once for each set of shapes, it becomes a
flat list of kernels. Tracing takes some 50 ms and needs no compiler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform import calls, factors, graphs, products
from subfleet.platform.memory import ran_out

_MOST = 128  # a loss made anew each round must not pile up traces


class Flat(NamedTuple):
    """A traced function: leaves in, a flat list out.

    `products` says which leaves are factors, and of how many rows (`graphs.factored`). The
    inputs numbered `held` are `subfleet.platform.factors.Factored`, of which those `of_data` may
    be `OfData`.
    """

    run: Callable[..., Sequence[Any]]
    products: Sequence[int]
    module: GraphModule
    held: frozenset[int] = frozenset()
    of_data: frozenset[int] = frozenset()


class Traces:
    """Traced functions by key; those that were asked for longest ago go first."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, Flat] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Flat]) -> Flat:
        """The function of a key that says all that its control flow depends on, shapes too."""
        if (found := self._held.get(key)) is None:
            found = self._held[key] = make()
            if len(self._held) > _MOST:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return found


def traced(
    function: Callable[..., Sequence[Any]],
    arguments: Sequence[Any],
    loose: Collection[int],
    *,
    held: Collection[int] = (),
    data: int | None = None,
    library: products.Library = "blas",
    eager: bool,
) -> Flat:
    """A pure function of tensors as a flat list of kernels.

    The leaves `loose` that it gives may come as two factors each; of its inputs, and leaves,
    `held`, which are among these, those that can be are `Factored` ones, by `data`, the input of
    that number, or by others. `eager`: the list is called as it is, and not compiled.
    """
    # Tracing runs the function: on copies, for it may update statistics, and without a trace
    # in torch's generator, which the clients draw from.
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in arguments]
    devices = {leaf.device.index for leaf in copies if isinstance(leaf, Tensor) and leaf.is_cuda}
    try:
        with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
            module = make_fx(function)(*copies)
    except Exception as error:  # whatever the author's loss raises under tracing
        if isinstance(error, InputError | RunFailed) or ran_out(error):
            raise
        what = f"{type(error).__name__}: {error}"
        raise RunFailed(
            f'the clients\' loss cannot be traced ({what}); set run.engine = "loop"'
        ) from error
    module.graph.set_codegen(CodeGen())  # leaves in, leaves out: no trees to take apart
    graphs.tidy(module, in_place=eager)
    loosened = graphs.factored(module, loose)
    multiplied = factors.multiply(module, [place for place in held if loosened[place]])
    of_data = frozenset() if data is None else factors.of_data(module, multiplied, data)
    if eager and library == "onednn":
        products.by_onednn(module)
    if eager:
        calls.hasten(module)
    return Flat(module.forward, loosened, module, multiplied, of_data)
