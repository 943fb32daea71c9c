"""ADDS's tables, scaled down to samples of its data sets: the paper's numbers beside ours.

    python benchmarks/papers/adds.py --scale small --data DIR [--seeds 0,1] [--tables femnist]
        [--rows fedavg,adds-slim] [--cache cells/adds] [--minutes 90] [--out docs/results/adds.md]

DIR has the folders femnist, shakespeare and sent140 with their publishers' files. Rows are
those of `examples/papers/adds/`, on less data, with smaller networks and for fewer rounds.
Finished cells in --cache are not run again, so that the same command goes on where it
stopped; an estimate is printed first, and no cell begins that would end after --minutes.
The page holds tables and figures; its last section is written by hand and kept. With --tables
or --rows only these are run, and a page of them goes beside the cells: the same command
without them then finds these cells finished and writes the whole page, and so does --page-only,
which runs nothing.

    python benchmarks/papers/adds.py --scale paper --data DIR

runs the files as they are, on Ray with all that the machine has; DIR has celeba, too.

    python benchmarks/papers/adds.py --data DIR --tables femnist --rows adds-slim --seeds 0
        --validate --try adds-slim:arch_lr=0.01 --try adds-slim:penalty=0.5

tries other options on a data set apart: of the clients that seeds 0 and 1 and those of --seeds
all train on, the train rows, split anew. Clients that one of them holds out and rows that one of
them tests on are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adds_page
import common
import measured
import page
from adds_numbers import (
    NAMES,
    PAPER,
    PAPER_TARGETS,
    SETS,
    SMALL,
    SMALL_NOTES,
    SMALL_ROWS,
    SMALL_TARGETS,
    TEXTS,
    TITLES,
)
from adds_rate import fitted
from arguments import chosen, jobs, minutes, tried
from common import Row, Table
from measured import Results

from subfleet.cli import parse_seeds
from subfleet.config import Experiment
from subfleet.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "papers" / "adds"
REPORTED = (0, 1)  # the seeds of the page
UNUSED = {"pfedme": ("lr", "momentum")}  # keys of [train] without effect: not in a row's file
TRIED = "## What was tried\n\nNothing beyond the settings above yet."


def experiment_file(name: str, row: str) -> Experiment:
    """The experiment of a row of the paper's tables; FedProx and centralised are not there."""
    beside = row in ("fedprox", "centralised")
    found = Experiment.load(FILES / f"{name}-{'fedavg' if beside else row}.toml")
    return found.with_values({"algorithm.name": row}) if beside else found


def table(name: str, rows: Sequence[str], options: argparse.Namespace) -> Table:
    """A table of the paper, or what is left of it when scaled down."""
    small = options.scale == "small"
    source = {"data.source": str(options.data / name)}
    plain = experiment_file(name, "fedavg")
    base = plain.with_values(source | (SMALL[name] if small else {}))
    rate, about = None, ""
    if small:
        if name == "sent140":
            base = _without(base, "data", "glove")
        if options.validate:
            base = base.with_values({"data.of": base.data.name, "data.name": "samples:apart"})
            seen = sorted({*REPORTED, *options.seeds})
            base = base.with_values({"data.seeds": seen})
        base, rate, about = fitted(base, each=name in TEXTS)
        about = f"{about} {SMALL_NOTES.get(name, '')}".strip()
    elif name == "sent140":
        glove = options.data / name / base.data.options["glove"]
        base = base.with_values({"data.glove": str(glove)})
    found = []
    for row in rows:
        experiment = experiment_file(name, row)
        if row.startswith("adds") and rate is not None:
            experiment = experiment.with_values({"algorithm.arch_lr": rate})
        found.append(Row(row, TITLES[row], _own_settings(experiment, plain), _paper(name, row)))
        for other, words in options.tries:
            if other == row:
                changed = experiment.with_overrides([f"algorithm.{word}" for word in words])
                label, title = (f"{one}, {', '.join(words)}" for one in (row, TITLES[row]))
                found.append(Row(label, title, _own_settings(changed, plain)))
    targets = SMALL_TARGETS[name] if small else PAPER_TARGETS.get(name, (0.5, 0.6))
    return Table(name, NAMES[name], base, tuple(found), targets, about)


def _without(experiment: Experiment, part: str, key: str) -> Experiment:
    tables = experiment.to_tables()
    tables[part].pop(key, None)
    return Experiment(**tables)


def _own_settings(experiment: Experiment, plain: Experiment) -> dict[str, Any]:
    """A row's algorithm, and what its file says of training that FedAvg's does not."""
    tables, others = experiment.to_tables(), plain.to_tables()["train"]
    found = {f"algorithm.{key}": value for key, value in tables["algorithm"].items()}
    keys = {*tables["train"], *others}.difference(UNUSED.get(experiment.algorithm.name, ()))
    own = {key: tables["train"].get(key, 0.0) for key in keys}
    return found | {f"train.{k}": v for k, v in sorted(own.items()) if others.get(k, 0.0) != v}


