"""The super-network: all that the rest of subfleet knows about a model.

Nothing here depends on how a model was described: `build` may come from a chain
of layers (`subfleet.models.chain`) or from anything else that yields physically
small modules whose tensors have the super-network's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from subfleet.core import cost as costs
from subfleet.core import seeds
from subfleet.core.cost import Convention, Cost, Layer, StatisticsPolicy, WireBytes
from subfleet.core.errors import InputError
from subfleet.core.units import IndexMap, UnitSpace

Builder = Callable[[Mapping[str, int]], nn.Module]
"""Makes the module in which group g has the given number of units."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SuperNetwork:
    """A network whose unit groups can be cut, with its costs and its builder.

    `space` binds every tensor of the state dictionary except the integer counters
    `num_batches_tracked`, which are dropped everywhere (BatchNorm's momentum is
    fixed). What a module holds outside its state dictionary (a non-persistent buffer)
    is a constant: it comes with `build`, and is neither trained, averaged nor sent.
    `build(counts)` makes the module in which group g has `counts[g]` units. `elastic`:
    the groups of channels and neurons that may vary. `statistics`: names of running means
    and variances. `stages`: the blocks that may be skipped, in runs, each of them in the
    order in which the network runs them. `input_shape` is one sample's, without the batch
    axis; `input_dtype` is int64 where the samples are tokens. `uncounted`: what has a cost
    that `layers` do not hold; there no budget can be kept. `fixed`: layers whose outputs
    are kept by definition, and why ("" where nobody said). `thinned(m)`: the units of each
    group in the model of m times the width, rounded as its authors do; None where every
    group simply keeps that share.

    It pickles when `build` does: give a `functools.partial` of a module's function.
    """

    name: str
    space: UnitSpace
    layers: tuple[Layer, ...]
    build: Builder
    input_shape: tuple[int, ...]
    num_classes: int
    elastic: tuple[str, ...]
    statistics: frozenset[str] = field(default_factory=frozenset)
    stages: tuple[tuple[str, ...], ...] = ()
    input_dtype: torch.dtype = torch.float32
    uncounted: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    thinned: Callable[[float], Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        for group in self.elastic:
            self.space.size(group)
        unknown = sorted(self.statistics - set(self.space.shapes))
        if unknown:
            raise InputError(
                f"model {self.name!r} names statistics {unknown} that are not among its tensors; "
                "name running means and variances only"
            )

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of what training moves: every tensor that is not a running statistic."""
        return frozenset(self.space.shapes) - self.statistics

    def init(self, seed: int) -> dict[str, Tensor]:
        """Fresh parameters and running statistics, a function of the seed alone, float32."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key(seed, "init"))
            module = drop_counters(self.build(dict(self.space.groups)))
        drawn = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        # Transformations of kernels, which only networks with smaller kernels hold.
        others = {n: torch.eye(*shape) for n, shape in self.space.shapes.items() if n not in drawn}
        return drawn | others

    def fresh_statistics(self, map: IndexMap) -> dict[str, Tensor]:
        """The running statistics of a sub-network that saw no data: means 0, variances 1."""
        shapes = self.space.slice_shapes(map)
        return {
            name: torch.full(shapes[name], float(name.endswith("running_var")))
            for name in sorted(self.statistics & set(shapes))
        }

    def module(self, map: IndexMap | None = None, *, device: str = "cpu") -> nn.Module:
        """The physically small module of a map, in training mode, with arbitrary values.

        Its state dictionary has the names and the shapes of `space.slice_shapes(map)`:
        load `space.extract(tensors, map)`, for the full map too. torch's global random
        state is left as it was. On the device "meta" it has no storage: all that
        `torch.func.functional_call` needs, at a fraction of the time.
        """
        map = IndexMap.full() if map is None else map
        self.space.validate(map)
        drawn = _Undrawn() if device == "meta" else nullcontext()
        with torch.random.fork_rng(devices=[]), torch.device(device), drawn:
            return drop_counters(self.build(self.space.counts_by_group(map)))

    def example(self, batch: int = 1, *, device: str = "cpu") -> Tensor:
        """A batch of zeros, [batch, *input_shape], such as the network takes."""
        return torch.zeros(batch, *self.input_shape, dtype=self.input_dtype, device=device)

    def cost(
        self,
        map: IndexMap | None = None,
        convention: Convention = "macs",
        *,
        count_bias: bool = False,
        count_norm: bool = False,
    ) -> Cost:
        """Parameters and multiply-accumulates for one sample (see `subfleet.core.cost`)."""
        return costs.cost(
            self.layers,
            self.space,
            map,
            convention,
            count_bias=count_bias,
            count_norm=count_norm,
        )

    def stored_params(self, map: IndexMap, policy: StatisticsPolicy = "indexed_mean") -> int:
        """Entries that a message carries; policy "local" leaves the running statistics out."""
        return costs.stored_params(self.space, map, statistics=self.statistics, policy=policy)

    def wire_bytes(self, map: IndexMap, policy: StatisticsPolicy = "indexed_mean") -> WireBytes:
        """Bytes of one message, for the tensors and for the map."""
        return costs.wire_bytes(self.space, map, statistics=self.statistics, policy=policy)


class _Undrawn(TorchFunctionMode):
    """Within it initialisations draw nothing: without storage there is nothing to fill.

    So a module may be built where a draw is forbidden, as in a step mapped over clients.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {})["tensor"] if not args else args[0]
        if getattr(func, "__name__", "") in {"uniform_", "normal_", "trunc_normal_"}:
            return args[0]
        return func(*args, **(kwargs or {}))


DRAWS = "_draws_in_training"
"""The attribute by which a builder says that a module's own code draws, as `F.dropout` does."""


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward pass in training draws from torch's own generator."""
    kinds = nn.modules.dropout._DropoutNd
    return getattr(module, DRAWS, False) or any(
        (isinstance(m, kinds) and m.p > 0) or (isinstance(m, nn.RNNBase) and m.dropout > 0)
        for m in module.modules()
    )


@lru_cache(maxsize=16)
def takes_channels_last(net: SuperNetwork) -> bool:
    """Whether the network's code runs on images that lie channels last: `x.view` may not."""
    module: Any = net.module().eval()  # strides on the meta device are not those of a CPU
    x = net.example(2)
    try:
        with torch.no_grad():
            module.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def drop_counters(module: nn.Module) -> nn.Module:
    """Remove `num_batches_tracked` from every BatchNorm, in place, and return the module.

    With a fixed momentum nothing reads the counter, and an integer cannot be averaged.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            if part.track_running_stats and part.momentum is None:
                raise InputError(
                    "a BatchNorm has momentum None, a cumulative average that needs a batch "
                    "counter; give it a fixed momentum such as 0.1"
                )
            if getattr(part, "num_batches_tracked", None) is not None:
                part.num_batches_tracked = None
                part.register_load_state_dict_pre_hook(_without_counter)
    return module


def _without_counter(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object
) -> None:
    """Take out the counter that torch adds to state dictionaries that lack one."""
    del module, rest
    state_dict.pop(f"{prefix}num_batches_tracked", None)
