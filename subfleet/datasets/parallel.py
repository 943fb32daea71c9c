"""Shards parsed in parallel with Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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


def parse_all(parse: Parse, shards: list[Shard]) -> Iterable[Part]:
    """The parts of all shards as they are done, a task each; Ray must be running.

    The rows go to disk where they are parsed; what comes back is who has how many.
    """
    if not shards:
        return
    import ray.data

    quiet_context()

    def task(row: dict[str, Any]) -> dict[str, Any]:
        return {"part": json.dumps(vars(parse(shards[row["item"]])))}

    numbers = ray.data.from_items(list(range(len(shards))), override_num_blocks=len(shards))
    yield from _parts(numbers.map(task).iter_rows())


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[Part]:
    for row in rows:
        yield Part(**json.loads(row["part"]))
