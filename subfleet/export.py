"""`subfleet export`: a run's fitted small network as a folder that needs no subfleet.

model.safetensors   its tensors, constants included
model.pt2           the program, from stored rows to class scores (torch.export)
model.json          the card, for machines
README.md           the card, for people
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from subfleet.core.errors import InputError, RunFailed
from subfleet.core.scaling import Scaling
from subfleet.datasets.meaning import TOKENS
from subfleet.export_card import Input, card, card_bytes, readme
from subfleet.fitted import Fitted, Target, example_rows, fitted
from subfleet.platform.files import disk_guard
from subfleet.trained import TrainedRun, stored_dtype

WEIGHTS, PROGRAM, CARD, README = "model.safetensors", "model.pt2", "model.json", "README.md"
FILES = (WEIGHTS, PROGRAM, CARD, README)
_SCRATCH = ".writing-"  # folders that an export which was ended leaves behind
_TOLERANCE = 1e-5  # of the largest score; equal on one machine, kernels differ between them


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its card, and what the user should know besides."""

    path: Path
    card: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Deployed(nn.Module):
    """A network that takes rows as the data set stores them.

    Pixels and numbers are made float32 and scaled, `x * factor + shift`; tokens stay int64.
    """

    def __init__(self, net: nn.Module, scale: Scaling, *, tokens: bool) -> None:
        super().__init__()
        self.net, self.scale, self.tokens = net, scale, tokens

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes] of rows [B, ...]."""
        return self.net(x if self.tokens else self.scale.apply(x.to(torch.float32)))


def export(
    run: str | os.PathLike,
    *,
    tier: str | None = None,
    client: int | None = None,
    width: float | None = None,
    out: str | os.PathLike | None = None,
    force: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the small network of a run for a tier, a client, or a width.

    Args:
        run: The folder of a run that is finished or has a checkpoint.
        tier: A tier's name: the sub-network that the run gives its devices.
        client: A client's number: its own network, as far as the run knows it: the units that
            it kept, the tensors that it keeps for itself; else its tier's sub-network.
        width: In (0, 1]: the first units of each layer, so large a share of them.
        out: The folder to write; by default `export/<tier, client or width>` in the run's.
        force: Replace the files of an earlier export; other files are never touched.
        step: Hears, before each long part of the work, what it is.

    Raises:
        InputError: No such run, tier or client; no weights yet; or `out` is not empty, or
            holds files that are no export.
        RunFailed: The program that was written does not compute what the network does.
    """
    target = Target.of(tier, client, width)
    where = _checked_out(run, target, out, force)
    opened = TrainedRun.open(run)
    step("cutting out the network")
    small = fitted(opened, target)
    takes = _input(opened)
    temporary = _beside(where)
    try:
        step("writing the program")
        check = _write_program(temporary / PROGRAM, opened, small, takes)
        tensors = _tensors(small.module)
        weights = save(tensors, metadata={"format": "pt"})
        with disk_guard(where, len(weights)):
            (temporary / WEIGHTS).write_bytes(weights)
        step("measuring the network")
        said = card(opened, target, small, takes, tensors, check)
        said["files"] = {name: (temporary / name).stat().st_size for name in (WEIGHTS, PROGRAM)}
        (temporary / CARD).write_bytes(card_bytes(said))
        (temporary / README).write_text(readme(said), encoding="utf-8")
        _publish(temporary, where)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not any(where.iterdir()):
            where.rmdir()
    return Exported(where, said, _warnings(opened, takes))


def _warnings(run: TrainedRun, takes: Input) -> tuple[str, ...]:
    told = list(run.warnings)
    if run.no_data is not None:
        told.append(f"the run's data cannot be read, so that nothing is measured: {run.no_data}")
    if takes.scale is None:
        told.append("how its rows are scaled is not known: the program takes scaled float32 rows")
    if run.algorithm.evaluation.prepare is not None:
        told.append("clients adapt this network before they use it; it is written as it is before")
    return tuple(told)


# --- where to -----------------------------------------------------------------------------------


