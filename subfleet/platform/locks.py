"""Locks of folders, which end with the process that took them."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from subfleet.core.errors import InputError

# Whoever looks whether a lock is taken has it for an instant.
_TRIES, _WAIT_S = 5, 0.02


def take(folder: Path) -> int:
    """Takes the folder's lock, until the handle that is returned is closed.

    Raises `InputError` when another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if left:
                time.sleep(_WAIT_S)
                continue
            os.close(handle)
            raise InputError(
                f"{folder}: another process is running in it; "
                "wait for it, stop it, or give another --out"
            ) from error
    return handle


def taken(folder: Path) -> bool:
    """Whether a process of this machine holds the folder's lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
