"""TensorBoard's event files, written at once and in whole steps."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from subfleet.platform.files import disk_guard


class EventFile:
    """One new event file of a folder.

    TensorBoard's own writer hands over to a thread, where a full disk ends in a
    traceback and half an event. Here a step is one event in one write, which goes to the
    system's cache: nothing waits for the disk before `close`, and what a checkpoint has
    seen was handed over before it.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Of what earlier files of the folder hold, `purge_step` and all beyond is void."""
        # Generated modules, which type checkers cannot look into.
        from tensorboard.compat.proto import event_pb2, summary_pb2

        proto: Any = event_pb2
        summary: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 10**6:013d}"
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 0
        self._event = proto.Event
        self._summary = summary.Summary
        self._write(proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._write(proto.Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, values: Iterable[Any], step: int) -> None:
        """Write a step's `Summary.Value`s; all of them or, on a full disk, none: `RunFailed`."""
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        data = memoryview(buffer.getvalue())
        with disk_guard(self.path, len(data)):
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
