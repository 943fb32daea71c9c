"""A chunk: a bundle's clients of one variant, with all that computing them needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from subfleet.core import seeds
from subfleet.core.lowrank import LowRank, dense
from subfleet.core.program import (
    ClientProgram,
    ClientResult,
    ClientTask,
    LossProgram,
    Params,
    Stream,
)
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.platform import batches
from subfleet.platform.record import Choice


class Rows(Protocol):
    """The rows of several clients, client after client (a data set's block)."""

    @property
    def x(self) -> np.ndarray:
        """[rows, *input_shape]."""
        ...

    @property
    def y(self) -> np.ndarray:
        """[rows], int64."""
        ...

    @property
    def offsets(self) -> np.ndarray:
        """[clients + 1]: where each client starts."""
        ...


class Images(Protocol):
    """Turns stored rows into what the network takes."""

    def images(self, x: Tensor, scale: Scaling) -> Tensor:
        """Float and scaled; integers other than uint8 are tokens and become int64."""
        ...


class Trained(NamedTuple):
    """One client after its program ran.

    `factors` are weights of its update that are not written out, where results are only summed.
    """

    result: ClientResult
    loss: float  # mean over the rows seen; NaN where the program has none
    steps: int
    rows: int
    healthy: bool  # no NaN or infinity in its loss and tensors
    params: Params | None  # the locally trained network, without `factors`
    factors: Mapping[str, LowRank] = {}

    @property
    def network(self) -> Params | None:
        """What is tested on the client's own rows: its personal network or the trained one."""
        if self.result.local or not self.factors or self.params is None:
            return self.result.local or self.params
        return {**self.params, **dense(self.factors)}


@dataclass
class Chunk:
    """Clients of one variant; `positions` are their places in the bundle's blocks.

    `sums`: what they return is added up as it is, so that it may come as factors.
    """

    net: SuperNetwork
    program: ClientProgram
    choice: Choice
    tasks: Sequence[ClientTask]
    positions: Sequence[int]
    blocks: Mapping[str, Rows]
    own: Sequence[Params | None]
    shared: Mapping[int, Params]
    seed: int
    round: int
    scale: Scaling
    sums: bool = False
    _slices: dict[tuple[int, bytes], Params] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this chunk computes."""
        return torch.device(self.choice.device)

    def start(self, index: int) -> Params:
        """A client's first tensors: its slice of the shared tree, its kept ones on top.

        Single precision, as the data are, also where the server's are wider.
        Kept leaves that bear the network's own names (BatchNorm statistics, say)
        replace the server's.
        """
        task = self.tasks[index]
        where = (task.shared, task.map.key)
        if where not in self._slices:
            cut = self.net.space.extract(self.shared[task.shared], task.map)
            self._slices[where] = {n: v.to(self.device, torch.float32) for n, v in cut.items()}
        own = self.kept(index)
        if not own:
            return self._slices[where]
        return self._slices[where] | {k: v for k, v in own.items() if k in self.net.space.axes}

    def kept(self, index: int) -> Params | None:
        """The client's own state on the device, None where the algorithm keeps none."""
        own = self.own[index]
        return None if own is None else self._here(own)

    def inputs(self, index: int) -> Params:
        """The inputs of a client's task, on the device."""
        return self._here(self.tasks[index].inputs)

    def _here(self, tree: Params) -> Params:
        """The tree on this chunk's device; the same tensors where they are there already."""
        return {name: value.to(self.device) for name, value in tree.items()}

    def rows(self, index: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        """A client's stored rows of one part."""
        block, at = self.blocks[part], self.positions[index]
        first, last = block.offsets[at], block.offsets[at + 1]
        return block.x[first:last], block.y[first:last]

    def stored(self, index: int, part: str) -> tuple[Tensor, Tensor]:
        """A client's rows of one part on the device, of the types they are stored in."""
        x, y = self.rows(index, part)
        return torch.as_tensor(x).to(self.device), torch.as_tensor(y).to(self.device)

    def data(self, index: int, part: str, net: Images) -> tuple[Tensor, Tensor]:
        """A client's rows of one part on the device, as the network takes them."""
        x, y = self.stored(index, part)
        return net.images(x, self.scale), y

    def stacked(self, group: range, part: str) -> tuple[Tensor, Tensor]:
        """Stored rows of several clients side by side, [K, N, ...], the shorter padded with 0."""
        block, at = self.blocks[part], [self.positions[i] for i in group]
        counts = {int(block.offsets[p + 1] - block.offsets[p]) for p in at}
        if len(counts) == 1 and at == list(range(at[0], at[0] + len(at))) and 0 not in counts:
            # Neighbours of one length lie in the block as they are wanted: no copy.
            first, last = block.offsets[at[0]], block.offsets[at[-1] + 1]
            x = torch.as_tensor(block.x[first:last]).to(self.device)
            y = torch.as_tensor(block.y[first:last]).to(self.device)
            return x.unflatten(0, (len(at), -1)), y.unflatten(0, (len(at), -1))
        clients = [self.stored(i, part) for i in group]
        longest = max(1, *(len(y) for _, y in clients))  # a padded batch points at row 0
        return (
            torch.stack([_extended(x, longest) for x, _ in clients]),
            torch.stack([_extended(y, longest) for _, y in clients]),
        )

    def schedule(self, index: int, stream: Stream) -> list[np.ndarray]:
        """The client's steps as row numbers."""
        if (steps := self.tasks[index].steps) is not None:
            stream = replace(stream, steps=steps)
        return batches.steps(
            stream,
            self._count(index, stream.part),
            seed=self.seed,
            round=self.round,
            client=self.tasks[index].client,
            min_batch=2 if self.net.statistics else 1,
        )

    def most_steps(self, group: Sequence[int]) -> int:
        """The most steps that one of some clients has, those of its own task left aside."""
        assert isinstance(self.program, LossProgram)
        stream = self.program.stream
        return max(stream.num_steps(self._count(i, stream.part)) for i in group)

    def _count(self, index: int, part: str) -> int:
        block, at = self.blocks[part], self.positions[index]
        return int(block.offsets[at + 1] - block.offsets[at])

    def noise_key(self, index: int) -> int:
        """The key of a client's first step; step i adds i."""
        return seeds.key(self.seed, "noise", round=self.round, client=self.tasks[index].client)


def _extended(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
