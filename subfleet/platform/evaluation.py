"""Scoring a network on clients: many at once where they share it, one by one where they adapt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subfleet.core import calibration
from subfleet.core.algorithm import Evaluation
from subfleet.core.program import Params
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.platform import loop
from subfleet.platform.chunks import Chunk, Rows
from subfleet.platform.resident import Resident

BATCH = 256


def run(
    net: SuperNetwork,
    resident: Resident,
    params: Params,
    how: Evaluation,
    blocks: Mapping[str, Rows],
    part: str,
    scale: Scaling,
    adapting: Chunk | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores `params` on every client of a block.

    `adapting` holds the same clients with the program of `how.prepare`: each is
    trained by it from `params` and scored with what it then has (a `finish` of the
    program is not asked). Calibration comes after it. Returns arrays of one entry
    per client: correct answers, summed loss, samples.
    """
    block = blocks[part]
    clients = len(block.offsets) - 1
    count = np.diff(block.offsets)
    calibrates = bool(how.calibrate and net.statistics)
    if adapting is None and not calibrates:
        resident.load(params)
        right, loss = answers(resident, resident.params, block.x, block.y, scale)
        sums = np.zeros((2, clients))
        which = np.repeat(np.arange(clients), count)
        np.add.at(sums[0], which, right)
        np.add.at(sums[1], which, loss)
        return sums[0], sums[1], count
    sums = np.zeros((2, clients))
    for k, trained in enumerate(_starts(resident, params, clients, adapting)):
        if calibrates:
            resident.load({**trained, **resident.fresh})
            calibrate(resident, rows_of(blocks["train"], k)[0], how, scale)
        right, loss, _ = score(resident, resident.params, *rows_of(block, k), scale)
        sums[:, k] = right, loss
    return sums[0], sums[1], count


def _starts(
    resident: Resident, params: Params, clients: int, adapting: Chunk | None
) -> Iterator[Params]:
    """What each client has before it calibrates and tests, in the resident's buffers or loose."""
    if adapting is None:
        for _ in range(clients):
            yield params
        return
    # The loop trains the next client only when this one has been scored.
    for _ in loop.run(adapting, resident):
        yield resident.params


def rows_of(block: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows (x, y) of the k-th client of a block."""
    first, last = block.offsets[k], block.offsets[k + 1]
    return block.x[first:last], block.y[first:last]


def calibrate(resident: Resident, x: np.ndarray, how: Evaluation, scale: Scaling) -> None:
    """Re-estimates BatchNorm statistics as plain means over up to `how.calibrate` batches."""
    batches = [x[i : i + how.batch] for i in range(0, len(x), how.batch)][: how.calibrate]
    rows = (resident.images(torch.as_tensor(batch), scale) for batch in batches)
    calibration.calibrate(resident.module, rows)


@torch.no_grad()
def answers(
    resident: Resident, params: Params, x: np.ndarray, y: np.ndarray, scale: Scaling
) -> tuple[np.ndarray, np.ndarray]:
    """For each row: 1 if the answer is right else 0, and its cross-entropy."""
    resident.module.eval()
    right, loss = np.zeros(len(y)), np.zeros(len(y))
    for i in range(0, len(y), BATCH):
        rows = resident.images(torch.as_tensor(x[i : i + BATCH]), scale)
        truth = torch.as_tensor(y[i : i + BATCH]).to(resident.device)
        logits = resident(params, rows).float()
        right[i : i + BATCH] = (logits.argmax(1) == truth).cpu().numpy()
        loss[i : i + BATCH] = _losses(logits, truth).cpu().numpy()
    return right, loss


def _losses(logits: Tensor, truth: Tensor) -> Tensor:
    return F.cross_entropy(logits, truth, reduction="none")


def score(
    resident: Resident, params: Params, x: np.ndarray, y: np.ndarray, scale: Scaling
) -> tuple[float, float, int]:
    """Correct answers, summed loss and samples of one client; leaves the network training."""
    right, loss = answers(resident, params, x, y, scale)
    resident.module.train()
    return float(right.sum()), float(loss.sum()), len(y)
