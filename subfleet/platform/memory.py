"""How this process keeps the memory that it frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, instead of giving it back to the system at once.

    Each training step allocates the same large tensors anew. By default glibc maps those
    above its threshold, and every page of them faults again in every step: 10-20 % of a
    large network's training. What is kept is bounded by what was in use at once. Nothing
    happens where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
