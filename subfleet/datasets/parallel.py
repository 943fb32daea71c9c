"""Shards parsed in parallel with Ray Data."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from typing import Any

from subfleet.datasets.prepare import Parse, Part
from subfleet.datasets.reader import Shard


def quiet_context() -> Any:
    """Ray Data's settings for this process: silent, and raising what our own code raised."""
    import logging

    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    return context


def parse_all(parse: Parse, shards: list[Shard]) -> Iterator[Part]:
    """The parts of all shards as they are done, a task each; Ray must be running.

    The rows go to disk where they are parsed; what comes back is who has how many.
    """
    if not shards:
        return
    import ray.data

    quiet_context()

    def task(row: dict[str, Any]) -> dict[str, Any]:
        return {"ended": pickle.dumps(_ended(parse, shards[row["item"]]))}

    numbers = ray.data.from_items(list(range(len(shards))), override_num_blocks=len(shards))
    for row in numbers.map(task).iter_rows():
        ended = pickle.loads(row["ended"])
        if isinstance(ended, Exception):
            raise ended
        yield ended


def _ended(parse: Parse, shard: Shard) -> Part | Exception:
    """The part, or what parsing raised: Ray would wrap it and print pages about it."""
    try:
        return parse(shard)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
