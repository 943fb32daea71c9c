"""What functions without weights do to the units of their tensors' axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subfleet.models.axes import Label, Part, block, concat, free, is_free, size_of
from subfleet.models.follow import Call, Follower, NoRule, tensors_in

Rule = Callable[[Follower, Call], None]


def elementwise(f: Follower, call: Call) -> None:
    """Axes that meet by broadcasting hold the same units."""
    for out in tensors_in(call.out):
        labels: list[Label | None] = [None] * out.dim()
        for tensor in call.tensors:
            for axis, label in enumerate(f.labels(tensor), start=out.dim() - tensor.dim()):
                if size_of(label) != out.shape[axis]:
                    continue  # one value for all units
                before = labels[axis]
                if before is None:
                    labels[axis] = label
                else:
                    f.axes.same(before, label, f.because(f"{call.name} joins it with other units"))
        f.label(out, [lab or free(n) for n, lab in zip(out.shape, labels, strict=True)])
        if call.name in ("relu", "relu_", "relu6") or _is_relu6(call):
            f.relus.add(id(out))


def _is_relu6(call: Call) -> bool:
    return call.name in ("hardtanh", "hardtanh_") and call.arg(1, "min_val") == 0


def over_units(f: Follower, call: Call) -> None:
    """Softmax and the like: along their axis each value depends on all the others."""
    x, axis = call.arg(0, "input"), call.arg(1, "dim")
    if call.name == "normalize":
        axis = call.arg(2, "dim", 1)
    axes = range(x.dim()) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    fix(f, [f.labels(x)[a] for a in axes], f"{call.name} works across it")
    elementwise(f, call)


def over_space(axes: int) -> Rule:
    """Pooling and the like over the last `axes` axes; units before them stay apart."""

    def rule(f: Follower, call: Call) -> None:
        x = call.arg(0, "input")
        for out in tensors_in(call.out):
            kept = f.labels(x)[: out.dim() - axes]
            fix(f, f.labels(x)[x.dim() - axes :], f"{call.name} works across it")
            f.label(out, [*kept, *(free(size) for size in out.shape[len(kept) :])])

    return rule


def constant(f: Follower, call: Call) -> None:
    """New values that take no more than dtype and device from their tensor."""
    f.label(call.out, [free(size) for size in call.out.shape])


def interpolate(f: Follower, call: Call) -> None:
    """Resizing of all axes but the first two."""
    over_space(call.arg(0, "input").dim() - 2)(f, call)


def fix(f: Follower, labels: Sequence[Label], cause: str) -> None:
    """Fix the units of all of the axes."""
    for label in labels:
        f.axes.fix(label, f.because(cause))


def reduction(f: Follower, call: Call) -> None:
    """Sums, means and the like: the reduced axes vanish, or are left with length 1."""
    x, dims = call.arg(0, "input"), call.arg(1, "dim")
    if isinstance(dims, Tensor) or "other" in call.kwargs:  # the larger of two tensors
        return elementwise(f, call)
    if isinstance(dims, bool | str):
        raise NoRule(f"{call.name} without whole numbers for axes is not known")
    given = range(x.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims
    reduced = {axis % x.dim() for axis in (given or range(x.dim()))}
    labels = f.labels(x)
    for out in tensors_in(call.out):
        if out.dim() == x.dim():
            f.label(out, [free(1) if a in reduced else lab for a, lab in enumerate(labels)])
        else:
            f.label(out, [lab for a, lab in enumerate(labels) if a not in reduced])
    return None


# -- shapes


def reshape(f: Follower, call: Call) -> None:
    """View, flatten, squeeze: axes are merged, outer units becoming blocks, or split."""
    x, out = call.arg(0, "input"), call.out
    before, after = f.labels(x), [free(size) for size in out.shape]
    for ins, outs in _aligned(tuple(x.shape), tuple(out.shape)):
        units = [i for i in ins if not is_free(f.axes.resolve(before[i]))]
        if not units:
            continue
        merged = _merged([before[i] for i in ins])
        if merged is None:
            fix(f, [before[i] for i in units], f"{call.name} mixes it with another axis")
        elif len(outs) == 1:
            after[outs[0]] = merged
        else:
            _split(f, call, merged, outs, after)
    f.label(out, after)


def _aligned(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, other than those of length 1, with equal products."""
    ins = [i for i, size in enumerate(a) if size != 1]
    outs = [i for i, size in enumerate(b) if size != 1]
    runs = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while (m := math.prod(a[i] for i in left)) != (n := math.prod(b[i] for i in right)):
            if m < n:
                left.append(ins.pop(0))
            else:
                right.append(outs.pop(0))
        runs.append((left, right))
    return runs


