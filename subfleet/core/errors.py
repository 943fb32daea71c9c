"""The two ways in which subfleet gives up: the input is wrong, or the run failed.

Every message names the thing, its value, the bound it breaks and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used; the command ends with status 2."""


class RunFailed(RuntimeError):
    """The input was fine and the run still failed; the command ends with status 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, else all of them.

    >>> did_you_mean("fedagv", ["fedavg", "fedpa"])
    "did you mean 'fedavg'?"
    >>> did_you_mean("zzz", ["b", "a"])
    'known: a, b'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
