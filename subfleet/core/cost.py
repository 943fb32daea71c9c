"""What a sub-network costs: parameters, multiply-accumulates, entries and bytes on the wire.

Costs follow from the index map through the same axis bindings that cut the
tensors, never from width ratios. Conventions (one sample, output H' x W'):

    conv       params k^2 I O     MACs k^2 I O H'W'
    depthwise  params k^2 C       MACs k^2 C H'W'
    linear     params I O         MACs I O
    LSTM       params 4H(I+H)+8H  MACs 4H(I+H) a time step
    embedding  params V E         MACs 0
    norm       params 2C          MACs 0
    transform  params k^2 k^2     MACs 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from subfleet.core.bindings import Binding, extent
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.units import IndexMap, UnitSpace

Kind = Literal["conv", "depthwise", "linear", "norm", "lstm", "embedding", "transform"]
Convention = Literal["macs", "adds", "dwnp", "profiler"]
StatisticsPolicy = Literal["local", "indexed_mean"]

CONVENTIONS = ("macs", "adds", "dwnp", "profiler")
BYTES_PER_ENTRY = 4  # float32 on the wire


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the cost table. Free axes must say their extent.

    `kernel`: k_h * k_w. `positions`: H'W' of the output (time steps for an LSTM).
    `relu_positions`: H*W of the input when a ReLU stands directly before, else 0.
    `bias`: whether the layer has one, for `count_bias`. `gated`: a
    convolution of a block whose channels DWNP gates. `block`: the group that stands for
    the block that the layer is in, if that may be skipped. `side`: the group of the
    kernel's rows, if those may be fewer: then k' * k' stands for `kernel`. `least`: the
    fewest rows that are stored, where smaller kernels are computed from larger ones.
    """

    name: str
    kind: Kind
    inputs: Binding
    outputs: Binding
    kernel: int = 1
    positions: int = 1
    relu_positions: int = 0
    bias: bool = False
    gated: bool = False
    block: str | None = None
    side: str | None = None
    least: int = 1


class Cost(NamedTuple):
    """`params` entries and `macs` multiply-accumulates for one sample, exact integers."""

    params: int
    macs: int

    @property
    def flops(self) -> int:
        """The papers count one multiply-accumulate as one FLOP, and so do budgets."""
        return self.macs


class WireBytes(NamedTuple):
    """One message: 4 bytes an entry, and what describes the map."""

    tensors: int
    map: int

    @property
    def total(self) -> int:
        """All bytes of the message."""
        return self.tensors + self.map


def layer_cost(
    layer: Layer,
    counts: dict[str, int],
    convention: Convention = "macs",
    *,
    count_bias: bool = False,
    count_norm: bool = False,
) -> Cost:
    """The cost of one layer when group g has `counts[g]` units; 0 in a block that is skipped."""
    if layer.block is not None and counts[layer.block] == 0:
        return Cost(0, 0)
    kernel = stored = layer.kernel
    if layer.side is not None:
        kernel, stored = counts[layer.side] ** 2, max(counts[layer.side], layer.least) ** 2
    i, o = extent(layer.inputs, counts), extent(layer.outputs, counts)
    match layer.kind:
        case "conv" | "linear":
            params = stored * i * o
            macs = kernel * i * o * layer.positions
        case "depthwise":
            params = stored * o
            macs = kernel * o * layer.positions
        case "transform":  # of kernels down to `layer.kernel`; once a batch, not once a sample
            params, macs = (i * o, 0) if kernel <= layer.kernel else (0, 0)
        case "lstm":
            params = 4 * o * (i + o) + 8 * o
            macs = 4 * o * (i + o) * layer.positions
        case "embedding":
            params, macs = i * o, 0
        case "norm":
            params = 2 * o if count_norm else 0
            macs = 2 * o * layer.positions if convention == "profiler" else 0
        case _:
            raise InputError(
                f"layer {layer.name!r} has kind {layer.kind!r}; "
                "known: conv, depthwise, embedding, linear, lstm, norm, transform"
            )
    is_conv = layer.kind in ("conv", "depthwise")
    if convention == "adds" and is_conv:
        macs += i * layer.relu_positions  # one for each element of a ReLU at a conv's input
    if convention == "dwnp" and is_conv and layer.gated:
        macs += 3 * o * layer.positions
    if count_bias and layer.bias:
        params += o
    return Cost(params, macs)


def cost_table(
    layers: Sequence[Layer],
    space: UnitSpace,
    map: IndexMap | None = None,
    convention: Convention = "macs",
    *,
    count_bias: bool = False,
    count_norm: bool = False,
) -> list[tuple[Layer, Cost]]:
    """The cost of each layer of the sub-network; no map means the whole network."""
    if convention not in CONVENTIONS:
        raise InputError(
            f"unknown cost convention {convention!r}; {did_you_mean(convention, CONVENTIONS)}"
        )
    map = IndexMap.full() if map is None else map
    space.validate(map)
    counts = space.counts_by_group(map)
    return [
        (layer, layer_cost(layer, counts, convention, count_bias=count_bias, count_norm=count_norm))
        for layer in layers
    ]


def cost(
    layers: Sequence[Layer],
    space: UnitSpace,
    map: IndexMap | None = None,
    convention: Convention = "macs",
    *,
    count_bias: bool = False,
    count_norm: bool = False,
) -> Cost:
    """The cost of the sub-network, as papers count it (biases and norms off by default).

    >>> from subfleet.core.bindings import Free, Unit
    >>> space = UnitSpace({"h": 4}, {}, {})
    >>> fc = Layer(name="fc", kind="linear", inputs=Unit("h"), outputs=Free(10), bias=True)
    >>> cost([fc], space, IndexMap.prefix({"h": 3}), count_bias=True)
    Cost(params=40, macs=30)
    """
    rows = cost_table(layers, space, map, convention, count_bias=count_bias, count_norm=count_norm)
    return Cost(sum(c.params for _, c in rows), sum(c.macs for _, c in rows))


def stored_params(
    space: UnitSpace,
    map: IndexMap,
    *,
    statistics: Iterable[str] = (),
    policy: StatisticsPolicy = "indexed_mean",
) -> int:
    """The exact number of entries that a message with this sub-network carries.

    `statistics` names the running statistics of BatchNorm; with policy "local" they
    never travel and are not counted.
    """
    space.validate(map)
    left_out = frozenset(statistics) if policy == "local" else frozenset()
    return space.slice_numel(map, without=left_out)


def wire_bytes(
    space: UnitSpace,
    map: IndexMap,
    *,
    statistics: Iterable[str] = (),
    policy: StatisticsPolicy = "indexed_mean",
) -> WireBytes:
    """Bytes of one message that carries the sub-network as float32, and its map."""
    entries = stored_params(space, map, statistics=statistics, policy=policy)
    return WireBytes(BYTES_PER_ENTRY * entries, map.wire_bytes(space))
