"""Simulate federated learning at scale, each client training the sub-network that fits it.

>>> import subfleet
>>> experiment = subfleet.Experiment(data={"name": "synthetic_femnist"})
>>> experiment.run.rounds
100

`subfleet.run(experiment)` runs it; the command `subfleet run FILE.toml` does the same.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from subfleet import _torchvision

if TYPE_CHECKING:
    from subfleet.config import Experiment as Experiment
    from subfleet.core.algorithm import Algorithm as Algorithm
    from subfleet.core.errors import InputError as InputError
    from subfleet.core.errors import RunFailed as RunFailed
    from subfleet.launch import Run as Run

__version__ = "0.1.0"

# Looked up on first use: `subfleet --help` must not wait for torch and Ray.
_HOMES = {
    "Algorithm": "subfleet.core.algorithm",
    "Experiment": "subfleet.config",
    "InputError": "subfleet.core.errors",
    "Run": "subfleet.launch",
    "RunFailed": "subfleet.core.errors",
}

__all__ = ["Algorithm", "Experiment", "InputError", "Run", "RunFailed", "run"]

_torchvision.install()
# torch reads it when it first allocates. Tensors from 2 MB on then lie in pages of that size, where
# Linux has them: of a large network's sums, each as large as two copies of it, all pages are new.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run(experiment: Experiment, **options: Any) -> Run:
    """Run an experiment to its end; `options` are those of `subfleet.launch.launch`.

    Raises:
        InputError: The experiment, its data or the output folder cannot be used.
        RunFailed: The run could not be finished.
    """
    from subfleet.launch import launch

    return launch(experiment, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'subfleet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
