"""Runs for reports, and a report as the tests read it."""

from __future__ import annotations

import base64
import csv
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from subfleet.config import Experiment
from subfleet.launch import Run, launch

TIERS = [
    {"name": "high", "share": 0.5, "width": 1.0, "device": {"flops_per_s": 2e7}},
    {"name": "low", "share": 0.5, "width": 0.5, "device": {"flops_per_s": 1e6}},
]


def experiment(**changes: Any) -> Experiment:
    """A small experiment on devices of two kinds; `changes` are dotted keys with __ for the dot."""
    tables = Experiment(
        data={"name": "synthetic_femnist", "clients": 30, "mean_samples": 20.0},
        model={"name": "small_cnn", "channels": [2, 4], "hidden": 8},
        fleet={
            "tiers": TIERS,
            "device": {
                "up_bytes_per_s": 1e5,
                "down_bytes_per_s": 1e6,
                "latency_s": 0.1,
                "failure_rate": 0.1,
                "joules_per_flop": 1e-9,
                "joules_per_byte": 1e-6,
            },
        },
        algorithm={"name": "fedpa"},
        train={"lr": 0.1},
        run={"rounds": 6, "cohort": 8, "eval_every": 2, "over_select": 1.5, "deadline": 2.0},
    )
    return tables.with_values({key.replace("__", "."): value for key, value in changes.items()})


def made(folder: Path, **changes: Any) -> Run:
    """A run of the experiment, in this process."""
    return launch(experiment(**changes), out=folder, local=True)


@dataclass
class Page(HTMLParser):
    """A page taken apart: cells of tables by their ids, data behind CSV links, pictures' words."""

    html: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    data: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    alts: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._cells: list[list[str]] | None = None
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        match tag:
            case "table":
                self._cells = self.tables[given["id"]] = []
            case "tr" if self._cells is not None:
                self._cells.append([])
            case "td" | "th" if self._cells is not None:
                self._cells[-1].append("")
            case "img":
                self.alts.append(given["alt"])
            case "a" if "download" in given:
                head, _, coded = given["href"].partition(",")
                assert head == "data:text/csv;base64"
                text = base64.b64decode(coded).decode()
                name = given["download"].removesuffix(".csv")
                self.data[name] = list(csv.DictReader(io.StringIO(text)))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cells and self._cells[-1]:
            self._cells[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._cells = None

    def rows(self, table: str) -> list[dict[str, str]]:
        """A table's rows by heading."""
        head, *rows = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]
