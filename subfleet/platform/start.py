"""Where a run begins: with the weights and the reports of a former run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subfleet.core.errors import InputError
from subfleet.core.program import Params
from subfleet.core.supernet import SuperNetwork
from subfleet.platform import checkpoint
from subfleet.platform.metrics import params_sha256
from subfleet.platform.reached import Reached, newest
from subfleet.platform.runfolder import RunFolder, flat

KEY = "run.start_from"


@dataclass(frozen=True)
class Start:
    """What a run takes over of a former run, in place of freshly drawn parameters.

    `params` has every tensor of the super-network, float32; `reports` what clients last
    reported, by client id. `run` is the former run's folder as the experiment names it,
    `round` how far that run had come. `params_sha256` is the digest of its weights, the
    one in its summary if it is finished.
    """

    params: Params
    reports: dict[int, dict[str, Any]]
    run: str
    round: int
    params_sha256: str
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What tells this start from others, as plain JSON; a resume compares it."""
        return {
            "run": self.run,
            "round": self.round,
            "params_sha256": self.params_sha256,
            "reports_sha256": checkpoint.digest(dict(sorted(self.reports.items()))),
        }

    @classmethod
    def read(
        cls, run: str, net: SuperNetwork, config: Mapping[str, Any], data: Mapping[str, Any]
    ) -> Start:
        """Read the folder `run` for an experiment with these tables on these data.

        The newest weights count. Running statistics that the former run left to its
        clients are fresh ones. `data` is the data's `identity`: reports are taken over
        only where client ids stand for the same clients there and here.

        Raises `InputError` when there is no run, or none with weights, or when they are
        not those of `net`.
        """
        try:
            folder = RunFolder.find(Path(run).expanduser())
            reached = newest(folder)
            there = _weights(folder, reached)
        except InputError as error:
            raise InputError(f"{KEY} = {run!r}: {error}") from None
        reports, notes = _reports(folder, reached, config, data)
        return cls(
            params=_completed(run, there, net, int(config["run"]["seed"])),
            reports=reports,
            run=run,
            round=reached.round,
            params_sha256=params_sha256(there),
            warnings=tuple(f"{KEY} = {run!r}: {text}" for text in (*reached.warnings, *notes)),
        )


def _weights(folder: RunFolder, reached: Reached) -> Params:
    """What the run publishes, and where it is not finished its state's parameters."""
    if reached.final:
        return folder.read_final()
    if "params" not in reached.state:
        raise InputError(
            f"{folder.path}: its algorithm keeps no 'params' in its state; let the run finish, "
            "for final.safetensors"
        )
    return reached.state["params"]


def _completed(run: str, there: Params, net: SuperNetwork, seed: int) -> Params:
    """The weights with whatever statistics they lack; InputError unless they are the network's."""
    fresh = net.init(seed)
    for name in sorted(fresh.keys() | there.keys()):
        if name not in there and name in net.statistics:
            continue
        shapes = [tuple(p[name].shape) if name in p else None for p in (there, fresh)]
        if shapes[0] != shapes[1]:
            old, new = (shape or "absent" for shape in shapes)
            raise InputError(
                f"{KEY} = {run!r}: tensor {name!r} is {old} there and {new} in model "
                f"{net.name!r} here; set [model] as {run}/config.toml has it, on data with as "
                "many classes, or start from a run of this model"
            )
    return {
        name: there[name].to(value.dtype) if name in there else value
        for name, value in fresh.items()
    }


def _reports(
    folder: RunFolder, reached: Reached, config: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], tuple[str, ...]]:
    """What clients last reported, and why it is left behind, if so."""
    if reached.checkpoint is None:
        lost = "no whole checkpoint of its last round is left"
        return {}, (f"what its clients last reported is not known, for {lost}",)
    reports = reached.roster["reports"]
    if not reports:
        return {}, ()
    former = tomllib.loads(folder.config.read_text())
    then = _clients(former, folder.read_environment().get("data") or {})
    here = _clients(config, data)
    if differing := sorted(k for k in then | here if then.get(k) != here.get(k)):
        more = ", …" if len(differing) > 3 else ""
        return {}, (
            "what its clients last reported is not taken over, for its clients are others than "
            f"the ones here: {', '.join(differing[:3])}{more} differ",
        )
    return reports, ()


def _clients(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key all that says whose data a client id has, and what its device affords.

    How fast the device is says nothing of either.
    """
    # Options tell the samples only of data that cannot do so themselves: a folder may move.
    options = {} if "fingerprint" in data else config.get("data", {})
    seed = config.get("run", {}).get("seed")
    fleet = config.get("fleet", {})
    tiers = [{k: v for k, v in tier.items() if k != "device"} for tier in fleet.get("tiers", [])]
    return flat({"data": {**options, **data}, "fleet": {"tiers": tiers}, "run": {"seed": seed}})
