"""Traced steps compiled by Inductor, and kept on disk for other processes of this machine.

Compiling takes seconds to a minute and needs a C++ compiler; loading takes two seconds.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from subfleet.core.errors import RunFailed
from subfleet.core.folders import cache_folder
from subfleet.platform.traces import Flat

_torch: Any = torch


def compiled(flat: Flat, leaves: Sequence[Any]) -> Flat:
    """The same function compiled, for leaves of exactly these shapes and strides.

    Raises `RunFailed` where it cannot be compiled, for want of a compiler, say.
    """
    inductor = _torch._inductor
    file = cache_folder() / "compiled" / f"{_fingerprint(flat, leaves)}.bin"
    if file.exists():
        with suppress(Exception):  # what another version of torch wrote, or half of it
            return flat._replace(
                run=inductor.CompiledArtifact.load(path=str(file), format="binary")
            )
    # On copies: compiling may run what it compiles.
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    try:
        artifact = inductor.standalone_compile(
            flat.module, copies, dynamic_shapes="from_example_inputs"
        )
    except Exception as error:  # of a compiler that is missing, or one of its defects
        raise RunFailed(
            f"a step cannot be compiled here ({type(error).__name__}: {str(error)[:200]}); "
            "leave run.compile out, or install a C++ compiler"
        ) from error
    with suppress(OSError, RuntimeError):  # a cache that cannot be written is none
        _save(artifact, file)
    return flat._replace(run=artifact)


def _save(artifact: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, suffix=".bin", delete=False) as made:
        artifact.save(path=made.name, format="binary")
    os.replace(made.name, file)


def _fingerprint(flat: Flat, leaves: Sequence[Any]) -> str:
    """What compiled code depends on: the kernels, their tensors, the machine, torch."""
    tensors = [
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type)
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cpu = torch.backends.cpu.get_cpu_capability()
    told = [flat.module.code, tensors, torch.__version__, platform.machine(), cpu, device]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]
