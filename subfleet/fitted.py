"""A run's sub-network for one tier, client or width: its map, its weights, how well it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from subfleet.algorithms.local import CALIBRATION_BATCHES
from subfleet.core import seeds
from subfleet.core.algorithm import Evaluation
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.program import Params
from subfleet.core.units import IndexMap
from subfleet.platform import evaluation
from subfleet.platform.kept import KeptStore, Row
from subfleet.platform.metrics import read_metrics
from subfleet.platform.own import own_tensors, statistics_from
from subfleet.platform.record import Choice
from subfleet.platform.resident import Resident
from subfleet.platform.roster import Roster
from subfleet.trained import TrainedRun

# Multiply-accumulates that go through a network for its statistics, and again for its accuracy:
# a few seconds of one core. Fewer rows for large networks, but so many at least ...
_WORK = 6e9
_CALIBRATION_ROWS, _TEST_ROWS = 256, 256
_MOST_TEST_ROWS = 5000  # ... and of small ones no more than these
_OF_A_CLIENT = 20  # rows, where not all can be used: then many clients have a say

_SAID = {
    "none": "none: the network has no BatchNorm",
    "own": "the client's own, as of its last training",
    "server": "the server's",
}

Kind = Literal["tier", "client", "width"]


@dataclass(frozen=True)
class Target:
    """Which sub-network of a run is meant: a tier's, a client's, or that of a width."""

    kind: Kind
    value: str | int | float

    @classmethod
    def of(cls, tier: str | None, client: int | None, width: float | None) -> Target:
        """The one that is given; `InputError` for none or several."""
        options: dict[Kind, str | int | float | None]
        options = {"tier": tier, "client": client, "width": width}
        given = [cls(kind, value) for kind, value in options.items() if value is not None]
        if len(given) != 1:
            named = " and ".join(f"--{target.kind}" for target in given) or "none"
            raise InputError(
                f"which sub-network: {named} given; give one of --tier NAME, --client ID, --width W"
            )
        return given[0]

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


@dataclass(frozen=True)
class Fitted:
    """A physically small network with its weights, in evaluation mode.

    `tier` is the tier's name where there is one. `statistics` says where BatchNorm's
    running statistics come from, `weights` whose the weights are. `accuracy`: "run" is what
    the run measured for the tier, "measured" this network on rows that no client trained on
    (of a client, its own test rows), "why_not" the reason where there are none.
    """

    map: IndexMap
    tier: str | None
    resident: Resident
    statistics: str
    weights: str
    own: tuple[str, ...] = ()  # tensors that are the client's own
    accuracy: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.resident.module


def fitted(run: TrainedRun, target: Target) -> Fitted:
    """The sub-network that a run has made for a target.

    Raises `InputError` for a tier or client that the run does not have, a width outside
    (0, 1], and where BatchNorm's statistics need data that cannot be read.
    """
    tier, map = _map(run, target)
    resident = Resident(run.net, map, Choice(str(target), "cpu", "loop"))
    own: Params = {}
    weights = "the server's"
    if target.kind == "client":
        own = _own(run, int(target.value), map)
        weights = _whose(run, int(target.value), tier, map, own)
    statistics = _load(run, target, map, resident, own)
    resident.module.eval()
    accuracy = _measured(run, target, resident, map)
    if target.kind == "tier":
        accuracy |= _of_the_run(run, str(target.value))
    return Fitted(map, tier, resident, statistics, weights, tuple(sorted(own)), accuracy)


def _map(run: TrainedRun, target: Target) -> tuple[str | None, IndexMap]:
    if target.kind == "width":
        try:
            return None, width_map(run.net, float(target.value))
        except InputError as error:
            raise InputError(f"--width: {error}") from None
    tiers = [tier.name for tier in run.job.fleet.tiers]
    if target.kind == "client":
        client, clients = int(target.value), run.job.fleet.num_clients
        if not 0 <= client < clients:
            raise InputError(
                f"--client {client}: the run's clients are 0 to {clients - 1}; give one of these"
            )
        tier = tiers[int(run.job.fleet.tier_of[client])]
        return tier, run.algorithm.client_map(run.views[tier], run.reports.get(client))
    else:
        tier = str(target.value)
        if tier not in tiers:
            raise InputError(
                f"--tier {tier}: the run has no such tier; {did_you_mean(tier, tiers)}"
            )
    return tier, run.views[tier]


# --- weights ----------------------------------------------------------------------------------


def _own(run: TrainedRun, client: int, map: IndexMap) -> Params:
    """The network's tensors that are the client's own, where they fit the map."""
    cut = run.net.space.extract(run.params, map)
    return own_tensors(run.algorithm, cut, map, _kept(run, client))


def _kept(run: TrainedRun, client: int) -> Row | None:
    if not run.algorithm.keeps or run.checkpoint is None:
        return None
    # Where the checkpoint lies, so that restoring is linking.
    with TemporaryDirectory(prefix=".export-", dir=_writable(run.checkpoint.parent)) as scratch:
        store = KeptStore(Path(scratch) / "kept")
        store.restore(run.checkpoint / "kept")
        (row,) = store.read([client])
        store.close()
    return row


def _whose(run: TrainedRun, client: int, tier: str | None, map: IndexMap, own: Params) -> str:
    """Whose the weights of a client's network are, in words."""
    if own.keys() >= run.net.space.slice_shapes(map).keys():
        return "the client's personal model, as of its last training"
    said = ["the server's"]
    canonical = run.net.space.canonical
    if canonical(map) != canonical(run.views[str(tier)]):
        said.append(
            "on the units that the client itself kept in its last training; what it trained there "
            "went into the server's mean and is gone"
            if client in run.trained
            else "on the units that the client itself kept in the run that this one started from"
        )
    if own:
        said.append("with what the client keeps for itself")
    if run.checkpoint is None:
        said.append("for nothing is known of the client without a checkpoint")
    elif client not in run.trained:
        said.append("for the client has not trained")
    return ", ".join(said)