def _paper(name: str, row: str) -> dict[str, str]:
    words = PAPER[name].get(row, ())
    last = ("params", "macs") if name in ("femnist", "celeba") else ("rounds",)
    return dict(zip(("acc_global", "acc_local", *last), words, strict=False))


def main() -> None:
    options = parsed()
    try:
        tables, missing = run(options)
    except InputError as error:
        sys.exit(str(error))
    if options.json:
        text = json.dumps({"tables": [one.to_json() for one in tables], "missing": missing})
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    out = options.out
    # The command that makes the cells, which --page-only does not.
    words = [word for word in sys.argv[1:] if word != "--page-only"]
    title = "ADDS, scaled down" if options.scale == "small" else "ADDS"
    if options.validate:
        title += ": training clients alone"
    parts = [
        page.heading(
            title,
            adds_page.summary(tables),
            page.command("benchmarks/papers/adds.py", words),
            [made_on for one in tables for made_on in one.environments()],
        ),
        adds_page.EXPLAINED,
    ]
    small = options.scale == "small"
    parts += [adds_page.section(one, out.parent, out.stem, small) for one in tables]
    page.write(out, [*parts, page.missing_text(missing)], TRIED)
    print(out)


def run(options: argparse.Namespace) -> tuple[list[Results], dict[str, str]]:
    """Runs what is not finished, unless for the page only.

    Returns what is finished, and which cells are missing and why.
    """
    small = options.scale == "small"
    names = options.tables or (tuple(SMALL) if small else tuple(SETS))
    absent = [name for name in names if not (options.data / name).is_dir()]
    if absent and (small or not options.page_only):
        raise InputError(
            f"--data {options.data}: has no folder {', '.join(absent)}; put the publishers' files "
            "there, or choose others with --tables"
        )
    tables, cells = [], []
    for name in names:
        rows = SMALL_ROWS[name] if small else tuple(PAPER[name])
        rows = [row for row in rows if options.rows is None or row in options.rows]
        if rows:
            tables.append(table(name, rows, options))
            cells.append(tables[-1].cells(options.seeds, options.cache))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    todo = [cell for some in cells for cell in some]
    if options.page_only:
        missing = {common.name(cell): "not run yet" for cell in todo if cell.done() is None}
    else:
        missing = common.run(
            todo, jobs=options.jobs, local=options.jobs > 0, minutes=options.minutes, say=say
        )
    found = [measured.results(one, some) for one, some in zip(tables, cells, strict=True)]
    return [one for one in found if one is not None], missing


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    arguments = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the page's command knows options by their whole name
    )
    add = arguments.add_argument
    add("--scale", choices=("small", "paper"), default="small")
    add("--data", type=Path, help="the folder of the data sets; else $SUBFLEET_DATA")
    add("--seeds", default="0,1", help="with commas between")
    add("--tables", help=f"of {', '.join(SETS)}; all by default")
    add("--rows", help=f"of {', '.join(TITLES)}; all by default")
    add(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="ROW:KEY=VALUE,...",
        help="a row more, with other options of its algorithm; repeatable",
    )
    add(
        "--validate",
        action="store_true",
        help="train and hold out among what neither the page's seeds nor --seeds measure on",
    )
    add("--cache", type=Path, help="where cells are kept; cells/adds-SCALE by default")
    add("--jobs", type=jobs, help="cells at a time, a core each; 0: one by one on Ray")
    add("--minutes", type=minutes, default=90.0, help="no cell begins that would end later")
    add("--page-only", action="store_true", help="write the page of finished cells, run none")
    add("--out", type=Path, help="the page, figures beside it; of a part of it CACHE/part.md")
    add("--json", help="a file for all figures; - prints them")
    options = arguments.parse_args(words)
    small = options.scale == "small"
    if options.data is None:
        if "SUBFLEET_DATA" not in os.environ:
            arguments.error("--data is missing: give the folder of the data sets")
        options.data = Path(os.environ["SUBFLEET_DATA"])
    if not options.data.is_dir():
        arguments.error(f"--data {options.data}: no such folder; give the one of the data sets")
    if options.jobs is None:
        options.jobs = (os.cpu_count() or 1) if small else 0
    try:
        options.seeds = parse_seeds(options.seeds)
    except InputError as error:
        arguments.error(str(error))
    options.tables = chosen(
        arguments, "--tables", options.tables, tuple(SMALL) if small else tuple(SETS)
    )
    options.rows = chosen(arguments, "--rows", options.rows, tuple(TITLES))
    options.cache = options.cache or Path("cells") / f"adds-{options.scale}"
    options.tries = [tried(arguments, text, tuple(TITLES)) for text in options.tries]
    if options.out is None:
        options.out = _page(options)
    return options


def _page(options: argparse.Namespace) -> Path:
    """Where the page goes: a part of it is not written over the whole."""
    if options.validate:
        return options.cache / "validation.md"
    if options.tables or options.rows or options.tries:
        return options.cache / "part.md"
    name = "adds.md" if options.scale == "small" else "adds-paper.md"
    return ROOT / "docs" / "results" / name


if __name__ == "__main__":
    main()
