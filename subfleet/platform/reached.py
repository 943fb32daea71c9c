"""What a run has reached: the newest weights in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subfleet.core.algorithm import State
from subfleet.core.errors import InputError
from subfleet.platform import checkpoint
from subfleet.platform.files import last_checkpoint
from subfleet.platform.runfolder import RunFolder


@dataclass(frozen=True)
class Reached:
    """The newest weights of a run folder, and what is known beside them.

    `state` and `roster` are those of the folder `checkpoint`; without a whole checkpoint
    of that round they are empty. `final` says whether `final.safetensors` is of that
    round too: it always is where there is no checkpoint.
    """

    round: int
    state: State
    roster: dict[str, Any]
    checkpoint: Path | None
    final: bool
    warnings: tuple[str, ...]


def newest(folder: RunFolder) -> Reached:
    """The last whole checkpoint, or what was written at the end; `InputError` for neither."""
    summary = folder.read_summary() or {}
    last = int(summary.get("rounds", 0)) if folder.final.is_file() else 0
    warnings: tuple[str, ...] = ()
    try:
        found = checkpoint.load_latest(folder.checkpoints, fingerprint=_owner(folder))
    except InputError as error:
        if not last:
            raise
        found, warnings = None, (str(error),)
    if found is not None and found.round >= last:
        state, roster = found.state["state"], found.state["roster"]
        return Reached(found.round, state, roster, found.path, found.round == last, found.warnings)
    if last:
        warnings += found.warnings if found is not None else ()
        return Reached(last, {}, {}, None, True, warnings)
    raise InputError(
        f"{folder.path}: has no weights yet, neither a checkpoint nor final.safetensors; let the "
        f"run go on: subfleet run {folder.config} --out {folder.path} --resume"
    )


def _owner(folder: RunFolder) -> str:
    """The fingerprint in the newest manifest: of the experiment and its data, which may be gone."""
    found = last_checkpoint(folder.metrics)
    if found is None:
        return ""
    try:
        return str(json.loads((found / "manifest.json").read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # damaged, as loading it will tell
