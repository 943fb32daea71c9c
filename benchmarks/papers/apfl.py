"""APFL's Table 1, scaled down to a sample of CIFAR-10: the paper's numbers beside ours.

    python benchmarks/papers/apfl.py --scale small --data DIR [--seeds 0,1]
        [--partitions iid,dirichlet] [--rows fedavg,fedcs-high] [--cache cells/apfl]
        [--minutes 90] [--out docs/results/apfl.md]

DIR has the folder cifar10 with the publisher's files. Rows are those of
`examples/papers/apfl/`, with a smaller network and for fewer rounds. Finished cells in --cache
are not run again, so that the same command goes on where it stopped; an estimate is printed
first, and no cell begins that would end after --minutes. The page holds tables and figures; its
last section is written by hand and kept. With --partitions or --rows only these are run, and a
page of them goes beside the cells: the same command without them then finds these cells
finished and writes the whole page, and so does --page-only, which runs nothing.

    python benchmarks/papers/apfl.py --scale paper --data DIR

runs the files as they are, on Ray with all that the machine has; DIR has cifar100 and cinic10, too.

    python benchmarks/papers/apfl.py --data DIR --rows fedcs-high --try fedcs-high:inherit=true

adds a row with other options of its algorithm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apfl_page
import common
import measured
import page
from apfl_numbers import (
    PAPER,
    PARTITIONS,
    ROWS,
    SETS,
    SMALL,
    SMALL_FEDAVG,
    SMALL_FEDCS,
    title,
)
from arguments import chosen, jobs, minutes, tried
from common import Row, Table
from measured import Results

from subfleet.cli import parse_seeds
from subfleet.config import Experiment
from subfleet.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "papers" / "apfl"
TRIED = "## What was tried\n\nNothing beyond the settings above yet."


def table(name: str, partition: str, options: argparse.Namespace) -> Table:
    """One data set and partition, with the rows of both fleets."""
    source = {"data.source": str(options.data / name)}

    def experiment_of(row: str) -> Experiment:
        found = Experiment.load(FILES / f"{name}-{partition}-{row}.toml").with_values(source)
        return found.with_values(_smaller(row)) if options.scale == "small" else found

    base = experiment_of("feduniform-high")  # whose super-network is the whole one
    rows = []
    for row in options.rows or ROWS:
        experiment = experiment_of(row)
        rows.append(Row(row, title(row), _own(experiment, base), _paper(name, partition, row)))
        for other, words in options.tries:
            if other == row:
                changed = experiment.with_overrides([f"algorithm.{word}" for word in words])
                label, words_in = (f"{one}, {', '.join(words)}" for one in (row, title(row)))
                rows.append(Row(label, words_in, _own(changed, base)))
    heading = f"{SETS[name]}, {PARTITIONS[partition]}"
    return Table(f"{name}-{partition}", heading, base, tuple(rows), about="")


def _smaller(row: str) -> dict[str, Any]:
    own = {"fedavg": SMALL_FEDAVG, "fedcs": SMALL_FEDCS}.get(row.partition("-")[0], {})
    return SMALL | own


def _own(experiment: Experiment, base: Experiment) -> dict[str, Any]:
    """What a row's experiment says otherwise than the base, by dotted key."""
    tables, others = experiment.to_tables(), base.to_tables()
    return {
        f"{part}.{key}": value
        for part, values in tables.items()
        for key, value in values.items()
        if others.get(part, {}).get(key) != value
    }


def _paper(name: str, partition: str, row: str) -> dict[str, str]:
    glo, _, loc = PAPER[name][partition][row].partition(" / ")
    return {"acc_global": glo, "acc_own": loc or "–"}


def main() -> None:
    options = parsed()
    try:
        tables, missing = run(options)
    except InputError as error:
        sys.exit(str(error))
    if options.json:
        text = json.dumps({"tables": apfl_page.to_json(tables), "missing": missing})
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    out, small = options.out, options.scale == "small"
    words = [word for word in sys.argv[1:] if word != "--page-only"]
    heading = page.heading(
        "APFL, scaled down" if small else "APFL",
        apfl_page.summary(tables),
        page.command("benchmarks/papers/apfl.py", words),
        [made_on for one in tables for made_on in one.environments()],
    )
    parts = [heading, apfl_page.explained(small)]
    parts += [apfl_page.section(one, out.parent, out.stem) for one in tables]
    parts.append(apfl_page.comparison(tables, out.parent, out.stem))
    page.write(out, [*parts, page.missing_text(missing)], TRIED)
    print(out)


def run(options: argparse.Namespace) -> tuple[list[Results], dict[str, str]]:
    """Runs what is not finished, unless for the page only.

    Returns what is finished, and which cells are missing and why.
    """
    names = ("cifar10",) if options.scale == "small" else tuple(SETS)
    if absent := [name for name in names if not (options.data / name).is_dir()]:
        raise InputError(
            f"--data {options.data}: has no folder {', '.join(absent)}; put the publishers' files "
            "there"
        )
    tables = [
        table(name, partition, options)
        for name in names
        for partition in options.partitions or PARTITIONS
    ]
    cells = [one.cells(options.seeds, options.cache) for one in tables]
    todo = [cell for some in cells for cell in some]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.page_only:
        missing = {common.name(cell): "not run yet" for cell in todo if cell.done() is None}
    else:
        missing = common.run(
            todo, jobs=options.jobs, local=options.jobs > 0, minutes=options.minutes, say=say
        )
    found = [measured.results(one, some) for one, some in zip(tables, cells, strict=True)]
    return [one for one in found if one is not None], missing


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
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
    add("--partitions", help=f"of {', '.join(PARTITIONS)}; all by default")
    add("--rows", help=f"of {', '.join(ROWS)}; all by default")
    add(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="ROW:KEY=VALUE,...",
        help="a row more, with other options of its algorithm; repeatable",
    )
    add("--cache", type=Path, help="where cells are kept; cells/apfl-SCALE by default")
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
    options.partitions = chosen(arguments, "--partitions", options.partitions, tuple(PARTITIONS))
    options.rows = chosen(arguments, "--rows", options.rows, ROWS)
    options.cache = options.cache or Path("cells") / f"apfl-{options.scale}"
    options.tries = [tried(arguments, text, ROWS) for text in options.tries]
    if options.out is None:
        options.out = _page(options)
    return options


def _page(options: argparse.Namespace) -> Path:
    """Where the page goes: a part of it is not written over the whole."""
    if options.partitions or options.rows or options.tries:
        return options.cache / "part.md"
    name = "apfl.md" if options.scale == "small" else "apfl-paper.md"
    return ROOT / "docs" / "results" / name


if __name__ == "__main__":
    main()
