"""Where this machine keeps what a later run may use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, else $SUBFLEET_CACHE, else ~/.cache/subfleet, as an absolute path."""
    chosen = cache or os.environ.get("SUBFLEET_CACHE") or Path.home() / ".cache" / "subfleet"
    return Path(chosen).expanduser().absolute()
