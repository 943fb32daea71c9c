"""Shards parsed in parallel with Ray Data."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from subfleet.core.errors import RunFailed
from subfleet.datasets.prepare import Parse, Part
from subfleet.datasets.reader import Shard


def quiet_context() -> Any:
    """Ray Data's settings for this process: silent, and raising what our own code raised."""
    import logging

    from ray.data import DataContext

    # Ray 2.60 has no other public way to bound retries (`bounded_retries`) and warns of this one.
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    return context


def bounded_retries() -> dict[str, Any]:
    """What tasks of Ray Data ask for: a worker that dies each time is not tried for ever."""
    return {"max_retries": 3}


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
    rows = iter(numbers.map(task, ray_remote_args_fn=bounded_retries).iter_rows())
    while (row := _next(rows)) is not None:
        ended = pickle.loads(row["ended"])
        if isinstance(ended, Exception):
            raise ended
        yield ended


def _next(rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """One more row, None after the last; RunFailed where workers keep dying."""
    from ray.exceptions import RayError

    try:
        return next(rows, None)
    except RayError as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        raise RunFailed(
            f"a worker that parses died four times ({last}); if memory runs out, close other "
            "programs or parse with --local, one shard at a time"
        ) from error


def _ended(parse: Parse, shard: Shard) -> Part | Exception:
    """The part, or what parsing raised: Ray would wrap it and print pages about it."""
    try:
        return parse(shard)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
