"""SIGTERM as an orderly end: what is going on unwinds, as after Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Ends the process with status 143 after a SIGTERM, as shells have it, once unwound.

    Within the block a SIGTERM is a KeyboardInterrupt. Yields a function that takes the
    signal over: to be called at once, or after a library that takes it too. Blocks may
    nest; outside the main thread, where Python allows no handlers, nothing changes.
    """
    before = signal.getsignal(signal.SIGTERM)
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        # Ray's waiting calls let only this one through, as one of their own.
        raise KeyboardInterrupt

    try:
        yield lambda: _on_sigterm(interrupt)
    except KeyboardInterrupt:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        _on_sigterm(before)


def _on_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
