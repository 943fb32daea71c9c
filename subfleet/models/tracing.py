"""Super-networks from the user's own modules, by following one sample through them.

`supernet` finds which channels and neurons hang together, how each tensor is cut, and
what a sub-network costs; `explain` says what it found, layer by layer. The small modules
run the user's own code: they are copies with smaller layers.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subfleet.core.bindings import Binding, groups_of
from subfleet.core.cost import Layer
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.supernet import SuperNetwork, drop_counters
from subfleet.core.units import UnitSpace
from subfleet.models.axes import Reason, size_of
from subfleet.models.follow import Follower, Found, users_line
from subfleet.models.layer_rules import LAYER_RULES
from subfleet.models.rules import RULES
from subfleet.models.template import Init, Template, bare, build_small, filled, prepared

_RULES = RULES | LAYER_RULES
_BATCH, _OTHER_BATCH = 3, 5  # odd and unequal, so that sizes written out in the code show
_ASKED = "x.shape[1], or the layer's own size,"
_FIXED = "it works on an axis of fixed length"


class Finding(NamedTuple):
    """What became of a layer's outputs: the groups whose units they are, or why not all are."""

    layer: str
    groups: tuple[str, ...]
    reason: str


def supernet(
    module: nn.Module,
    example_input: Tensor,
    *,
    name: str | None = None,
    fixed: Collection[str] | Mapping[str, str] = (),
    annotate: Mapping[str, str | None] | None = None,
    init: Init | None = None,
) -> SuperNetwork:
    """A `SuperNetwork` of a plain module that makes class scores [B, C] of a batch.

    Unit groups are named after the first layer that makes their units. What cannot be
    cut stays whole (see `explain`). The module is left as it is.

    Args:
        module: Any module whose forward pass depends on shapes, not on values.
        example_input: A batch, of one sample or more; its values do not matter.
        name: The model's name; by default the class's.
        fixed: Layers whose outputs, or groups whose units, are never dropped; as a mapping,
            with the reason that `subfleet models explain` is to give.
        annotate: For a layer, the name of the group that its outputs are (layers with
            the same name become one group), or None to keep them all.
        init: Initialises a fresh module in place, after each layer's own
            `reset_parameters`; a function of a module, so that it can be pickled. Without
            it, tensors that are one number throughout in `module` start as that number.

    Raises:
        InputError: Naming the layer: values decide the way of the forward pass, tensors are
            tied, a layer is used twice, an annotated group cannot be cut, ...

    >>> net = supernet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
    ...                torch.zeros(1, 4))
    >>> dict(net.space.groups), net.cost().macs
    ({'0': 8}, 56)
    """
    name = name or type(module).__name__
    traced = _Traced(name, module, example_input, fixed, annotate or {}, init)
    return traced.network()


def explain(
    module: nn.Module,
    example_input: Tensor,
    *,
    fixed: Collection[str] = (),
    annotate: Mapping[str, str | None] | None = None,
) -> list[Finding]:
    """Each layer with weights, in the order of running: its groups, or why units are kept.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 2))
    >>> for finding in explain(net, torch.zeros(1, 3, 4, 4)):
    ...     print(finding.layer, finding.groups, finding.reason)
    0 () a group norm of 2 groups of channels; use GroupNorm(1, channels) (at '1')
    1 () a group norm of 2 groups of channels; use GroupNorm(1, channels) (at '1')
    3 () the class scores
    """
    name = type(module).__name__
    return _Traced(name, module, example_input, fixed, annotate or {}, _no_init).findings()


def _no_init(module: nn.Module) -> None:
    """Leave a module as its layers were reset."""


