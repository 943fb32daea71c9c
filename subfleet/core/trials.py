"""Scoring sub-networks that differ from a known one in a single group, a forward pass each.

A search asks for thousands of such scores. So a candidate is not built: it is the known
sub-network with the columns zeroed that read the units which the candidate lacks
(`subfleet.core.masks` says why that is the same), and whatever runs before the first of
these columns is not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core.bindings import groups_of
from subfleet.core.calibration import calibrate, go_by_the_batch
from subfleet.core.maps import IndexMap
from subfleet.core.masks import along, readers, refuse_joint_norms
from subfleet.core.pruning import Score
from subfleet.core.supernet import SuperNetwork, takes_channels_last

Statistics = Literal["batch", "calibrated"]
"""Where a candidate's BatchNorm statistics come from: the rows that are scored, all at once, or
two batches of `CALIBRATION_ROWS` of them, before they are scored."""

CALIBRATION_ROWS = 128


class Trials:
    """Scores a super-network's prefix sub-networks on rows that stay the same.

    `params` are the whole network's weights, without statistics; `x` is [N, *input_shape],
    `y` [N], int64, on one device.
    """

    def __init__(
        self,
        net: SuperNetwork,
        params: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        statistics: Statistics = "batch",
    ):
        refuse_joint_norms(net, "the search")
        self._net, self._params, self._y = net, params, y
        self._statistics = statistics if net.statistics else "batch"
        # Channels last is half again as fast on a CPU.
        self._channels_last = x.dim() == 4 and takes_channels_last(net)
        self._x = x.contiguous(memory_format=torch.channels_last) if self._channels_last else x
        self._reads = readers(net)
        self._units: dict[str, int] | None = None  # of the sub-network that is built
        self.flops = 0.0  # of all passes so far, as if each were a whole one

    def score(self, units: Mapping[str, int]) -> Score:
        """The score of the sub-network that has the first `units[g]` units of each group."""
        self._build(units)
        return self._scored(0)

    def __call__(self, units: Mapping[str, int], group: str, fewer: int) -> Score:
        """The score of the sub-network of `units` with `fewer` units of one group."""
        self._build(units)
        with self._without(group, fewer) as names:
            first = min((self._stage_of(name) for name in names), default=0)
            return self._scored(first)

    # -- the known sub-network

    def _build(self, units: Mapping[str, int]) -> None:
        if self._units == units:
            return
        self._units = dict(units)
        map = self._net.space.canonical(IndexMap.prefix(units))
        module = self._net.module(map).to(self._x.device)
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = self._net.space.extract(dict(self._params), map)
        module.load_state_dict(weights | self._net.fresh_statistics(map))
        self._module = module
        self._tensors = dict(module.named_parameters())
        self._space = self._net.space.within(map)
        self._stages = list(_stages(module))
        self._inputs = [self._x]
        self._macs = self._net.cost(map).macs
        if self._statistics == "batch":
            go_by_the_batch(module)
            with torch.no_grad():
                for _, stage in self._stages[:-1]:
                    self._inputs.append(stage(self._inputs[-1]))

    def _stage_of(self, tensor: str) -> int:
        """The stage that holds a tensor."""
        return next(i for i, (path, _) in enumerate(self._stages) if tensor.startswith(path))

    # -- a candidate

    @contextmanager
    def _without(self, group: str, fewer: int) -> Iterator[list[str]]:
        """The module with the columns zeroed that read the group's units from `fewer` on."""
        mask = torch.zeros(self._space.size(group), device=self._x.device)
        mask[:fewer] = 1.0
        saved: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, binding in self._reads.items():
                if name not in self._tensors or group not in groups_of(binding):
                    continue
                kept = along(binding, {group: mask}, self._space)
                assert kept is not None
                weight = self._tensors[name]
                saved[name] = weight.clone()
                weight.mul_(kept.view(1, -1, *[1] * (weight.dim() - 2)))
        try:
            yield list(saved)
        finally:
            with torch.no_grad():
                for name, weight in saved.items():
                    self._tensors[name].copy_(weight)

    @torch.no_grad()
    def _scored(self, first: int) -> Score:
        self.flops += float(self._macs * len(self._y))
        if self._statistics == "calibrated":
            self.flops += float(self._macs * min(len(self._y), 2 * CALIBRATION_ROWS))
            calibrate(self._module, self._x.split(CALIBRATION_ROWS)[:2])
            scores = self._module(self._x)
        else:
            scores = self._inputs[first]
            for _, stage in self._stages[first:]:
                scores = stage(scores)
        scores = scores.float()
        right = (scores.argmax(1) == self._y).float().mean()
        return Score(float(right), float(F.cross_entropy(scores, self._y)))


def _stages(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a plain chain runs one after the other, with the prefix of its tensors' names."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _stages(child, f"{path}{name}.")
    else:
        yield path, module