def _merged(labels: list[Label]) -> Label | None:
    """The label of axes flattened into one; None where they are units of units."""
    outer, inner = labels[0], labels[1:]
    each = math.prod(size_of(label) for label in inner)
    if all(is_free(label) for label in inner):
        return block(outer, each)
    copies = size_of(outer)
    rest = _merged(inner)
    # The same units once for each of a few outer positions, such as an LSTM's directions.
    if is_free(outer) and rest is not None and copies <= _MAX_COPIES:
        return concat(*[rest] * copies)
    return None


_MAX_COPIES = 64


def _split(f: Follower, call: Call, label: Label, outs: list[int], after: list[Label]) -> None:
    """A block may be split into its units and their neighbouring indices."""
    parts = f.axes.resolve(label)
    each = math.prod(size_of(after[o]) for o in outs[1:])
    if len(parts) == 1 and parts[0].each == each:
        after[outs[0]] = (Part(parts[0].variable, parts[0].count),)
    else:
        fix(f, [label], f"{call.name} splits it")


def permutation(f: Follower, call: Call) -> None:
    """Transposition of any kind: where each axis goes shows on a tensor of unequal lengths."""
    x = call.arg(0, "input")
    probe = torch.empty([2 + axis for axis in range(x.dim())], device="meta")
    name = call.name.removeprefix("get ")
    method = getattr(torch.Tensor, name)
    with torch._C.DisableTorchFunction():
        moved = (
            getattr(probe, name)
            if call.name.startswith("get ")
            else method(probe, *call.args[1:], **_without(call.kwargs, "input"))
        )
    labels = f.labels(x)
    f.label(call.out, [labels[size - 2] for size in moved.shape])


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def expansion(f: Follower, call: Call) -> None:
    """Axes of length 1 grow; new ones are of fixed length."""
    x, out = call.arg(0, "input"), call.out
    labels = [free(size) for size in out.shape]
    for axis, label in enumerate(f.labels(x), start=out.dim() - x.dim()):
        if size_of(label) == out.shape[axis]:
            labels[axis] = label
    f.label(out, labels)


