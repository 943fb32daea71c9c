"""Sub-networks of a resident network that share its tensors, for steps that train many of them.

Two ways to the same numbers. Cut out physically, a sub-network does less arithmetic; but
every new shape has to be built and its kernels prepared. So small networks are run whole,
with the columns zeroed that read what the sub-network lacks (`subfleet.core.masks`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from subfleet.core.masks import joint_norm, masked, readers
from subfleet.core.program import Params
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap, UnitSpace
from subfleet.platform import layers

KEPT = 64  # sub-networks: those of thirty steps that draw two each
SMALL_MACS = 5_000_000  # of a sample; below, a step on a CPU gains less than a new shape costs


class Slimmed:
    """The prefix sub-networks of `module`, which is that of `map`.

    BatchNorm goes by the batch in them, and leaves running statistics as they are.
    """

    def __init__(self, net: SuperNetwork, map: IndexMap, module: nn.Module, step: layers.Step):
        self._net, self._map, self._module, self._step = net, map, module, step
        self._built: OrderedDict[bytes, nn.Module] = OrderedDict()  # on "meta": without storage

    @cached_property
    def masks(self) -> bool:
        """Whether sub-networks are masked, not built."""
        return self._net.cost(self._map).macs < SMALL_MACS and joint_norm(self._net) is None

    def run(self, units: Mapping[str, int], weights: Params, x: Tensor) -> Tensor:
        """Scores of the sub-network of the first `units[g]` units; `weights` are the whole's."""
        if self.masks:
            masks = {group: self._mask(group, count) for group, count in units.items()}
            own = masked(weights, masks, self._reads, self._space)
            with _by_the_batch(self._norms):
                return functional_call(self._module, own | self._constants, (x,))
        map = IndexMap.prefix(units)
        own = self._space.extract(weights, map)
        return functional_call(self._small(map), own | self._constants, (x,))

    @cached_property
    def _space(self) -> UnitSpace:
        return self._net.space.within(self._map)

    @cached_property
    def _constants(self) -> Params:
        named = self._module.named_buffers()
        return {name: buffer for name, buffer in named if name not in self._net.space.axes}

    @cached_property
    def _reads(self) -> dict:
        return readers(self._net)

    @cached_property
    def _norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        return _batch_norms(self._module)

    def _mask(self, group: str, count: int) -> Tensor:
        places = torch.arange(
            self._space.size(group), device=next(self._module.parameters()).device
        )
        return (places < count).to(torch.float32)

    def _small(self, map: IndexMap) -> nn.Module:
        if map.key not in self._built:
            whole = IndexMap(dict(self._map.kept) | dict(map.kept))
            module = self._net.module(whole, device="meta")
            layers.adopt(module, self._step)
            for norm in _batch_norms(module):
                norm.track_running_stats = False
            self._built[map.key] = module
            if len(self._built) > KEPT:
                self._built.popitem(last=False)
        return self._built[map.key]


def _batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    kind = nn.modules.batchnorm._BatchNorm
    return [layer for layer in module.modules() if isinstance(layer, kind)]


@contextmanager
def _by_the_batch(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    before = [norm.training for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, True
