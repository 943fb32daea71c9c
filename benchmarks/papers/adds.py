"""ADDS's tables, scaled down to samples of its data sets: the paper's numbers beside ours.

    python benchmarks/papers/adds.py --scale small --data DIR [--seeds 0,1] [--tables femnist]
        [--rows fedavg,adds-slim] [--cache cells/adds] [--minutes 90] [--out docs/results/adds.md]

DIR has the folders femnist, shakespeare and sent140 with their publishers' files. Rows are
those of `examples/papers/adds/`, on less data, with smaller networks and for fewer rounds.
Finished cells in --cache are not run again, so that the same command goes on where it
stopped; an estimate is printed first, and no cell begins that would end after --minutes.
The page holds tables and figures; its last section is written by hand and kept.

    python benchmarks/papers/adds.py --scale paper --data DIR

runs the files as they are, on Ray with all that the machine has; DIR has celeba, too.

    python benchmarks/papers/adds.py --data DIR --tables femnist --rows adds-slim --seeds 0
        --validate --try adds-slim:arch_lr=0.01 --try adds-slim:penalty=0.5

tries other options on the training clients alone: what the tables are measured on is not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import figures
import measured
import numpy as np
import page
from adds_numbers import (
    NAMES,
    PAPER,
    PAPER_TARGETS,
    SETS,
    SMALL,
    SMALL_ROWS,
    SMALL_TARGETS,
    TITLES,
)
from common import Row, Table
from measured import Results

from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.core.skew import njsd
from subfleet.datasets.federation import split_of
from subfleet.registry import build_data

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "papers" / "adds"
KEPT = 0.4  # what the regulariser alone would leave of alpha after a client's steps
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
        base, rate, about = _fitted(base)
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
    own = {key: tables["train"].get(key, 0.0) for key in {*tables["train"], *others}}
    return found | {f"train.{k}": v for k, v in sorted(own.items()) if others.get(k, 0.0) != v}


def _paper(name: str, row: str) -> dict[str, str]:
    words = PAPER[name].get(row, ())
    last = ("params", "macs") if name in ("femnist", "celeba") else ("rounds",)
    return dict(zip(("acc_global", "acc_local", *last), words, strict=False))


def _fitted(base: Experiment) -> tuple[Experiment, float, str]:
    """The cohort and ADDS's rate as these data want them, and in words how that came."""
    data = build_data(base.data, seed=base.run.seed)
    ids, held = split_of(data, base.run.seed)
    base = base.with_values({"run.cohort": max(1, round(0.3 * len(ids)))})
    counts, train = data.label_counts(ids), base.train
    lambdas = njsd(counts) + 0.5
    # A client's own part of 10 % chooses the architecture, the rest trains.
    batches = np.ceil(np.maximum(data.sizes(ids, "train") * 0.9, 1) / train.batch_size)
    steps, mean = float((train.epochs or 1) * batches.mean()), float(lambdas.mean())
    rate = float(f"{(1 - KEPT ** (1 / steps)) / (2 * mean):.2g}")
    about = (
        f"{data.num_clients} clients, of which {len(ids)} train ({base.run.cohort} a round) and "
        f"{len(held)} are held out; {data.sizes(ids, 'train').mean():.0f} training samples a "
        f"client; {base.run.rounds} rounds, local epochs {train.epochs}, batch "
        f"{train.batch_size}, SGD {train.lr} with momentum {train.momentum}; the model is "
        f"`{base.model.name}`, {_options(base.model.options)}. ADDS's η_A is {rate}: the "
        f"regulariser alone would then bring α to {KEPT} over a client's {steps:.1f} local steps "
        f"at the mean λ of {mean:.2f}, (1 − 2 η_A λ)^steps = {KEPT}."
    )
    return base, rate, about


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "as it is"


# --- the page --------------------------------------------------------------------------------


def section(results: Results, folder: Path, stem: str) -> str:
    """A table's part of the page; draws its figures into `folder`."""
    name, full = results.table.name, results.full
    parts = [f"## {results.table.title}", results.table.about]
    parts.append(measured.table_text(results, measured.accuracy_columns()))
    if name in ("femnist", "celeba"):
        parts.append(measured.table_text(results, measured.size_columns(full)))
    else:
        parts.append(measured.table_text(results, measured.size_columns(full)[1::2]))
    parts.append(measured.table_text(results, measured.cost_columns(results)))
    if name in PAPER_TARGETS:
        words = " / ".join(f"{100 * target:.0f}" for target in PAPER_TARGETS[name])
        parts.append(f"The paper's rounds are to {words} %.")
    for key, words in (("acc_global", "Accuracy of the global model"), ("loss_global", "Its loss")):
        path = figures.curves(results, key, folder / f"{stem}-{name}-{key}.png")
        parts.append(f"![{words} over rounds, mean over seeds]({path.name})")
    path = figures.local_histograms(results, folder / f"{stem}-{name}-acc-local.png")
    parts.append(f"![Clients' own accuracies]({path.name})")
    return "\n\n".join([*parts, *_architectures(results, folder, stem)])


