"""Memory of this process: how much, keeping what it frees, and saying who ran out of it."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from subfleet.core.errors import RunFailed

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 1 << 30
# What torch's CPU allocator and the CUDA libraries say in a plain RuntimeError.
_WORDS = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")


class OutOfMemory(RunFailed):
    """A device has not enough memory for the clients of a variant that it was to run at once."""

    def __init__(self, variant: str, device: str):
        super().__init__(
            f"clients of variant {variant} do not fit into the memory of the {device} device; "
            "lower run.hosts or train.batch_size, or give their tier a smaller width"
        )
        self.variant, self.device = variant, device

    def __reduce__(self) -> tuple[type[OutOfMemory], tuple[str, str]]:
        return OutOfMemory, (self.variant, self.device)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory to be had.

    >>> ran_out(MemoryError()), ran_out(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def charged_to(variant: str, device: str) -> Iterator[None]:
    """Raises `OutOfMemory` of this variant where memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        # What filled the memory hangs on the frames of the step that failed.
        traceback.clear_frames(error.__traceback__)
        if device == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(variant, device) from None


def resident() -> int:
    """Bytes of this process that are in memory, shared pages included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


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
