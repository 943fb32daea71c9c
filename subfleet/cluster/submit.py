"""An experiment as a job of a Ray cluster: its code and file are packed and sent along.

Nothing of ours needs to be installed there: Ray unpacks this package, and the user's own
modules, on every node that works for the job.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import subfleet
from subfleet.cluster.jobs import JobServer
from subfleet.core.errors import InputError

PACKAGE = Path(subfleet.__file__).parent
FILE = "experiment.toml"
RESTARTS = 3
STOP_WAIT_S = 30  # Ray's three seconds are too few to save a round in
_PATHS = re.compile(r"data\.(source|glove)|run\.start_from|fleet\..*device\.trace")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Submission:
    """What becomes a job: an experiment, where its run folder goes, how often it may begin anew.

    `experiment` is its TOML. `out` is an absolute path on the cluster, on storage that every
    node sees if the loss of the head is to be survived; None is a folder in the home of whoever
    runs the head.
    `more` are files and folders to send along. InputError for a path that cannot be meant.
    """

    experiment: str
    id: str = field(default_factory=lambda: f"subfleet-{token_hex(4)}")
    out: str | None = None
    restarts: int = RESTARTS
    more: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.id):
            raise InputError(
                f"--name {self.id}: is no name of a job; give letters, digits, '.', '_' and '-', "
                "at most 100"
            )
        if self.restarts < 0:
            raise InputError(
                f"--restarts {self.restarts}: is below 0; give how often to start again"
            )
        if self.out is not None and not Path(self.out).is_absolute():
            raise InputError(
                f"--out {self.out}: is relative, and the job has a folder of its own that goes "
                "with it; give an absolute path on storage that every node of the cluster sees"
            )
        for key, path in relative_paths(self.tables):
            raise InputError(
                f"{key} = {path!r}: is relative to a folder here that the cluster does not see; "
                "give an absolute path on storage that every node of the cluster sees"
            )
        own_modules(self.tables)
        taken = {FILE}
        for path in self.more:
            if not path.exists():
                raise InputError(f"--with {path}: there is no such file or folder")
            if path.resolve().name in taken:
                raise InputError(
                    f"--with {path}: {path.resolve().name} is sent along already; give it another "
                    "name"
                )
            taken.add(path.resolve().name)

    def send(self, server: JobServer) -> None:
        """Submits it. InputError where the cluster does not take it, or knows its id already."""
        if (there := server.find(self.id)) is not None:
            raise InputError(
                f"--name {self.id}: there is a job {self.id} already ({there.status}); give "
                "another --name, or leave it out"
            )
        with code() as package, tempfile.TemporaryDirectory(prefix="subfleet-") as scratch:
            folder = Path(scratch)
            (folder / FILE).write_text(self.experiment)
            sent = dict.fromkeys(path.resolve() for path in self.more)
            for path in {**sent, **dict.fromkeys(own_modules(self.tables))}:
                copy_into(folder, path)
            server.submit(
                self.id,
                self.entrypoint,
                runtime_env={
                    "working_dir": str(folder),
                    "py_modules": [package],
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                        "SUBFLEET_SENT_BY": f"Python {platform.python_version()}",
                    },
                },
                metadata={
                    "subfleet": subfleet.__version__,
                    "algorithm": self.tables["algorithm"]["name"],
                    "out": self.folder,
                },
            )

    @property
    def tables(self) -> dict[str, Any]:
        """The experiment's tables."""
        return tomllib.loads(self.experiment)

    @property
    def folder(self) -> str:
        """The run folder, on the cluster; the shell there knows what `$HOME` is."""
        return self.out or f"$HOME/subfleet-runs/{self.id}"

    @property
    def entrypoint(self) -> str:
        """The command that the job runs."""
        return (
            f"python -m subfleet run {FILE} --address auto --out {quoted(self.folder)} "
            f"--restarts {self.restarts}"
        )


def quoted(folder: str) -> str:
    """A folder as a word of a shell's command, in which `$HOME` is still replaced.

    >>> quoted("$HOME/runs/a"), quoted("/shared/my runs")
    ('"$HOME/runs/a"', "'/shared/my runs'")
    """
    if folder.startswith("$HOME/"):
        return f'"{folder}"'
    return shlex.quote(folder)


def relative_paths(tables: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every path in an experiment's tables that is relative.

    >>> list(relative_paths({"data": {"name": "femnist", "source": "files/femnist"}}))
    [('data.source', 'files/femnist')]
    """
    if isinstance(tables, Mapping):
        for name, value in tables.items():
            dotted = f"{key}.{name}" if key else name
            if _PATHS.fullmatch(dotted) and not str(value).startswith(("/", "~")):
                yield dotted, str(value)
            yield from relative_paths(value, dotted)
    elif isinstance(tables, list):
        for number, item in enumerate(tables):
            yield from relative_paths(item, f"{key}[{number}]")


@contextmanager
def code() -> Iterator[str]:
    """A copy of this package, without what Python compiled, to be sent along."""
    with tempfile.TemporaryDirectory(prefix="subfleet-code-") as scratch:
        yield str(copy_into(Path(scratch), PACKAGE))


def own_modules(tables: Mapping[str, Any]) -> list[Path]:
    """The user's own modules that an experiment names as "module:attribute": files or packages."""
    names = [tables[part]["name"] for part in ("data", "model", "algorithm")]
    tops = dict.fromkeys(name.partition(":")[0].partition(".")[0] for name in names if ":" in name)
    return [path for top in tops if (path := _source(top)) is not None]


def _source(top: str) -> Path | None:
    """A module's file or folder; None where it is installed, or part of this package."""
    # Last, as where the experiment runs: nothing in this folder stands in for a library.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise InputError(
            f"module {top!r} cannot be found here, so that it cannot be sent along; run the "
            "command where it can be imported, such as in its folder"
        )
    origin = Path(spec.origin)
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    if top == PACKAGE.name or top in sys.stdlib_module_names:
        return None
    if any(origin.is_relative_to(path) for path in installed):
        return None
    return origin.parent if origin.name == "__init__.py" else origin


def copy_into(folder: Path, source: Path) -> Path:
    """Copies a file or folder into a folder; the copy."""
    target = folder / source.name
    if source.is_dir():
        # Ray would heed a .gitignore among the files, and leave some out.
        left_out = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".gitignore")
        shutil.copytree(source, target, ignore=left_out)
    else:
        shutil.copy(source, target)
    return target