def _architectures(results: Results, folder: Path, stem: str) -> list[str]:
    """The paper's Figures 5 and 8, of the rows in which clients choose their own network."""
    lines = [line for line in results.lines if line.row.name.startswith("adds")]
    points = {}
    for line in lines:
        xs = np.concatenate([measured.divergences(one) for one in line.finished])
        ys = np.concatenate([one.clients.params for one in line.finished])
        points[line.row.title] = (xs, 100 * ys / results.full["params"])
    parts = []
    if points:
        path = folder / f"{stem}-{results.table.name}-divergence.png"
        found = figures.scatter(
            points, path, x="normalised JSD of a client's labels", y="parameters, % of the whole"
        )
        words = ", ".join(f"{title} {r:.2f}" for title, r in found.items())
        parts.append(
            f"Size of a client's last sub-network against the divergence of its labels (the "
            f"paper's Fig. 8 finds a negative correlation); correlation: {words}.\n\n"
            f"![Size of sub-networks against divergence]({path.name})"
        )
    ratios = {line.row.title: _ratios(line) for line in lines}
    ratios = {title: groups for title, groups in ratios.items() if groups}
    if ratios:
        path = figures.keep_ratios(ratios, folder / f"{stem}-{results.table.name}-keep.png")
        parts.append(
            "Share of units that clients keep, layer by layer, in their last round (the paper's "
            f"Fig. 5 samples deep layers most):\n\n![Keep ratios of layers]({path.name})"
        )
    return parts


def _ratios(line: measured.Line) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in line.finished:
        for group, values in measured.own_ratios(one, "ratio").items():
            found.setdefault(group, []).extend(values)
    return found


EXPLAINED = """\
Acc_G is the accuracy of the global model on all samples of the clients held out, in percent;
Acc_L the mean over clients of the accuracy of a client's own network on its own test part,
before merging, in its most recent round. The best 5-round mean is the largest mean of Acc_G
over five successive rounds; rounds to a target count to the first such mean that reaches it.
±: sample standard deviation over seeds. Parameters (biases and norms included) and operations
(multiply-accumulates) are means over the clients of the last round, with their share of the
whole network's. Seconds: median over clients of the wall-clock time of local training on one
core. A dash: it does not apply, or was not reached."""


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
    words = page.command("benchmarks/papers/adds.py", sys.argv[1:])
    title = "ADDS, scaled down" if options.scale == "small" else "ADDS"
    if options.validate:
        title += ": training clients alone"
    parts = [page.heading(title, words), EXPLAINED]
    parts += [section(one, out.parent, out.stem) for one in tables]
    page.write(out, [*parts, page.missing_text(missing)], TRIED)
    print(out)


def run(options: argparse.Namespace) -> tuple[list[Results], dict[str, str]]:
    """Runs what is not finished; returns what is, and which cells are missing and why."""
    small = options.scale == "small"
    names = options.tables or (tuple(SMALL) if small else tuple(SETS))
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
    missing = common.run(
        todo, jobs=options.jobs, local=options.jobs > 0, minutes=options.minutes, say=say
    )
    found = [measured.results(one, some) for one, some in zip(tables, cells, strict=True)]
    return [one for one in found if one is not None], missing


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        help="train and hold out among the training clients alone, to choose settings by",
    )
    add("--cache", type=Path, help="where cells are kept; cells/adds-SCALE by default")
    add("--jobs", type=int, help="cells at a time, a core each; 0: one by one on Ray")
    add("--minutes", type=float, default=90.0, help="no cell begins that would end later")
    add("--out", type=Path, help="the page; figures go beside it")
    add("--json", help="a file for all figures; - prints them")
    options = arguments.parse_args(words)
    small = options.scale == "small"
    if options.data is None:
        if "SUBFLEET_DATA" not in os.environ:
            arguments.error("--data is missing: give the folder of the data sets")
        options.data = Path(os.environ["SUBFLEET_DATA"])
    if options.jobs is None:
        options.jobs = (os.cpu_count() or 1) if small else 0
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.tables = _chosen(
        arguments, "--tables", options.tables, tuple(SMALL) if small else tuple(SETS)
    )
    options.rows = _chosen(arguments, "--rows", options.rows, tuple(TITLES))
    options.cache = options.cache or Path("cells") / f"adds-{options.scale}"
    options.tries = [_tried(arguments, text) for text in options.tries]
    if options.out is None:
        page = ROOT / "docs" / "results" / ("adds.md" if small else "adds-paper.md")
        options.out = options.cache / "validation.md" if options.validate else page
    return options


def _tried(arguments: argparse.ArgumentParser, text: str) -> tuple[str, list[str]]:
    row, _, words = text.partition(":")
    if row not in TITLES or "=" not in words:
        arguments.error(f"--try {text}: not of the form ROW:KEY=VALUE, such as stc:p_up=0.01")
    return row, words.split(",")


def _chosen(
    arguments: argparse.ArgumentParser, option: str, given: str | None, known: Sequence[str]
) -> list[str] | None:
    if given is None:
        return None
    chosen = given.split(",")
    if wrong := [one for one in chosen if one not in known]:
        arguments.error(f"{option}: {wrong[0]!r} is none of {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    main()
