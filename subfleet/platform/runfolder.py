"""The folder of one run: what lies where, whose it is, and what it was made on."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes

from subfleet.core.errors import InputError
from subfleet.platform import locks
from subfleet.platform.files import json_bytes, write_atomic
from subfleet.platform.record import EngineRecord
from subfleet.platform.sameness import NOT_OF_THE_RESULT, WHEN_TO_STOP

_PACKAGES = (
    "subfleet",
    "numpy",
    "torch",
    "torchvision",
    "ray",
    "pyarrow",
    "safetensors",
    "tensorboard",
    "pydantic",
    "matplotlib",
)


def environment() -> dict[str, Any]:
    """What the run was made on: versions, processor, memory (bytes), GPU, time; no host name."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "system": sys.platform,
        "packages": versions,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _usable_cores() -> int | None:
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


@dataclass(frozen=True)
class RunFolder:
    """A run folder that exists and belongs to the experiment with this fingerprint.

    Made by `create` (a new run) or `open` (a resume), which make `path` absolute:
    the run may go on in another process, with another current folder. All writing
    is atomic, and a full disk raises `RunFailed`.
    """

    path: Path
    fingerprint: str
    made: bool = field(default=False, compare=False)  # by `create`, rather than found empty
    warnings: tuple[str, ...] = field(default=(), compare=False)  # for who watches the run

    @property
    def config(self) -> Path:
        """The experiment as resolved, TOML."""
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        """Versions and hardware, and the fingerprint of the experiment, JSON."""
        return self.path / "environment.json"

    @property
    def engine(self) -> Path:
        """The engine record, JSON."""
        return self.path / "engine.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a round."""
        return self.path / "metrics.jsonl"

    @property
    def clients(self) -> Path:
        """Folder of Parquet parts, a row per client and round."""
        return self.path / "clients"

    @property
    def traces(self) -> Path:
        """Folder of Parquet files, one a round in which clients returned traces."""
        return self.path / "traces"

    @property
    def summary(self) -> Path:
        """The run in one JSON object."""
        return self.path / "summary.json"

    @property
    def tiers(self) -> Path:
        """Name, clients, parameters and MFLOPs of each tier, JSON."""
        return self.path / "tiers.json"

    @property
    def network(self) -> Path:
        """The super-network's unit groups and their sizes, JSON; `units` counts in its order."""
        return self.path / "network.json"

    @property
    def labels(self) -> Path:
        """Training rows by class of some clients, Parquet: `client`, `tier`, `counts`."""
        return self.path / "labels.parquet"

    @property
    def final(self) -> Path:
        """The super-network after the last round, safetensors."""
        return self.path / "final.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, `round-000050` and so on."""
        return self.path / "checkpoints"

    @property
    def kept(self) -> Path:
        """Folder of the clients' own states while the run goes on."""
        return self.path / "kept"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tb"

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        config_toml: str,
        fingerprint: str,
        data: Mapping[str, Any] | None = None,
        start: Mapping[str, Any] | None = None,
        traces: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Start a run in a folder that is absent or empty.

        `data` says what the run trains on (see `datasets.federation.identity`), `start`
        which former run it begins with (see `start.Start.facts`), `traces` by which traces
        its devices are (see `devices.Devices.facts`); a resume compares them. Raises
        `InputError` for a folder that holds another run or foreign files, or that cannot be
        written.
        """
        where = Path(path).absolute()
        _refuse_used(Path(path))
        folder = cls(where, fingerprint, made=not where.exists())
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._write_start(config_toml, data, start, traces)
        except OSError as error:
            raise InputError(
                f"--out {path}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        except BaseException:
            folder.discard()
            raise
        return folder

    def _write_start(
        self,
        config_toml: str,
        data: Mapping[str, Any] | None,
        start: Mapping[str, Any] | None,
        traces: Mapping[str, Any] | None,
    ) -> None:
        # config.toml last: it is what marks a folder as a run.
        given = {"data": data, "start": start, "traces": traces}
        facts = {"fingerprint": self.fingerprint, **given, **environment()}
        write_atomic(self.environment, json_bytes(facts, indent=2))
        self.checkpoints.mkdir()
        self.clients.mkdir()
        write_atomic(self.config, config_toml.encode())

    @property
    def begun(self) -> bool:
        """Whether a round was finished: there is a line of metrics, or a checkpoint."""
        lines = self.metrics.exists() and self.metrics.stat().st_size > 0
        return lines or any(self.checkpoints.glob("round-*"))

    def discard(self) -> None:
        """Remove what a run wrote, and the folder itself if `create` made it.

        Files of other names stay, and with them the folder.
        """
        # config.toml first: what is left by a kill in between is no run.
        files = (self.config, self.environment, self.engine, self.metrics, self.tiers)
        for file in (*files, self.network, self.labels, self.summary, self.final):
            file.unlink(missing_ok=True)
        made = (self.checkpoints, self.clients, self.traces, self.kept, self.tensorboard)
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        if self.made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        fingerprint: str,
        config_toml: str | None = None,
        data: Mapping[str, Any] | None = None,
        start: Mapping[str, Any] | None = None,
        traces: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Take up a run again.

        Raises `InputError` when there is no run, or when it is of another
        experiment; with `config_toml` the message names the first keys that differ.
        With `data` also when it was trained on other data, with `start` when it began with
        other weights or reports, with `traces` when a trace holds other devices by now.
        """
        folder = cls(Path(path).absolute(), fingerprint)
        if not folder.config.is_file():
            raise InputError(
                f"--out {path}: holds no run (no config.toml); "
                "leave out --resume to start one, or give the --out of the run"
            )
        facts = folder.read_environment()
        there = facts.get("fingerprint")
        if there != fingerprint:
            different = _differences(folder.config.read_text(), config_toml)
            raise InputError(
                f"--out {path}: holds a run of another experiment{different} (fingerprint "
                f"{str(there)[:12]}, this one {fingerprint[:12]}); "
                "give the same experiment, or another --out"
            )
        if data is not None:
            _refuse_other(path, "on other data", "data", facts.get("data") or {}, data)
        if start is not None:
            began = facts.get("start") or {}
            _refuse_other(path, "from another start", "former run", began, start)
        if traces is not None:
            known = facts.get("traces") or {}
            _refuse_other(path, "with another trace of devices", "trace", known, traces)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.clients.mkdir(exist_ok=True)
        return folder

    @classmethod
    def find(cls, path: Path) -> RunFolder:
        """The folder of a run that is there, of whatever experiment, to read from.

        Raises `InputError` when there is none.
        """
        folder = cls(path.absolute(), "")
        if not folder.config.is_file():
            problem = "holds no run (no config.toml)" if path.is_dir() else "is no folder of a run"
            raise InputError(f"{path}: {problem}; give the folder that `subfleet run` printed last")
        return replace(folder, fingerprint=str(folder.read_environment().get("fingerprint")))

    def read_environment(self) -> dict[str, Any]:
        """`environment.json` as a dict; `InputError` when it cannot be read."""
        try:
            return json.loads(self.environment.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.environment}: cannot be read ({error}); the run cannot be checked "
                "against the experiment: start again with another --out"
            ) from error

    def environment_changes(self) -> list[str]:
        """Where this process differs from what the run was started on.

        The same bits are promised for one device model and one set of versions only.
        """
        then, now = self.read_environment(), environment()
        pairs = [(key, then.get(key), now[key]) for key in ("python", "cpu", "gpu")]
        old = then.get("packages", {})
        pairs += [(name, old.get(name), new) for name, new in now["packages"].items()]
        return [
            f"{name}: {before} then, {after} now"
            for name, before, after in pairs
            if before != after
        ]

    def write_record(self, record: EngineRecord) -> None:
        """Replace `engine.json`."""
        write_atomic(self.engine, json_bytes(record.to_json(), indent=2))

    def read_engine(self) -> Any | None:
        """The engine record, or None before it was written."""
        return json.loads(self.engine.read_text()) if self.engine.exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`."""
        write_atomic(self.summary, json_bytes(summary, indent=2))

    def write_tiers(self, rows: Any) -> None:
        """Replace `tiers.json`."""
        write_atomic(self.tiers, json_bytes(rows, indent=2))

    def write_network(self, groups: Mapping[str, int]) -> None:
        """Replace `network.json`."""
        write_atomic(self.network, json_bytes({"groups": dict(groups)}, indent=2))

    def write_labels(self, table: pa.Table) -> None:
        """Replace `labels.parquet`."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        write_atomic(self.labels, buffer.getvalue().to_pybytes())

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None before it was written."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def write_final(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `final.safetensors`; tensors of any device and layout."""
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomic(self.final, tensors_to_bytes(whole))

    def read_final(self) -> dict[str, torch.Tensor]:
        """The tensors of `final.safetensors`; `InputError` when it is damaged."""
        try:
            return load_file(self.final)
        except SafetensorError as error:
            raise InputError(
                f"{self.final}: is damaged ({error}); remove it, and the newest checkpoint counts"
            ) from error

    def lock(self) -> int:
        """Keep a second process from writing here; held until the returned handle is closed.

        Raises `InputError` when another process holds it.
        """
        return locks.take(self.path)

    @property
    def busy(self) -> bool:
        """Whether a process runs in it: one of this machine, others' locks are not seen here."""
        return locks.taken(self.path)

    def write_config(self, tables: Mapping[str, Any]) -> None:
        """Replace `config.toml` where a resume changes it: how long it goes on, say."""
        if tomllib.loads(self.config.read_text()) != tables:
            write_atomic(self.config, tomli_w.dumps(tables).encode())


def _refuse_used(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"--out {path}: is a file; give a folder that is absent or empty")
    names = sorted(item.name for item in path.iterdir())
    if not names:
        return
    if "config.toml" in names:
        raise InputError(
            f"--out {path}: holds another run; --resume to go on with it, or another --out"
        )
    more = ", …" if len(names) > 1 else ""
    raise InputError(
        f"--out {path}: holds other files ({names[0]}{more}); give a folder that is absent or empty"
    )


def _refuse_other(
    path: str | os.PathLike,
    how: str,
    what: str,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
) -> None:
    keys = [key for key in here if there.get(key) != here[key]]
    if not keys:
        return
    shown = [
        f"{key} {_short(there.get(key, 'unknown'))} there, {_short(here[key])} here" for key in keys
    ]
    raise InputError(
        f"--out {path}: holds a run {how} ({'; '.join(shown)}): the {what} changed "
        f"since it began; give the same {what}, or another --out"
    )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 32 else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted keys.

    >>> flat({"run": {"seed": 1}, "a": 2})
    {'run.seed': 1, 'a': 2}
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _differences(there: str, here: str | None, most: int = 3) -> str:
    """` (train.lr = 0.1 there, 0.2 here, …)`, or nothing when it cannot be told."""
    if here is None:
        return ""
    try:
        old, new = flat(tomllib.loads(there)), flat(tomllib.loads(here))
    except tomllib.TOMLDecodeError:
        return ""
    allowed = NOT_OF_THE_RESULT | WHEN_TO_STOP
    keys = [key for key in sorted((old | new).keys() - allowed) if old.get(key) != new.get(key)]
    if not keys:
        return ""
    shown = [
        f"{k} = {old.get(k, 'absent')} there, {new.get(k, 'absent')} here" for k in keys[:most]
    ]
    return f" ({'; '.join(shown)}{', …' if len(keys) > most else ''})"
