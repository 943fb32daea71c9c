"""TensorBoard: every number of `metrics.jsonl`, coverage, hyper-parameters, the experiment."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.platform.columns import METRICS_COLUMNS
from subfleet.platform.files import disk_guard, to_jsonable

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


class _EventFile:
    """One event file, written at once and in whole steps.

    TensorBoard's own writer hands over to a thread, where a full disk ends in a
    traceback and half an event.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        # Generated modules, which type checkers cannot look into.
        from tensorboard.compat.proto import event_pb2

        proto: Any = event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 10**6:013d}"
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 0
        self._event = proto.Event
        events = [proto.Event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge_step is not None:
            start = proto.SessionLog(status=proto.SessionLog.START)
            events.append(proto.Event(wall_time=time.time(), step=purge_step, session_log=start))
        self._write(events)

    def add(self, summaries: Iterable[Any], step: int) -> None:
        """Write summaries of one step; all of them or, on a full disk, none."""
        now = time.time()
        self._write([self._event(wall_time=now, step=step, summary=part) for part in summaries])

    def _write(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        for event in events:
            records.write(event.SerializeToString())
        data = memoryview(buffer.getvalue())
        with disk_guard(self._path, len(data)):
            try:
                at = self._size
                while data:
                    written = os.pwrite(self._handle, data, at)
                    data, at = data[written:], at + written
            except BaseException:
                os.ftruncate(self._handle, self._size)
                raise
        self._size = at

    def close(self) -> None:
        """Make the events durable and close."""
        os.fsync(self._handle)
        os.close(self._handle)


class TensorBoardWriter:
    """An `Observer` that writes event files into a folder.

    On a resume whatever the events hold beyond the checkpoint is purged.
    Nothing of TensorBoard is imported before `on_start`. A full disk raises
    `RunFailed`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._events: _EventFile | None = None
        self._config: dict[str, Any] = {}

    def on_start(self, info: dict[str, Any]) -> None:
        """Open the event file and write the experiment as text."""
        from torch.utils.tensorboard.summary import text

        start = info.get("start", 0)
        self._config = info.get("config", {})
        self._events = _EventFile(self.folder, purge_step=start + 1 if start else None)
        config = json.dumps(to_jsonable(self._config), indent=2)
        indented = "\n".join("    " + line for line in config.splitlines())  # code, in Markdown
        self._events.add([text("experiment", indented)], start)

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Write the round's scalars, and for each unit group how many clients trained each unit."""
        from torch.utils.tensorboard.summary import scalar

        assert self._events is not None, "on_start first"
        parts = [scalar(tag, value) for tag, value in scalars(record)]
        parts += [_coverage(group, np.asarray(counts)) for group, counts in coverage.items()]
        self._events.add(parts, record["round"])

    def on_end(self, summary: dict[str, Any]) -> None:
        """Write the final metrics beside the hyper-parameters and close."""
        from torch.utils.tensorboard.summary import hparams, scalar

        if self._events is None:
            return
        events, self._events = self._events, None
        final = dict(_numbers("final", to_jsonable(summary)))
        parts = [scalar(tag, value) for tag, value in final.items()]
        parts += hparams(dict(_flat(self._config)), dict.fromkeys(final, 0.0))
        try:
            events.add(parts, summary.get("rounds", 0))
        finally:
            events.close()


def _coverage(group: str, counts_C: np.ndarray) -> Any:
    """Units along the axis, clients as heights.

    A histogram of the counts themselves would not show which units went untrained.
    """
    from torch.utils.tensorboard.summary import histogram_raw

    units = np.arange(len(counts_C))
    return histogram_raw(
        f"coverage/{group}",
        min=0,
        max=len(counts_C),
        num=int(counts_C.sum()),
        sum=float((counts_C * units).sum()),
        sum_squares=float((counts_C * units**2).sum()),
        bucket_limits=(units + 1).tolist(),
        bucket_counts=counts_C.tolist(),
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            yield prefix + key, value if plain else json.dumps(to_jsonable(value))