def _writable(folder: Path) -> Path | None:
    return folder if os.access(folder, os.W_OK) else None


def _load(run: TrainedRun, target: Target, map: IndexMap, resident: Resident, own: Params) -> str:
    """Puts the weights into the network; where its BatchNorm statistics come from, in words."""
    cut = run.net.space.extract(run.params, map)
    params, how = cut | own, run.algorithm.evaluation
    source = statistics_from(resident, cut, own, how)
    if source != "calibrated":
        resident.load(params)
        return _SAID[source]
    how = how if how.calibrate else Evaluation(calibrate=CALIBRATION_BATCHES)
    most = how.calibrate * how.batch
    count = _affordable(run.net.cost(map).macs, _CALIBRATION_ROWS, most)
    x, whose = _calibration_rows(run, target, count)
    resident.load({**params, **resident.fresh})
    evaluation.calibrate(resident, x, how, run.job.work.scale)
    return f"estimated at export on {len(x):,} training rows of {whose}"


def _calibration_rows(run: TrainedRun, target: Target, most: int) -> tuple[np.ndarray, str]:
    if run.no_data is not None:
        raise InputError(
            f"the server holds no BatchNorm statistics for {target}, and the data to estimate them "
            f"on cannot be read: {run.no_data}"
        )
    fleet, seed = run.job.fleet, run.job.work.seed
    if target.kind == "client":
        return _rows(run, _one(target), "train", most)[0], f"client {target.value}"
    ids, whose = run.job.split[0], "the training clients"
    if target.kind == "tier":
        names = [tier.name for tier in fleet.tiers]
        of_tier = ids[fleet.tier_of[ids] == names.index(str(target.value))]
        ids, whose = (of_tier, f"tier {target.value}'s clients") if len(of_tier) else (ids, whose)
    draw = seeds.generator(seed, "export calibration")
    ids = draw.permutation(ids)
    x = _rows(run, ids, "train", most)[0]
    return x[draw.permutation(len(x))], whose  # batches that mix clients


def _one(target: Target) -> np.ndarray:
    return np.array([int(target.value)])


def _affordable(macs: int, least: int, most: int) -> int:
    return min(max(least, int(_WORK / max(1, macs))), most)


def _rows(
    run: TrainedRun, ids: np.ndarray, part: str, most: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """At most so many rows (x, y), the same number of each client or all; of how many clients."""
    federation = run.job.federation
    sizes = federation.sizes(ids, part)
    if sizes.sum() > most:
        sizes = np.minimum(sizes, max(_OF_A_CLIENT, -(-most // len(ids))))
    clients = min(int(np.searchsorted(np.cumsum(sizes), most)) + 1, len(ids))
    block = federation.block(ids[:clients], part)
    # Spread over a client's rows, which may be in order of their labels.
    chosen = [
        np.linspace(first, last, count, endpoint=False).astype(np.int64)
        for first, last, count in zip(block.offsets, block.offsets[1:], sizes, strict=False)
    ]
    rows = np.concatenate(chosen)[:most]
    return block.x[rows], block.y[rows], clients


# --- accuracy ---------------------------------------------------------------------------------


def _measured(run: TrainedRun, target: Target, resident: Resident, map: IndexMap) -> dict[str, Any]:
    if run.no_data is not None:
        return {"measured": None, "why_not": run.no_data}
    if target.kind == "client":
        ids, part, whose = _one(target), "test", "the client's own test rows"
    else:
        ids, part = Roster(run.job).evaluated
        whose = "held-out clients' rows" if part == "all" else "clients' test rows"
    count = _affordable(run.net.cost(map).macs, _TEST_ROWS, _MOST_TEST_ROWS)
    x, y, clients = _rows(run, ids, part, count)
    if not len(y):
        return {"measured": None, "why_not": "there are no test rows"}
    right, loss = evaluation.answers(resident, resident.params, x, y, run.job.work.scale)
    measured = {
        "accuracy": float(right.mean()),
        "loss": float(loss.mean()),
        "rows": len(y),
        "clients": clients,
        "on": whose,
    }
    return {"measured": measured}


def _of_the_run(run: TrainedRun, tier: str) -> dict[str, Any]:
    """What the run measured for the tier, the last time up to the exported round."""
    for record in reversed(list(_records(run))):
        accuracy = (record.get("acc_tier") or {}).get(tier)
        if accuracy is not None and record["round"] <= run.round:
            return {"run": {"accuracy": accuracy, "round": record["round"]}}
    return {"run": None}


def _records(run: TrainedRun) -> Iterator[dict[str, Any]]:
    if run.folder.metrics.is_file():
        yield from read_metrics(run.folder.metrics)


def example_rows(run: TrainedRun, count: int, dtype: torch.dtype) -> Tensor:
    """Rows as they are stored, [count, *input_shape]; zeros where the data cannot be read."""
    shape = run.net.input_shape
    if run.no_data is None:
        x = _rows(run, np.arange(min(count, run.job.fleet.num_clients)), "all", count)[0]
        if len(x) == count:
            return torch.as_tensor(np.array(x)).to(dtype)
    return torch.zeros(count, *shape, dtype=dtype)
