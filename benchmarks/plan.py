"""What a paper-size run would need, computed from measured unit costs: no guess but the GPU's.

    subfleet stress --clients 1e6 --cohort 1e2,1e3,1e4 --out runs/stress
    python benchmarks/reduce.py --json reduce.json
    python benchmarks/plan.py runs/stress/stress.json reduce.json [--gpus 8,64] [--json FILE]

Unit costs, all of one core:

    c_client   the coordinator's processor seconds a client of the cohort: the slope between the
               smallest and the largest cohort of the ladder's largest population
    c_round    what of them is left for a round of no clients
    c_bundle   the same for a call to a host, its answer included: the slope of the tree's
               figures in reduce.json over the number of calls, less c_client
    c_byte     seconds of merging on the coordinator for each byte added
    c_server   seconds of the server step for each byte of the sum

With P parameters, K clients a round of R rows of r bytes each, G GPUs on n nodes, B bundles
(`subfleet.platform.bundles.auto_count`), M merges of them on hosts, S = 8 P bytes of a sum:

    tree to a node          4 P                       once a round, shared by the node's hosts
    sums moved, into a node S (B + M - left) (1 - 1/n) / n     left: what the coordinator takes
    sums to the coordinator S left (1 - 1/n)          eight at most, beside its node's share
    rows from the head      K R r (1 - 1/n)           where they are streamed; 0 where nodes read
    coordinator's processor c_round + K c_client + (B + M) c_bundle
                            + (left - 1) S c_byte + S c_server
    training                K / (G rate) * ceil(B / G) G / B     the second factor: uneven shares
    a round                 the largest of training, the calls, and the rows on the network,
                            then the last merges on the hosts, and what only the coordinator does

A million dormant clients are arrays: 4 + 2 + 8 bytes each. `rate`, clients a second on a GPU, is an
assumption and a range. What breaks first is what needs most of a round beside training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from subfleet.models import leaf_cnn
from subfleet.platform.bundles import BACKWARD, MACS_PER_SECOND, STEP_SECONDS, auto_count
from subfleet.platform.merging import GROUP, merges

BATCH = 20
DORMANT_BYTES = 4 + 2 + 8  # last round, tier, place in the list of who trains or is held out
IN_FLIGHT = 2


@dataclass(frozen=True)
class Costs:
    """Measured unit costs, seconds of one core."""

    round_s: float
    client_s: float
    bundle_s: float
    byte_s: float
    server_byte_s: float

    @classmethod
    def of(cls, stress: dict[str, Any], reduce: dict[str, Any]) -> Costs:
        """From a `stress.json` and the JSON of `reduce.py`; ValueError if rungs are missing."""
        done = [rung for rung in stress["rungs"] if rung["status"] == "ok"]
        most = max((rung["clients"] for rung in done), default=0)
        rungs = sorted((r for r in done if r["clients"] == most), key=lambda r: r["cohort"])
        if len(rungs) < 2:
            raise ValueError(
                f"the ladder has {len(rungs)} rungs at {most:,} clients; measure two cohorts at "
                "least, e.g. --cohort 1e2,1e4"
            )
        small, large = rungs[0], rungs[-1]
        client_s = _slope(small["cohort"], large["cohort"], *_cpu(small, large))
        few, many = reduce["rows"][0], reduce["rows"][-1]
        if few["partials"] == many["partials"]:
            raise ValueError("reduce.json has one number of partial sums; measure two, e.g. 8,512")
        calls = [n + len(merges(n, 1)[0]) for n in (few["partials"], many["partials"])]
        sum_bytes = 8 * reduce["parameters"]
        left = len(merges(many["partials"], 1)[1])
        return cls(
            round_s=max(0.0, small["coordinator_cpu_s"] - small["cohort"] * client_s),
            client_s=client_s,
            bundle_s=max(0.0, _slope(*calls, *_cpu(few["tree"], many["tree"])) - client_s),
            byte_s=many["tree"]["merging_s"] / (max(1, left - 1) * sum_bytes),
            server_byte_s=many["tree"]["server_s"] / sum_bytes,
        )


def _cpu(*measured: dict[str, Any]) -> tuple[float, ...]:
    return tuple(one["coordinator_cpu_s"] for one in measured)


def _slope(x0: float, x1: float, y0: float, y1: float) -> float:
    """The slope of the line through two points, 0 where noise made it fall.

    >>> _slope(100, 300, 1.0, 2.0)
    0.005
    """
    return max(0.0, (y1 - y0) / (x1 - x0))


@dataclass(frozen=True)
class Site:
    """The run and the machines: what the formulas take besides unit costs."""

    clients: int = 1_000_000
    cohort: int = 10_000
    rows: int = 100  # of a client
    row_bytes: int = 784
    params: int = 6_603_710  # LEAF's CNN, every client at full width: the most there can be
    macs: int = 17_377_280  # of one row's forward pass
    gpus: int = 8
    node_gpus: int = 8
    rate: float = 1000.0  # clients a second and GPU: an assumption
    network: float = 1.25e9  # bytes a second into and out of a node: 10 Gbit/s

    @property
    def nodes(self) -> int:
        """Nodes with GPUs; the coordinator is on one of them."""
        return -(-self.gpus // self.node_gpus)


def needs(site: Site, costs: Costs) -> dict[str, Any]:
    """What a round of the site needs: bytes, seconds, and what breaks first."""
    steps = math.ceil(site.rows / BATCH)
    nominal = steps * STEP_SECONDS + BACKWARD * site.macs * site.rows / MACS_PER_SECOND
    bundles = auto_count(site.cohort, site.cohort * nominal)
    made, left = merges(bundles, round=1)
    size, away = 8 * site.params, 1 - 1 / site.nodes
    calls_s = (bundles + len(made)) * costs.bundle_s
    last_s = (len(left) - 1) * size * costs.byte_s
    server_s = size * costs.server_byte_s
    alone_s = costs.round_s + site.cohort * costs.client_s + last_s + server_s
    rows_out = site.cohort * site.rows * site.row_bytes * away
    sums_in = size * (bundles + len(made) - len(left)) * away / site.nodes
    uneven = math.ceil(bundles / site.gpus) * site.gpus / bundles
    training_s = site.cohort / (site.gpus * site.rate) * uneven
    # The merges that wait for the last bundle: one a level, its sums fetched and added.
    once_s = GROUP * size * away / site.network + (GROUP - 1) * size * costs.byte_s
    tail_s = levels(bundles) * once_s
    others = {
        "the coordinator's processor": calls_s + alone_s,
        "rows streamed from the coordinator's node": rows_out / site.network,
        "sums into the coordinator's node": (sums_in + size * len(left) * away) / site.network,
    }
    round_s = max(training_s, calls_s, rows_out / site.network) + tail_s + alone_s
    # Groups that are open while hosts have two bundles each at hand.
    waiting = GROUP * (math.ceil(IN_FLIGHT * site.gpus / GROUP) + 1)
    first = max(others, key=lambda name: others[name])
    return {
        **asdict(site),
        "nodes": site.nodes,
        "bundles": bundles,
        "merges": len(made),
        "tree_to_node_bytes": 4 * site.params,
        "sums_made_on_node_bytes": size * bundles // site.nodes,
        "sums_into_node_bytes": int(sums_in),
        "sums_to_coordinator_bytes": size * len(left),
        "rows_from_head_bytes": int(rows_out),
        "object_store_bytes": size * min(waiting, bundles) // site.nodes + 4 * site.params,
        "dormant_bytes": site.clients * DORMANT_BYTES,
        "training_s": training_s,
        "uneven": uneven,
        "coordinator_s": calls_s + alone_s,
        "round_s": round_s,
        "coordinator_load": (calls_s + alone_s) / round_s,
        "breaks_first": first,
        "breaks_first_s": others[first],
        # So many GPUs train a round in the time that the first other thing takes.
        "gpus_that_pay": site.cohort / (site.rate * others[first]),
    }


def levels(bundles: int) -> int:
    """How many merges on hosts a sum goes through.

    >>> levels(8), levels(16), levels(128)
    (0, 1, 2)
    """
    return 0 if bundles <= GROUP else 1 + levels(-(-bundles // GROUP))


ROWS = {
    "bundles, merges on hosts": lambda f: f"{f['bundles']}, {f['merges']}",
    "tree to each node": lambda f: _mb(f["tree_to_node_bytes"]),
    "sums made on a node": lambda f: _mb(f["sums_made_on_node_bytes"]),
    "sums into a node, over the network": lambda f: _mb(f["sums_into_node_bytes"]),
    "sums to the coordinator": lambda f: _mb(f["sums_to_coordinator_bytes"]),
    "rows out of the coordinator's node, streamed": lambda f: _mb(f["rows_from_head_bytes"]),
    "object store of a node, sums that wait": lambda f: _mb(f["object_store_bytes"]),
    "dormant clients, coordinator": lambda f: _mb(f["dormant_bytes"]),
    "training": lambda f: f"{f['training_s']:.2f} s",
    "coordinator's processor": lambda f: f"{f['coordinator_s']:.2f} s",
    "a round": lambda f: f"{f['round_s']:.2f} s",
    "1,000 rounds": lambda f: f"{f['round_s'] / 3.6:.1f} h",
    "coordinator's load": lambda f: f"{f['coordinator_load']:.0%}",
    "breaks first": lambda f: f"{f['breaks_first']} ({f['breaks_first_s']:.2f} s)",
    "GPUs beyond which it governs": lambda f: f"{f['gpus_that_pay']:.0f}",
}


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a column for each number of GPUs and rate."""
    heads = [f"{f['gpus']} GPUs, {f['rate']:,.0f}/s each" for f in found]
    lines = [f"| a round | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    lines += [f"| {name} | {' | '.join(map(cell, found))} |" for name, cell in ROWS.items()]
    return "\n".join(lines)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The options; ends with status 2 for wrong ones."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("stress", type=Path, help="the ladder's stress.json")
    arguments.add_argument("reduce", type=Path, help="the JSON of reduce.py")
    arguments.add_argument("--gpus", default="8,64")
    arguments.add_argument("--rate", default="200,2000", help="clients/s on a GPU, assumed")
    arguments.add_argument("--clients", type=float, default=1e6)
    arguments.add_argument("--cohort", type=float, default=1e4)
    arguments.add_argument("--gbit", type=float, default=10.0, help="of a node's network")
    arguments.add_argument("--json", help="a file for the figures; - prints them, and no table")
    options = arguments.parse_args(words)
    for name in ("gpus", "rate"):
        text = getattr(options, name)
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            arguments.error(f"--{name} {text}: give whole numbers from 1 up, e.g. 8,64")
        setattr(options, name, [int(part) for part in parts])
    for name in ("clients", "cohort", "gbit"):
        if not getattr(options, name) > 0:
            arguments.error(f"--{name} {getattr(options, name):g}: give a number above 0")
    return options


def main() -> None:
    options = parsed()
    try:
        files = (json.loads(path.read_text()) for path in (options.stress, options.reduce))
        costs = Costs.of(*files)
    except KeyError as error:
        sys.exit(f"{options.stress}, {options.reduce}: one of them lacks {error}; measure it again")
    except (OSError, ValueError) as error:
        sys.exit(f"{options.stress}, {options.reduce}: {error}")
    net = leaf_cnn()
    site = Site(
        clients=int(options.clients),
        cohort=int(options.cohort),
        params=sum(value.numel() for value in net.init(0).values()),
        macs=net.cost().macs,
        network=options.gbit / 8 * 1e9,
    )
    found = [
        needs(replace(site, gpus=gpus, rate=float(rate)), costs)
        for gpus in options.gpus
        for rate in options.rate
    ]
    if options.json == "-":
        print(json.dumps({"costs": asdict(costs), "plans": found}))
        return
    if options.json:
        text = json.dumps({"costs": asdict(costs), "plans": found}, indent=2)
        Path(options.json).write_text(text + "\n")
    for name, seconds in asdict(costs).items():
        print(f"{name}: {seconds:.3g}")
    print(table(found))


if __name__ == "__main__":
    main()