class _Traced:
    """A module followed, its groups named and tried out."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        example: Tensor,
        fixed: Collection[str],
        annotate: Mapping[str, str | None],
        init: Init | None,
    ) -> None:
        if not isinstance(example, Tensor) or example.dim() < 2:
            raise InputError(
                f"model {name!r}: the example input is {_shape(example)}; give a batch, a tensor "
                "whose first axis is the samples"
            )
        self.name, self.input_shape, self.dtype = name, tuple(example.shape[1:]), example.dtype
        ready = prepared(name, module)
        self.filled = filled(name, ready, init)
        self.init, self.bare, self.found = init, bare(ready), Found()
        self.fixed = dict(fixed) if isinstance(fixed, Mapping) else dict.fromkeys(fixed, "")
        self.axes = self.found.axes
        meta = drop_counters(deepcopy(ready).to("meta"))
        self.calls, out = self._follow(meta.eval(), _BATCH)
        rows = list(self.found.rows)
        self._follow(meta.train(), _BATCH)  # may meet units where evaluation does not
        self.found.rows[:] = rows
        self.num_classes = int(out.shape[1])
        self._annotate(fixed, annotate)
        self._try_widths()

    # -- following

    def _follow(self, meta: nn.Module, batch: int) -> tuple[list[str], Tensor]:
        follower = Follower(self.name, meta, self.found, _RULES)
        x = torch.empty(batch, *self.input_shape, dtype=self.dtype, device="meta")
        out = follower.run(x)
        self.axes.fix(follower.labels(out)[1], Reason("", "the class scores"))
        return follower.calls, out

    # -- annotations

    def _annotate(self, fixed: Collection[str], annotate: Mapping[str, str | None]) -> None:
        outputs, self.asked = self.found.outputs, {}
        for layer in (*fixed, *annotate):
            if layer not in outputs and layer not in annotate.values():
                raise InputError(
                    f"model {self.name!r} has no layer {layer!r} with weights; "
                    f"{did_you_mean(layer, outputs)}"
                )
        layers: dict[str, str] = {}
        for layer, group in annotate.items():
            if group is None:
                self.axes.fix(outputs[layer], Reason("", "kept by annotation"))
            elif group in layers:
                cause = f"outputs of {layer!r} are no units of group {group!r}"
                self.axes.same(outputs[layers[group]], outputs[layer], Reason(layer, cause))
            layers.setdefault(group or "", layer)
        for layer in fixed:
            label = outputs[layer] if layer in outputs else outputs[layers[layer]]
            self.axes.fix(label, Reason("", "kept by annotation"))
        self.asked = {
            layer: group
            for layer, group in annotate.items()
            if group is not None and layer not in fixed and group not in fixed
        }

    def _names(self) -> dict[int, str]:
        """The name of each group's variable: as annotated, or its first layer's."""
        names = {v: self.axes.makers[v][0] for v in self.axes.groups()}
        given: dict[int, str] = {}
        for layer, group in self.asked.items():
            label = self.axes.resolve(self.found.outputs[layer])
            if (reason := self.axes.reason(label)) is not None or len(label) != 1:
                why = reason or "its outputs are units of several groups"
                raise InputError(
                    f"model {self.name!r}, layer {layer!r}: annotated as group {group!r}, but it "
                    f"cannot be cut: {why}; annotate None, or change the layer"
                )
            variable = label[0].variable
            if variable is None or given.setdefault(variable, group) != group:
                raise InputError(
                    f"model {self.name!r}, layer {layer!r}: annotated as group {group!r}, but its "
                    f"outputs are {'classes' if variable is None else given[variable]!r}; "
                    "give one name to layers whose outputs hang together"
                )
        names |= given
        twice = [name for name, times in Counter(names.values()).items() if times > 1]
        if twice:
            raise InputError(
                f"model {self.name!r}: two groups are called {twice[0]!r}; annotate another name"
            )
        return names

    # -- trying out

    def _try_widths(self) -> None:
        """Fix the groups with which the module's own code fails at another width.

        That is, the code says a size in full: `x.view(-1, 400)`.
        """
        while True:
            names = self._names()
            if not names or self._failure(names, names) is None:
                break
            if (cause := self._failure(names, ())) is not None:
                raise InputError(
                    f"model {self.name!r} cannot be followed with {_OTHER_BATCH} samples as with "
                    f"{_BATCH} ({cause.cause}); let its code take a batch of any size"
                )
            causes = {v: self._failure(names, [v]) for v in names}
            if not any(causes.values()):  # each alone goes well, and all together do not
                causes = dict.fromkeys(names, self._failure(names, names))
            for variable, cause in causes.items():
                if cause is not None:
                    self.axes.fix(self.found.outputs[self.axes.makers[variable][0]], cause)

    def _failure(self, names: Mapping[int, str], narrow: Iterable[int]) -> Reason | None:
        """What goes wrong where the groups `narrow` have half their units; None if nothing."""
        counts = {group: self.axes.sizes[v] for v, group in names.items()}
        counts |= {names[v]: self.axes.sizes[v] // 2 for v in narrow}
        with torch.device("meta"):
            small = drop_counters(build_small(self._template(names), counts)).eval()
        follower = Follower(self.name, small, Found(), _RULES)
        x = torch.empty(_OTHER_BATCH, *self.input_shape, dtype=self.dtype, device="meta")
        try:
            out = follower.run(x)
        except InputError as error:
            cause = error.__cause__ or error
            line = users_line(traceback.walk_tb(cause.__traceback__))
            said = str(cause).splitlines()[0]
            instead = "x.flatten(1)" if "invalid for input of size" in said else _ASKED
            return Reason(
                follower.layer,
                f"the code writes this width out{line}: {said}; write {instead} instead",
            )
        if out.shape[1] != self.num_classes:
            return Reason("", f"at another width there are {out.shape[1]} class scores")
        if follower.calls != self.calls:
            return Reason("", "at another width the code calls other functions")
        return None

    # -- results

    def _template(self, names: Mapping[int, str]) -> Template:
        sizes = tuple(
            (path, attribute, tuple(self.axes.binding(label, names) for label in labels))
            for (path, attribute), labels in self.found.sizes.items()
        )
        tensors, draws = self._tensors(names), self.found.draws
        return Template(self.bare, tensors, sizes, self.filled, self.init, draws)

    def _tensors(self, names: Mapping[int, str]) -> dict[str, tuple[Binding, ...]]:
        return {
            name: tuple(self.axes.binding(label, names) for label in labels)
            for name, labels in self.found.tensors.items()
        }

    def network(self) -> SuperNetwork:
        """The super-network of what was found."""
        names = self._names()
        template = self._template(names)
        groups = {group: self.axes.sizes[variable] for variable, group in names.items()}
        axes = template.tensors
        state = drop_counters(deepcopy(self.bare)).state_dict()
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in state.items()}
        trained = {leaf for leaf, _ in self.bare.named_parameters()}
        return SuperNetwork(
            name=self.name,
            space=UnitSpace(groups, {leaf: axes[leaf] for leaf in shapes}, shapes),
            layers=tuple(self._layers(names)),
            build=partial(build_small, template),
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            elastic=tuple(groups),
            statistics=frozenset(shapes) - trained,
            input_dtype=self.dtype,
            fixed=self.fixed,
            uncounted=tuple(
                f"{at or 'the module itself'} ({what})" for at, what in self.found.uncounted.items()
            ),
        )

    def _layers(self, names: Mapping[int, str]) -> Iterable[Layer]:
        for row in self.found.rows:
            options: dict[str, Any] = row.options
            yield Layer(
                name=row.name,
                kind=row.kind,  # pyright: ignore[reportArgumentType]
                inputs=self.axes.binding(row.inputs, names),
                outputs=self.axes.binding(row.outputs, names),
                **options,
            )

    def findings(self) -> list[Finding]:
        """What became of each layer, and which functions were not understood."""
        names, found = self._names(), []
        for layer, label in self.found.outputs.items():
            groups = tuple(dict.fromkeys(groups_of(self.axes.binding(label, names))))
            reason = "" if groups else "one unit alone" if size_of(label) == 1 else _FIXED
            found.append(Finding(layer, groups, str(self.axes.reason(label) or reason)))
        for layer, name in self.found.unseen.items():
            found.append(Finding(layer, (), f"{name} is not followed, nor its cost counted"))
        return found


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
