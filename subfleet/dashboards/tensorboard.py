"""TensorBoard: every number of `metrics.jsonl`, coverage, hyper-parameters, the experiment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subfleet.platform.columns import METRICS_COLUMNS
from subfleet.platform.files import disk_guard, to_jsonable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TAGS = {column.name: column.tag for column in METRICS_COLUMNS}


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every finite number of a record; keys of its own go under `algorithm/`.

    >>> record = {"round": 3, "acc_global": 0.5, "acc_tier": {"low": 0.25}, "rate": 2}
    >>> dict(scalars(record))
    {'accuracy/global': 0.5, 'accuracy/tier/low': 0.25, 'algorithm/rate': 2.0}
    """
    for key, value in to_jsonable(record).items():
        tag = _TAGS.get(key, f"algorithm/{key}")
        if tag:
            yield from _numbers(tag, value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{tag}/{key}", item)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield tag, float(value)


class TensorBoardWriter:
    """An `Observer` that writes event files into a folder.

    On a resume whatever the events hold beyond the checkpoint is purged.
    Nothing of TensorBoard is imported before `on_start`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None
        self._config: dict[str, Any] = {}

    def on_start(self, info: dict[str, Any]) -> None:
        """Open the event file and write the experiment as text."""
        from torch.utils.tensorboard import SummaryWriter

        start = info.get("start", 0)
        self._config = info.get("config", {})
        with disk_guard(self.folder / "events", 0):
            self._writer = SummaryWriter(
                str(self.folder), purge_step=start + 1 if start else None, flush_secs=10
            )
            text = json.dumps(to_jsonable(self._config), indent=2)
            indented = "\n".join("    " + line for line in text.splitlines())
            self._writer.add_text("experiment", indented, start)

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Write the round's scalars, and for each unit group how many clients trained each unit."""
        assert self._writer is not None, "on_start first"
        step = record["round"]
        with disk_guard(self.folder / "events", 0):
            for tag, value in scalars(record):
                self._writer.add_scalar(tag, value, step)
            for group, counts in coverage.items():
                self._coverage(group, np.asarray(counts), step)

    def _coverage(self, group: str, counts_C: np.ndarray, step: int) -> None:
        # Units along the axis and clients as heights: a histogram of the counts
        # themselves would not show which units went untrained.
        assert self._writer is not None
        units = np.arange(len(counts_C))
        total = int(counts_C.sum())
        self._writer.add_histogram_raw(
            f"coverage/{group}",
            min=0,
            max=len(counts_C),
            num=total,
            sum=float((counts_C * units).sum()),
            sum_squares=float((counts_C * units**2).sum()),
            bucket_limits=(units + 1).tolist(),
            bucket_counts=counts_C.tolist(),
            global_step=step,
        )

    def on_end(self, summary: dict[str, Any]) -> None:
        """Write the final metrics beside the hyper-parameters and close."""
        if self._writer is None:
            return
        final = dict(_numbers("final", to_jsonable(summary)))
        with disk_guard(self.folder / "events", 0):
            for tag, value in final.items():
                self._writer.add_scalar(tag, value, summary.get("rounds", 0))
            self._hparams(list(final))
            self._writer.close()
        self._writer = None

    def _hparams(self, tags: list[str]) -> None:
        # SummaryWriter.add_hparams would open a second run; these belong to this one.
        from torch.utils.tensorboard.summary import hparams

        assert self._writer is not None
        for part in hparams(dict(_flat(self._config)), dict.fromkeys(tags, 0.0)):
            self._writer._get_file_writer().add_summary(part)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            yield prefix + key, value if plain else json.dumps(to_jsonable(value))
