"""What the page of ADDS's tables says: computed from the cells, in tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import figures
import measured
import numpy as np
from adds_numbers import PAPER_TARGETS, TEXTS
from correlation import correlation, partial_correlation
from figures import Points
from measured import Line, Results

EXPLAINED = """\
Acc_G is the accuracy of the global model on all samples of the clients held out, in percent:
the mean of the last five rounds, and beside it the largest mean of five successive rounds.
That one is a maximum over the test curve, chosen on the test part, and flatters whoever swings.
Acc_L is the mean over clients of the accuracy of a client's own network on its own test part,
before merging, in its most recent round. Rounds to a target count to the first mean of five
that reaches it. ±: sample standard deviation over seeds. Parameters (biases and norms included)
and operations (multiply-accumulates) are means over the clients of the last round, with their
share of the whole network's. Seconds: median over clients of the wall-clock time of local
training on one core. A dash: it does not apply, or was not reached.

STC and pFedMe take no momentum. STC's rate on images is therefore 0.1, which is what the other
rows' 0.01 with momentum 0.9 comes to, 0.1 = 0.01 / (1 − 0.9); pFedMe has rates of its own."""


def summary(tables: Sequence[Results]) -> str:
    """What was found, in two lines: the order of methods, and the size of ADDS's sub-networks."""
    if not tables:
        return ""
    orders = [f"{one.table.title}: {_order(one)}" for one in tables]
    sizes = [f"{one.table.title}: {words}" for one in tables if (words := _sizes(one))]
    return (
        f"* Acc_G, last 5 rounds, best first. {'; '.join(orders)}.\n"
        f"* ADDS's sub-networks, share of the parameters. {'; '.join(sizes) or 'None yet'}."
    )


def _order(results: Results) -> str:
    means = {
        line.row.title: statistics.fmean(line.values("acc_global_last_5")) for line in results.lines
    }
    ranked = sorted(means, key=lambda title: -means[title])
    return ", ".join(f"{title} {means[title]:.1f}" for title in ranked)


def _sizes(results: Results) -> str:
    shares = {
        line.row.title: 100 * statistics.fmean(line.values("params")) / results.full["params"]
        for line in _adds(results)
    }
    return ", ".join(f"{title} {share:.1f} %" for title, share in shares.items())


def _adds(results: Results) -> list[Line]:
    """The rows in which clients choose their own network."""
    return [line for line in results.lines if line.row.name.startswith("adds")]


def section(results: Results, folder: Path, stem: str, small: bool = True) -> str:
    """A table's part of the page; draws its figures into `folder`."""
    name, full = results.table.name, results.full
    parts = [f"## {results.table.title}", results.table.about]
    parts.append(measured.table_text(results, measured.accuracy_columns()))
    sizes = measured.size_columns(full)
    parts.append(measured.table_text(results, sizes[1::2] if name in TEXTS else sizes))
    parts.append(measured.table_text(results, measured.cost_columns(results)))
    parts.append(measured.table_text(results, measured.rounds_columns(results)))
    if name in TEXTS:
        words = " / ".join(f"{100 * target:.0f}" for target in PAPER_TARGETS[name])
        parts.append(f"The paper's rounds are to {words} %." + (_TARGETS if small else ""))
    for key, words in (("acc_global", "Accuracy of the global model"), ("loss_global", "Its loss")):
        path = figures.curves(results, key, folder / f"{stem}-{name}-{key}.png")
        parts.append(f"![{words} over rounds, mean over seeds]({path.name})")
    path = figures.local_histograms(results, folder / f"{stem}-{name}-acc-local.png")
    if path is not None:
        parts.append(f"![Clients' own accuracies]({path.name})")
    parts += _divergence(results, folder / f"{stem}-{name}-divergence.png")
    parts += _kept(results, folder / f"{stem}-{name}-keep.png")
    return "\n\n".join(part for part in parts if part)


_TARGETS = (
    " They are out of reach of these samples; the targets here were picked from one FedAvg run on "
    "them."
)


def _divergence(results: Results, path: Path) -> list[str]:
    """The paper's Figure 8, and what of it is not merely that small clients take few steps."""
    panels = {line.row.title: _points(line, results.full["params"]) for line in _adds(results)}
    if not panels:
        return []
    figures.scatter(
        panels,
        path,
        x="normalised JSD of a client's labels",
        y="parameters, % of the whole",
        colour="local steps",
    )
    headings = ("", "all clients", "given the steps", "clients of median steps or more")
    rows = [_correlations(title, points) for title, points in panels.items()]
    return [
        "Size of a client's last sub-network against the divergence of its labels: the paper's "
        "Fig. 8 finds a negative correlation. Here it is confounded where clients with few samples "
        "have the more divergent labels: they take few local steps, after which the penalty has "
        "removed little, and that alone makes a positive correlation. The second column is "
        "therefore the partial correlation given the number of steps; the third that of the "
        "clients with the median number of steps or more, how many these are in brackets; the "
        "last says how far steps and divergence go together. Points are coloured by local steps.",
        measured.markdown((*headings, "steps and divergence"), rows),
        f"![Size of sub-networks against divergence, coloured by steps]({path.name})",
    ]


def _points(line: Line, full: float) -> Points:
    divergences = np.concatenate([measured.divergences(one) for one in line.finished])
    params = np.concatenate([one.clients.params for one in line.finished])
    steps = np.concatenate([one.clients.steps for one in line.finished])
    return Points(divergences, 100 * params / full, steps)


def _correlations(title: str, points: Points) -> list[str]:
    divergence, size, steps = points
    many = steps >= np.median(steps)
    found = (
        correlation(divergence, size),
        partial_correlation(divergence, size, steps),
        correlation(divergence[many], size[many]),
        correlation(steps, divergence),
    )
    words = ["–" if value != value else f"{value:.2f}" for value in found]
    words[2] += f" ({many.sum()} of {len(steps)})"
    return [title, *words]


def _kept(results: Results, path: Path) -> list[str]:
    """The paper's Figure 5."""
    shares = {line.row.title: _shares(line, results) for line in _adds(results)}
    shares = {title: groups for title, groups in shares.items() if groups}
    if not shares:
        return []
    figures.keep_ratios(shares, path)
    return [
        "Share of units that clients keep, layer by layer, in their last round (the paper's "
        "Fig. 5 samples deep layers most):",
        f"![Share of units kept of each layer]({path.name})",
    ]


def _shares(line: Line, results: Results) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in line.finished:
        for group, values in measured.kept_shares(one, results.units).items():
            found.setdefault(group, []).extend(values)
    return found