def _checked_out(
    run: str | os.PathLike, target: Target, out: str | os.PathLike | None, force: bool
) -> Path:
    label = str(target.value) if target.kind == "tier" else f"{target.kind}-{target.value}"
    default = Path(run) / "export" / (re.sub(r"[^\w.-]+", "-", label).strip(".") or "tier")
    where = (Path(out) if out is not None else default).absolute()
    if where.exists() and not where.is_dir():
        raise InputError(f"--out {where}: is a file; give a folder that is absent or empty")
    if where.is_dir() and any(where.iterdir()):
        _check_replaceable(where, force)
    return where


def _check_replaceable(where: Path, force: bool) -> None:
    """Raise `InputError` unless an earlier export, and nothing else, is to be replaced."""
    others = sorted({path.name for path in where.iterdir()} - {*FILES})
    others = [name for name in others if not name.startswith(_SCRATCH)]
    if others or not _is_card(where / CARD):
        what = f"holds files that are no export ({', '.join(others[:3]) or README})"
        raise InputError(f"{where}: {what}; give another --out")
    if not force:
        raise InputError(
            f"{where}: is not empty; --force replaces an earlier export there, --out DIR writes "
            "elsewhere"
        )


def _is_card(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "format" in content


def _beside(where: Path) -> Path:
    """A scratch folder on the same disk, so that files appear whole."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix=_SCRATCH, dir=where))
    except OSError as error:
        raise InputError(
            f"--out {where}: cannot be written ({error.strerror}); choose another --out"
        ) from error


def _publish(temporary: Path, where: Path) -> None:
    # The cards last: who finds them finds the files that they speak of.
    for name in FILES:
        os.replace(temporary / name, where / name)


# --- the files ----------------------------------------------------------------------------------


def _input(run: TrainedRun) -> Input:
    """What the program takes: rows as they are stored, but tokens as int64, numbers as float32."""
    shape, stored = run.net.input_shape, stored_dtype(run.job)
    if stored is None and run.net.input_dtype.is_floating_point:
        return Input(shape, torch.float32, None)
    if stored is not None and (stored == torch.uint8 or stored.is_floating_point):
        dtype = torch.uint8 if stored == torch.uint8 else torch.float32
        return Input(shape, dtype, run.job.work.scale)
    vocabulary = getattr(run.job.federation, "vocabulary", 0)
    numbering = TOKENS.get(run.experiment.data.name, "")
    return Input(
        shape, torch.int64, Scaling(), tokens=True, vocabulary=vocabulary, numbering=numbering
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name: parameters, statistics, and constants beside them."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach().clone().contiguous() for name, tensor in named}


def _write_program(path: Path, run: TrainedRun, small: Fitted, takes: Input) -> dict[str, Any]:
    """Writes the program and reads it back; what a comparison with the network gave."""
    network = Deployed(small.module, takes.scale or Scaling(), tokens=takes.tokens).eval()
    rows = example_rows(run, 5, takes.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of how it traces
        program, batch = exported_program(network, takes)
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    sizes = (1, 2, 5) if batch is None else (batch,)
    worst = 0.0
    with torch.no_grad():
        for size in sizes:
            wanted, got = network(rows[:size]), loaded(rows[:size])
            difference = float((wanted - got).abs().max())
            if not torch.allclose(wanted, got, _TOLERANCE, _TOLERANCE, equal_nan=True):
                raise RunFailed(
                    f"the exported program's scores differ by {difference:g} from the network's on "
                    f"{size} rows; the model's code may depend on more than its input"
                )
            worst = max(worst, difference)
    return {"batch": batch or "any", "largest_difference": worst, "compared_batches": list(sizes)}


def exported_program(network: nn.Module, takes: Input) -> tuple[ExportedProgram, int | None]:
    """The program, and its batch size; None where it takes a batch of any size."""
    # The program keeps its sample inputs: they must be nobody's data.
    sample = torch.zeros(2, *takes.shape, dtype=takes.dtype)
    program, batch = torch.export.export(network, (sample,), dynamic_shapes=({0: Dim.AUTO},)), None
    if not program.range_constraints:
        program, batch = torch.export.export(network, (sample[:1],)), 1
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program, batch
