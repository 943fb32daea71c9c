"""The batches of K clients side by side, gathered step by step.

Legend: K clients, N rows of the longest client, S steps, B rows a batch.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from subfleet.core.program import Stream
from subfleet.platform import batches
from subfleet.platform.chunks import Chunk
from subfleet.platform.resident import Resident


class Feed:
    """One stream of the clients `group` of a chunk; with `cycle`, that many steps for each."""

    def __init__(
        self, chunk: Chunk, group: range, stream: Stream, net: Resident, *, cycle: int | None = None
    ):
        self.device = chunk.device
        x_KN, y_KN = chunk.stacked(group, stream.part)
        self.x, self.y = x_KN.flatten(0, 1), y_KN.flatten()  # client after client
        self._images = partial(net.images, scale=chunk.scale)
        schedules = [chunk.schedule(i, stream) for i in group]
        self.num_steps_K = [len(schedule) for schedule in schedules]
        if cycle is not None:
            nothing = [np.empty(0, np.int64)]
            cycled = (schedule or nothing for schedule in schedules)
            schedules = [[s[i % len(s)] for i in range(cycle)] for s in cycled]
        rows, weights = batches.padded(schedules)
        rows += np.arange(len(group))[:, None, None] * x_KN.shape[1]
        self.size = (len(group), rows.shape[2])
        laid_out = rows.swapaxes(0, 1).reshape(rows.shape[1], self.size[0] * self.size[1])
        self.rows_S = torch.from_numpy(laid_out.copy()).to(self.device)
        self.weight_KSB = torch.from_numpy(weights).to(self.device)
        self.num_rows_KS = weights.sum(axis=2, dtype=np.float64)
        # Known on the host before the first step, so that no step waits for the device.
        self._full_S = (weights.all(axis=(0, 2)) & (weights.shape[2] > 0)).tolist()
        self._active_S = (self.num_rows_KS > 0).all(axis=0).tolist()

    @property
    def num_steps(self) -> int:
        """S, the steps of the client that has most."""
        return len(self.rows_S)

    @property
    def num_rows_K(self) -> list[int]:
        """Rows that each client sees in all its steps."""
        return self.num_rows_KS.sum(axis=1).astype(int).tolist()

    def at(self, step: int, *, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """(x_KB, y_KB), and weight_KB only where some row is padding; with another `x` on wish."""
        rows = self.rows_S[step]
        if x is None:
            x = self._gathered(rows).unflatten(0, self.size)
        y = self.y.index_select(0, rows).unflatten(0, self.size)
        return (x, y) if self._full_S[step] else (x, y, self.weight_KSB[:, step])

    def forms(self, x: Tensor) -> list[tuple[tuple[Tensor, ...], bool]]:
        """A step of each form that there is, and whether all clients have it, with this `x`."""
        kinds = list(zip(self._full_S, self._active_S, strict=True))
        return [(self.at(kinds.index(kind), x=x), kind[1]) for kind in dict.fromkeys(kinds)]

    def whole(self) -> Tensor:
        """The x of all steps, [K, S B, ...]."""
        count, size = self.size
        rows = self.rows_S.view(-1, count, size).transpose(0, 1).flatten()
        return self._gathered(rows).unflatten(0, (count, -1))

    def _gathered(self, rows: Tensor) -> Tensor:
        # One index into rows laid end to end: an index for each axis takes four times as long.
        # Rows are gathered as they are stored, pixels a byte each, and become floats after that.
        return self._images(self.x.index_select(0, rows))

    def active(self, step: int) -> np.ndarray | None:
        """Which clients still have this step, bool [K]; None where all have."""
        return None if self._active_S[step] else self.num_rows_KS[:, step] > 0

    def means(self, losses: list[Tensor]) -> list[float]:
        """Each client's loss over its rows, from the [K] losses of every step; NaN for none."""
        if not losses:
            return [float("nan")] * len(self.num_steps_K)
        loss_KS = torch.stack(losses, dim=1).double().cpu().numpy()
        # A finished client's loss is that of padding only: where, not a product, keeps NaN out.
        total_K = np.where(self.num_rows_KS > 0, loss_KS * self.num_rows_KS, 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return (total_K / self.num_rows_KS.sum(axis=1)).tolist()
