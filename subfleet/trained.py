"""A run's folder read back: its experiment, its data, and the weights it has reached."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subfleet.config import DataTable, Experiment
from subfleet.core.algorithm import Algorithm
from subfleet.core.errors import InputError
from subfleet.core.program import Params
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.datasets import READERS
from subfleet.datasets.federation import identity
from subfleet.launch import assemble
from subfleet.platform.job import Job
from subfleet.platform.reached import newest
from subfleet.platform.runfolder import RunFolder


@dataclass(frozen=True)
class Remembered:
    """What is known of a run's data set without its files, as a data set without rows.

    `dtype` (of its rows) and `scaling` are None where only the files would tell.
    """

    label: str
    clients: int
    num_classes: int
    input_shape: tuple[int, ...]
    dtype: str | None = None
    scaling: tuple[float, float] | None = None
    vocabulary: int = 0

    @property
    def name(self) -> str:
        """What the run calls its data."""
        return self.label

    @property
    def num_clients(self) -> int:
        """Clients, none of which has rows here."""
        return self.clients

    @property
    def scale(self) -> Scaling:
        """As stored where it is not known."""
        return Scaling(*(self.scaling or ()))


@dataclass(frozen=True)
class TrainedRun:
    """A run with weights, finished or not.

    `job.federation` is a `Remembered` where the data cannot be read, and `no_data` says
    why. `params` is the super-network after `round` rounds, `views` the sub-networks of
    it ("global" and one for each tier). `checkpoint` is the folder of a checkpoint of the
    same round, if there is one: only then is known which clients have `trained`, and what
    they last reported.
    """

    folder: RunFolder
    experiment: Experiment
    job: Job
    params: Params
    views: dict[str, IndexMap]
    round: int
    checkpoint: Path | None
    trained: frozenset[int] = frozenset()
    reports: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    no_data: str | None = None
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # environment.json

    @classmethod
    def open(cls, path: str | os.PathLike) -> TrainedRun:
        """Read a run folder; the newest weights in it count.

        Raises `InputError` when there is no run, or none with weights, or when its model
        or algorithm cannot be built again.
        """
        folder = RunFolder.find(Path(path))
        facts = folder.read_environment()
        experiment = Experiment.load(folder.config)
        reached = newest(folder)
        job, no_data = _assembled(experiment, facts)
        algorithm = job.work.algorithm
        # Without a checkpoint only what the algorithm makes public is left of its state.
        params = algorithm.model(reached.state) if reached.checkpoint else folder.read_final()
        _refuse_misfit(job.work.net, params, no_data)
        return cls(
            folder=folder,
            experiment=experiment,
            job=job,
            params=params,
            views=algorithm.views(reached.state),
            round=reached.round,
            checkpoint=reached.checkpoint,
            trained=frozenset(np.asarray(reached.roster.get("clients", ())).tolist()),
            reports=reached.roster.get("reports", {}),
            no_data=no_data,
            warnings=reached.warnings,
            facts=facts,
        )

    @property
    def net(self) -> SuperNetwork:
        """The super-network."""
        return self.job.work.net

    @property
    def algorithm(self) -> Algorithm:
        """What trained it."""
        return self.job.work.algorithm


def _refuse_misfit(net: SuperNetwork, params: Params, no_data: str | None) -> None:
    """`InputError` unless the weights are those of the network that the config builds."""
    cause = f" (its data cannot be read: {no_data})" if no_data else ""
    for name in sorted(net.parameters):
        wanted = tuple(net.space.shapes[name])
        there = tuple(params[name].shape) if name in params else "absent"
        if there != wanted:
            raise InputError(
                f"model {net.name!r} as the run's config builds it here has {name!r} of shape "
                f"{wanted}, the run's weights have it {there}{cause}; give the code and the data "
                "that the run was trained with"
            )


# --- data -------------------------------------------------------------------------------------


def _assembled(experiment: Experiment, facts: dict[str, Any]) -> tuple[Job, str | None]:
    """The run's parts, and why its data cannot be read, if so."""
    there = facts.get("data") or {}
    # It has weights of its own: the run that it started from may be gone.
    experiment = experiment.with_values({"run.start_from": None})
    try:
        job = assemble(experiment)
        here = identity(job.federation)
        if different := [key for key in here if there.get(key) != here[key]]:
            raise InputError(f"they changed since the run began: {', '.join(different)}")
        return job, None
    except (InputError, OSError) as error:
        if not there:
            raise
        reason = str(error)
    # Without its data a run can be built from what it wrote down of them.
    tables = experiment.to_tables() | {"data": _table(experiment.data, there)}
    return assemble(Experiment(**tables)), reason


def _table(data: DataTable, there: dict[str, Any]) -> dict[str, Any]:
    known = {
        "name": f"{__name__}:{Remembered.__name__}",
        "label": there["name"],
        "clients": there["clients"],
        "num_classes": there["classes"],
        "input_shape": there["input_shape"],
    }
    return known | _layout(data)


def _layout(data: DataTable) -> dict[str, Any]:
    """How a built-in data set stores its rows; empty where that stands in its files."""
    reader = READERS.get(data.name)
    if reader is None:
        return {}
    own = {item.name for item in dataclasses.fields(reader)}  # pyright: ignore[reportArgumentType]
    options = {key: value for key, value in data.options.items() if key in own}
    try:
        layout = reader(**options).layout(Path(data.source or ""))
    except (InputError, OSError):
        return {}
    rows = {"dtype": layout.dtype, "vocabulary": layout.vocabulary}
    return rows | {"scaling": list(layout.scale)}


def stored_dtype(job: Job) -> torch.dtype | None:
    """What the rows of a run's data set are stored as; None where it is not known."""
    federation = job.federation
    if isinstance(federation, Remembered):
        return None if federation.dtype is None else getattr(torch, federation.dtype)
    rows = federation.block(np.zeros(1, np.int64), "all").x
    return torch.as_tensor(rows[:1]).dtype
