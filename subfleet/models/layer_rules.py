"""What functions with weights do: they make units, use them up, and cost something."""

from __future__ import annotations

import math

from torch import Tensor, nn

from subfleet.models.axes import Label, block, concat, free, is_free
from subfleet.models.follow import Call, Follower, NoRule, tensors_in
from subfleet.models.rules import Rule, fix


def convolution(f: Follower, call: Call) -> None:
    """Full, depthwise (with or without multiplier) or grouped; 1d, 2d or 3d."""
    x, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    groups, at = call.arg(6, "groups", 1), x.dim() - weight.dim() + 1
    labels, own = f.labels(x), f.labels(weight)
    channels = labels[at]
    fix(f, [*labels[at + 1 :], *own[2:]], "a convolution slides over it")
    name, made, inputs, kind = f.owner(weight), own[0], channels, "conv"
    relu_positions = math.prod(x.shape[at + 1 :]) if id(x) in f.relus else 0
    if groups == 1:
        f.axes.same(channels, own[1], f.because("a convolution reads it"))
        f.axes.made(made, name)
    elif groups == x.shape[at]:
        kind = "depthwise"
        made = block(channels, weight.shape[0] // groups)
        f.axes.same(own[0], made, f.because("a depthwise convolution reads it"))
        f.size(name, "groups", channels)
    else:
        cause = f"a convolution of {groups} groups of channels cannot be cut"
        fix(f, [channels, own[0], own[1]], cause)
        # One output reads the channels of its group alone.
        inputs, relu_positions = free(weight.shape[1]), relu_positions * groups
    f.size(name, "in_channels", channels)
    _made(f, name, "out_channels", made, bias)
    f.row(
        name,
        kind,
        inputs,
        made,
        kernel=math.prod(weight.shape[2:]),
        positions=math.prod(call.out.shape[at + 1 :]),
        relu_positions=relu_positions,
        bias=bias is not None,
    )
    f.label(call.out, [*labels[:at], made, *(free(size) for size in call.out.shape[at + 1 :])])


def _made(f: Follower, name: str, attribute: str, made: Label, bias: Tensor | None) -> None:
    """What all layers with outputs share: a bias, an attribute with their number."""
    f.size(name, attribute, made)
    f.found.outputs[name] = made
    if bias is not None:
        f.axes.same(f.labels(bias)[0], made, f.because("a bias is added to it"))


def linear(f: Follower, call: Call) -> None:
    """Over the last axis, at every position of the axes before it."""
    x, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    name = f.owner(weight)
    *places, features = f.labels(x)
    made, read = f.labels(weight)
    f.axes.same(features, read, f.because("a linear layer reads it"))
    f.axes.made(made, name)
    f.size(name, "in_features", features)
    _made(f, name, "out_features", made, bias)
    _everywhere(f, call.out, name, features, made, bias is not None)
    f.label(call.out, [*places, made])


def _everywhere(
    f: Follower, out: Tensor, name: str, inputs: Label, outputs: Label, bias: bool
) -> None:
    """The row of a linear layer; its cost counts positions, so none of them may be dropped."""
    fix(f, f.labels(out)[1:-1], "a linear layer works at each of its places")
    positions = math.prod(out.shape[1:-1])
    f.row(name, "linear", inputs, outputs, positions=positions, bias=bias)


def product(f: Follower, call: Call) -> None:
    """A matrix product, of two activations or with a weight."""
    a, b = call.arg(0, "input"), call.arg(1, "other", call.kwargs.get("mat2"))
    if min(a.dim(), b.dim()) < 2:
        raise NoRule("a product with a vector is not known to keep units apart")
    left, right = f.labels(a), f.labels(b)
    f.axes.same(left[-1], right[-2], f.because("a matrix product reads it"))
    rest = call.out.dim() - 2
    labels = [free(size) for size in call.out.shape[:rest]]
    for own in (left[:-2], right[:-2]):
        for axis, label in enumerate(own, start=rest - len(own)):
            if is_free(labels[axis]):
                labels[axis] = label
            else:
                f.axes.same(labels[axis], label, f.because("a matrix product joins it"))
    if b.dim() == 2 and f.is_weight(b):
        name = f.owner(b)
        f.axes.made(right[-1], name)
        f.found.outputs[name] = right[-1]
        fix(f, left[1:-1], "a linear layer works at each of its places")
        places = math.prod(call.out.shape[1:-1])
        f.row(name, "linear", right[-2], right[-1], positions=places)
    else:
        f.found.unseen.setdefault(f.layer, call.name)
        f.found.uncounted.setdefault(f.layer, call.name)
    f.label(call.out, [*labels, left[-2], right[-1]])


def embedding(f: Follower, call: Call) -> None:
    """One vector for each token; the vocabulary is never cut."""
    tokens, weight = call.arg(0, "input"), call.arg(1, "weight")
    if f.is_weight(weight):
        name = f.owner(weight)
        words, made = f.labels(weight)
        fix(f, [words], "a vocabulary is never cut")
        f.axes.made(made, name)
        _made(f, name, "embedding_dim", made, None)
        f.row(name, "embedding", words, made, positions=math.prod(tokens.shape[1:]))
    else:
        made = f.labels(weight)[1]
    f.label(call.out, [*f.labels(tokens), made])


# -- norms


def batch_norm(f: Follower, call: Call) -> None:
    """Channel by channel; running statistics are cut as the weights are."""
    x = call.arg(0, "input")
    if call.name == "batch_norm" and call.arg(1, "running_mean") is None:
        raise f.refuse(
            "a BatchNorm without running statistics, so that a sample's scores hang on its batch",
            "set track_running_stats=True, or use GroupNorm(1, channels)",
        )
    own = [call.arg(p, n) for p, n in enumerate(_NORM, start=1)]
    _norm(f, call, x, [t for t in own if t is not None], [1 if x.dim() > 1 else 0], "num_features")


_NORM = ("running_mean", "running_var", "weight", "bias")


def group_norm(f: Follower, call: Call) -> None:
    """All channels as one group, or each for itself; other groups would be cut in two."""
    x, groups = call.arg(0, "input"), call.arg(1, "num_groups")
    own = [t for t in (call.arg(2, "weight"), call.arg(3, "bias")) if t is not None]
    _norm(f, call, x, own, [1], "num_channels")
    channels = f.labels(x)[1]
    if groups == x.shape[1]:
        f.size(f.layer, "num_groups", channels)
    elif groups != 1:
        cause = f"a group norm of {groups} groups of channels; use GroupNorm(1, channels)"
        fix(f, [channels], cause)


def layer_norm(f: Follower, call: Call) -> None:
    """Over the last axes; the statistics are those of the units that are there."""
    x, shape = call.arg(0, "input"), call.arg(1, "normalized_shape")
    own = [t for t in (call.arg(2, "weight"), call.arg(3, "bias")) if t is not None]
    _norm(f, call, x, own, list(range(x.dim() - len(shape), x.dim())), "normalized_shape")


def _norm(
    f: Follower, call: Call, x: Tensor, own: list[Tensor], axes: list[int], attribute: str
) -> None:
    """Weights and statistics over `axes` of the input, which come out as they went in."""
    labels = f.labels(x)
    normed = [labels[axis] for axis in axes]
    for tensor in own:
        for label, weight in zip(normed, f.labels(tensor), strict=True):
            f.axes.same(label, weight, f.because("a norm scales it"))
    weights = [tensor for tensor in own if f.is_weight(tensor)]
    name = f.owner(weights[0]) if weights else f.layer
    f.size(name, attribute, *normed)
    first, *inner = normed
    outputs = block(first, math.prod(x.shape[axis] for axis in axes[1:]))
    if any(not is_free(f.axes.resolve(label)) for label in inner):
        fix(f, inner, "a norm over several axes can only be cut along the first")
    elsewhere = [size for axis, size in enumerate(x.shape) if axis > 0 and axis not in axes]
    if any(isinstance(tensor, nn.Parameter) for tensor in weights):
        f.found.outputs[name] = outputs
        f.row(name, "norm", outputs, outputs, positions=math.prod(elsewhere))
    f.label(call.out, labels)


def prelu(f: Follower, call: Call) -> None:
    """One slope for each channel, or one for all."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    labels = f.labels(x)
    if weight.numel() > 1:
        f.axes.same(labels[1], f.labels(weight)[0], f.because("a PReLU scales it"))
        f.size(f.layer, "num_parameters", labels[1])
    f.label(call.out, labels)


# -- recurrent layers

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(f: Follower, call: Call) -> None:
    """Layers of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, one way or both.

    The module has one hidden size, so that its layers and directions are one group.
    """
    if len(call.args) != 9 or not isinstance(f.part(f.layer), nn.RNNBase):
        raise NoRule(f"{call.name} outside nn.LSTM, nn.GRU or nn.RNN cannot be cut")
    x, state, weights, bias, depth, _, _, both, batch_first = call.args
    each, ways, gates = 4 if bias is True else 2, 2 if both else 1, _GATES[call.name]
    if not isinstance(bias, bool) or x.dim() != 3:
        raise NoRule(f"{call.name} of packed sequences or single samples cannot be cut")
    if len(weights) != depth * ways * each:
        raise NoRule(f"{call.name} with projections cannot be cut")
    *places, features = f.labels(x)
    fix(f, places, "a recurrent layer works at each step")
    positions = x.shape[1 if batch_first else 0]
    hidden = f.axes.fresh(weights[1].shape[1])
    name = f.layer
    f.axes.made(hidden, name)
    f.found.outputs[name] = hidden
    f.size(name, "input_size", features)
    f.size(name, "hidden_size", hidden)
    inputs = features
    for layer in range(depth):
        for way in range(ways):
            at = (layer * ways + way) * each
            label = f"{name}.l{layer}{'_reverse' * way}"
            _cell(f, label, weights[at : at + each], inputs, hidden, gates, positions)
        inputs = concat(*[hidden] * ways)
    outputs, *finals = call.out
    f.label(outputs, [*places, inputs])
    for final in finals:
        f.label(final, [free(final.shape[0]), free(final.shape[1]), hidden])
    for given in tensors_in(state):  # made of zeros, in the layer or by the user, if unknown
        if not is_free(f.labels(given)[-1]):
            f.axes.same(f.labels(given)[-1], hidden, f.because("an initial state"))


def _cell(
    f: Follower,
    name: str,
    weights: list[Tensor],
    inputs: Label,
    hidden: Label,
    gates: int,
    positions: int,
) -> None:
    """The weights of one layer and direction: rows by gates, then by units."""
    rows = concat(*[hidden] * gates)
    why = f.because("a recurrent layer's gates")
    for weight, read in zip(weights[:2], (inputs, hidden), strict=True):
        f.owner(weight)
        out, into = f.labels(weight)
        f.axes.same(out, rows, why)
        f.axes.same(into, read, why)
    for bias in weights[2:]:
        f.axes.same(f.labels(bias)[0], rows, why)
    if gates == 4 and len(weights) == 4:
        f.row(name, "lstm", inputs, hidden, positions=positions)
        return
    biased = len(weights) == 4
    f.row(f"{name}.ih", "linear", inputs, rows, positions=positions, bias=biased)
    f.row(f"{name}.hh", "linear", hidden, rows, positions=positions, bias=biased)


LAYER_RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), product),
    "embedding": embedding,
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "prelu": prelu,
    **dict.fromkeys(_GATES, recurrent),
}
"""Rule by the name of the function."""
