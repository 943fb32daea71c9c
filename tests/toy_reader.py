"""A reader of small text files, for the tests of what reads any reader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard


@dataclass(frozen=True)
class Lines:
    """Files of lines "client label pixel"; a row is [2] uint8, the pixel twice."""

    natural: bool = True
    spread: bool = False
    die_at: str = ""  # a file at which the process is killed, as by the system

    @property
    def name(self) -> str:
        return "lines"

    def shards(self, source: Path) -> list[Shard]:
        files = sorted(source.glob("*.txt"))
        return [Shard(file.name, file, from_test="test" in file.name) for file in files]

    def layout(self, source: Path) -> Layout:
        return Layout(4, (2,), natural=self.natural, spread=self.spread)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        with (shard.path.parent / "log").open("a") as log:
            log.write(json.dumps([shard.name, os.getpid()]) + "\n")
        if self.die_at and shard.name == self.die_at and (shard.path.parent / "die").exists():
            if (shard.path.parent / "die").read_text() != "each time":
                (shard.path.parent / "die").unlink()
            os.kill(os.getpid(), 9)
        rows: dict[str, list[tuple[int, int]]] = {}
        for number, line in enumerate(shard.path.read_text().splitlines(), 1):
            client, label, pixel = line.split()
            if not label.isdecimal() or int(label) > 3:
                faults.found(
                    "unknown label", f"{shard.path}, line {number}: label {label!r} is not 0..3"
                )
                continue
            rows.setdefault(client, []).append((int(label), int(pixel)))
        for client, pairs in rows.items():
            y, pixel = np.array(pairs).T
            x = np.repeat(pixel[:, None], 2, axis=1).astype(np.uint8)
            yield ClientRows(client, x, y, np.full(len(y), shard.from_test))


def parsed(source: Path) -> list[tuple[str, int]]:
    """(file, process) of every shard that was read, in order of time."""
    return [tuple(json.loads(line)) for line in (source / "log").read_text().splitlines()]
