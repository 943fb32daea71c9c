"""Checkpoints: a nested state in one folder, whole or absent, without pickle.

checkpoints/round-000050/state.json            structure and scalars
                         tensors.safetensors   torch leaves
                         arrays.safetensors    NumPy leaves
                         …                     files of the caller (kept states)
                         manifest.json         round, fingerprint, size and SHA-256 of each
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from subfleet.core.errors import InputError
from subfleet.platform.files import disk_guard, json_bytes, sync_folder, sync_tree

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_latest` found; `path` holds the caller's own files too."""

    round: int
    state: Any
    path: Path
    warnings: tuple[str, ...] = ()


class Damaged(Exception):
    """A checkpoint that does not hold what its manifest says."""


class _Flattener:
    """Takes the leaves out of a nested state and leaves a JSON value that refers to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, torch.Tensor):
            # A clone: safetensors refuses views that share their memory.
            key = str(len(self.tensors))
            self.tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"$tensor": key}
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf":
                raise InputError(
                    f"state{where}: arrays of {value.dtype} cannot be saved; use numbers"
                )
            key = str(len(self.arrays))
            little = value.astype(value.dtype.newbyteorder("<"), copy=False)
            # ascontiguousarray alone would make a 0-d array 1-d.
            self.arrays[key] = np.ascontiguousarray(little).reshape(value.shape)
            return {"$array": key}
        return self._encode_nested(value, where)

    def _encode_nested(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(item, f"{where}.{key}") for key, item in value.items()}
            pairs = [
                [self.encode(key, where), self.encode(item, f"{where}[{key!r}]")]
                for key, item in value.items()
            ]
            return {"$map": pairs}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise InputError(
            f"state{where}: a {type(value).__name__} cannot be saved; "
            "use tensors, arrays, numbers, strings, bytes, None, dicts, lists or tuples"
        )


def _decode(value: Any, tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> Any:
    def decode(item: Any) -> Any:
        return _decode(item, tensors, arrays)

    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind: str = next(iter(value), "")
    content: Any = value.get(kind)
    match kind:
        case "$tensor":
            return tensors[content]
        case "$array":
            return arrays[content]
        case "$float":
            return float(content)
        case "$bytes":
            return base64.b64decode(content)
        case "$tuple":
            return tuple(decode(item) for item in content)
        case "$map":
            return {decode(key): decode(item) for key, item in content}
    return {key: decode(item) for key, item in value.items()}


def save(
    folder: str | os.PathLike,
    round: int,
    state: Any,
    *,
    fingerprint: str,
    keep: int = 3,
    attach: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of `round` into `folder` and drop all but the last `keep`.

    `state` nests dicts, lists and tuples of tensors, arrays, numbers, strings,
    bytes and None; named tuples come back as tuples. `attach(path)` may add files
    of its own to the new folder. Checkpoints of later rounds belong to a future
    that a resume has left behind and are dropped. Raises `InputError` for a value
    that cannot be saved and `RunFailed` on a full disk, both with the older
    checkpoints untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(folder)
    files = _files(state)
    final = folder / f"round-{round:06d}"
    temporary = folder / f".tmp-{final.name}"
    with disk_guard(final, sum(map(len, files.values()))):
        try:
            temporary.mkdir()
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            if attach is not None:
                attach(temporary)
            manifest = {
                "round": round,
                "fingerprint": fingerprint,
                "files": _sums(temporary, _names(folder)[-1:]),
            }
            (temporary / _MANIFEST).write_bytes(json_bytes(manifest, indent=2))
            sync_tree(temporary)
            if final.exists():
                final.rename(folder / f".tmp-old-{final.name}")
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_folder(folder)
    _drop_others(folder, round, keep)
    return final


def digest(state: Any) -> str:
    """SHA-256 of a nested state, the order of its keys included.

    Takes what `save` takes, and raises `InputError` as it does.

    >>> digest({"a": np.arange(2)}) == digest({"a": np.arange(2)})
    True
    >>> digest({"a": np.arange(2)}) == digest({"a": np.arange(3)})
    False
    """
    sums = [hashlib.sha256(data).hexdigest() for data in _files(state).values()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _files(state: Any) -> dict[str, bytes]:
    leaves = _Flattener()
    files = {"state.json": json.dumps(leaves.encode(state, ""), allow_nan=False).encode()}
    files["tensors.safetensors"] = safetensors.torch.save(leaves.tensors)
    files["arrays.safetensors"] = safetensors.numpy.save(leaves.arrays)
    return files


def _names(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*") if path.is_dir())


def number(path: Path) -> int:
    """The round of a checkpoint's folder; -1 when that is not what it is called after."""
    digits = path.name.removeprefix("round-")
    return int(digits) if digits.isdigit() else -1


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sums(folder: Path, earlier: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sum of each file; a hard link into the checkpoint before is not read again."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        stat = path.stat()
        known = _known_sum(earlier, name, path) if stat.st_nlink > 1 else None
        sums[name] = {"bytes": stat.st_size, "sha256": known or _sha256(path)}
    return sums


def _known_sum(earlier: list[Path], name: str, path: Path) -> str | None:
    for before in earlier:
        try:
            entry = json.loads((before / _MANIFEST).read_text())["files"][name]
            if (before / name).samefile(path) and entry["bytes"] == path.stat().st_size:
                return entry["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _drop_others(folder: Path, round: int, keep: int) -> None:
    """Keep the last `keep` up to `round`; a kill in the middle never leaves half of one."""
    names = _names(folder)
    past = [path for path in names if number(path) <= round]
    stay = set(past[-max(1, keep) :])
    for path in names:
        if path not in stay:
            path.rename(folder / f".tmp-old-{path.name}")
    _remove_temporaries(folder)


def load_latest(folder: str | os.PathLike, *, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint; None when there is none at all.

    A damaged one is passed over, and its warning returned. Raises
    `InputError` when it is of another experiment, or when all are damaged.
    """
    names = _names(Path(folder)) if Path(folder).is_dir() else []
    warnings: list[str] = []
    for path in reversed(names):
        try:
            round, state = _load(path, fingerprint)
        except Damaged as damage:
            warnings.append(f"checkpoint {path} is damaged ({damage}); trying the one before")
            continue
        return Checkpoint(round, state, path, tuple(warnings))
    if warnings:
        raise InputError(
            f"{folder}: none of {len(names)} checkpoints is whole: {'; '.join(warnings)}; "
            "start again with another --out"
        )
    return None


def _load(path: Path, fingerprint: str) -> tuple[int, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        round, owner, files = manifest["round"], manifest["fingerprint"], manifest["files"]
        for name in ("state.json", "tensors.safetensors", "arrays.safetensors"):
            files[name]
    except FileNotFoundError as error:
        raise Damaged(f"no {_MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{_MANIFEST}: {error!r}") from error
    if owner != fingerprint:
        raise InputError(
            f"checkpoint {path} is of another experiment (fingerprint {str(owner)[:12]}, "
            f"this one {fingerprint[:12]}); give the same experiment, or another --out"
        )
    _verify(path, files)
    try:
        tensors = safetensors.torch.load_file(path / "tensors.safetensors")
        arrays = safetensors.numpy.load_file(path / "arrays.safetensors")
        return round, _decode(json.loads((path / "state.json").read_text()), tensors, arrays)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Damaged(repr(error)) from error


def _verify(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{name}: {size} bytes, {entry['bytes']} expected")
            if _sha256(path / name) != entry["sha256"]:
                raise Damaged(f"{name}: wrong SHA-256")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