def padding(f: Follower, call: Call) -> None:
    """Padded axes that hold units get constants beside them; borders of an image are free."""
    x, widths, mode = call.arg(0, "input"), list(call.arg(1, "pad")), call.arg(2, "mode")
    labels = f.labels(x)
    for pair in range(len(widths) // 2):
        axis = x.dim() - 1 - pair
        before, after = widths[2 * pair : 2 * pair + 2]
        if before == after == 0:
            continue
        if not is_free(labels[axis]) and (mode not in (None, "constant") or min(before, after) < 0):
            fix(f, [labels[axis]], "pad repeats or cuts it")
        size = call.out.shape[axis]
        if is_free(f.axes.resolve(labels[axis])) or min(before, after) < 0:
            labels[axis] = free(size)
        else:
            ends = [free(n) if n else () for n in (before, after)]
            labels[axis] = concat(ends[0], labels[axis], ends[1])
    f.label(call.out, labels)


def concatenation(f: Follower, call: Call) -> None:
    """Units side by side along one axis; the other axes hold the same units."""
    tensors = list(call.arg(0, "tensors"))
    axis = call.arg(1, "dim", 0) % call.out.dim()
    labels = f.labels(tensors[0])
    for tensor in tensors[1:]:
        for a, (first, label) in enumerate(zip(labels, f.labels(tensor), strict=True)):
            if a != axis:
                f.axes.same(first, label, f.because(f"{call.name} joins it with other units"))
    labels[axis] = concat(*(f.labels(tensor)[axis] for tensor in tensors))
    f.label(call.out, labels)


def stacking(f: Follower, call: Call) -> None:
    """Tensors of the same units along a new axis."""
    tensors = list(call.arg(0, "tensors"))
    axis = call.arg(1, "dim", 0) % call.out.dim()
    labels = f.labels(tensors[0])
    for tensor in tensors[1:]:
        for first, label in zip(labels, f.labels(tensor), strict=True):
            f.axes.same(first, label, f.because("stack joins it with other units"))
    f.label(call.out, [*labels[:axis], free(len(tensors)), *labels[axis:]])


def pieces(f: Follower, call: Call) -> None:
    """Unbind, split and chunk: an axis is taken apart; units only where parts end."""
    x = call.arg(0, "input")
    axis = call.arg(1 if call.name == "unbind" else 2, "dim", 0) % x.dim()
    labels = f.labels(x)
    if call.name == "unbind":
        fix(f, [labels[axis]], "unbind takes it apart")
        for out in call.out:
            f.label(out, labels[:axis] + labels[axis + 1 :])
        return
    ends = [0]
    for out in call.out:
        ends.append(ends[-1] + out.shape[axis])
    cut = _cut_at(f.axes.resolve(labels[axis]), ends)
    if cut is None:
        fix(f, [labels[axis]], f"{call.name} takes it apart")
    for number, out in enumerate(call.out):
        own = free(out.shape[axis]) if cut is None else cut[number]
        f.label(out, [*labels[:axis], own, *labels[axis + 1 :]])


def _cut_at(label: Label, ends: list[int]) -> list[Label] | None:
    """The label between each two ends; None where an end is within a part with units."""
    runs = []
    for start, stop in pairwise(ends):
        run, at = [], 0
        for part in label:
            first, last = max(at, start), min(at + part.size, stop)
            if first < last and last - first == part.size:
                run.append((part,))
            elif first < last and part.variable is None:
                run.append(free(last - first))
            elif first < last:
                return None
            at += part.size
        runs.append(concat(*run))
    return runs


def indexing(f: Follower, call: Call) -> None:
    """Whole numbers, slices, None and Ellipsis; units must be taken all or not at all."""
    x, index = call.args
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (isinstance(i, int | slice) or i is None or i is Ellipsis) for i in items):
        raise NoRule("an index that is a tensor or a list takes it apart")
    taken = sum(isinstance(i, int | slice) for i in items)
    rest = [slice(None)] * (x.dim() - taken)
    at = next((n for n, i in enumerate(items) if i is Ellipsis), None)
    items = [*items, *rest] if at is None else [*items[:at], *rest, *items[at + 1 :]]
    before, labels = f.labels(x), []
    for item in items:
        if item is None:
            labels.append(free(1))
            continue
        label = before.pop(0)
        size = size_of(label)
        if isinstance(item, slice) and item.indices(size) == (0, size, 1):
            labels.append(label)
            continue
        fix(f, [label], "an index takes it apart")
        if isinstance(item, slice):
            labels.append(free(len(range(*item.indices(size)))))
    f.label(call.out, labels)


_ELEMENTWISE = """
    relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu
    silu mish softplus softsign hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid sigmoid_ tanh
    tanh_ logsigmoid threshold tanhshrink hardshrink softshrink
    dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout
    feature_alpha_dropout
    add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub mul mul_ multiply
    __mul__ __rmul__ __imul__ div div_ divide true_divide __truediv__ __rtruediv__ __itruediv__
    __div__ __rdiv__ pow pow_ __pow__ __rpow__ square sqrt rsqrt exp expm1 log log1p abs neg
    negative __neg__ sign reciprocal sin cos erf clamp clamp_ clip clamp_min clamp_max maximum
    minimum where lerp addcmul addcdiv eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    logical_not logical_and logical_or masked_fill masked_fill_ nan_to_num
    contiguous clone detach to type type_as float double half bfloat16 long int bool cpu alias
    zeros_like ones_like empty_like full_like rand_like randn_like
    zero_ fill_ bernoulli bernoulli_ uniform_ normal_
"""
_RESHAPES = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel"
_PERMUTATIONS = "permute transpose swapaxes swapdims movedim moveaxis t"
_REDUCTIONS = "mean sum amax amin max min var std prod logsumexp"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    "get data": elementwise,
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "normalize"), over_units),
    **dict.fromkeys(_REDUCTIONS.split(), reduction),
    **dict.fromkeys(_RESHAPES.split(), reshape),
    **dict.fromkeys((*_PERMUTATIONS.split(), "get T", "get mT"), permutation),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expansion),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenation),
    **dict.fromkeys(("unbind", "split", "chunk", "split_with_sizes"), pieces),
    **dict.fromkeys(("interpolate", "upsample"), interpolate),
    **{
        f"{kind}_pool{axes}d{suffix}": over_space(axes)
        for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg")
        for axes in (1, 2, 3)
        for suffix in ("", "_with_indices")
    },
    **dict.fromkeys(("new_empty", "new_full", "new_ones", "new_zeros"), constant),
    "pad": padding,
    "stack": stacking,
    "__getitem__": indexing,
}
"""Rule by the name of the function, method ("add_") or property ("get T")."""
