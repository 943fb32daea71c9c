"""Commands that show what there is: algorithms, models and their costs, data sets."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_support import DebugOption, JsonOption, loading, print_json, print_table, reported
from subfleet.core.errors import InputError

if TYPE_CHECKING:
    from subfleet.core.supernet import SuperNetwork

models_app = typer.Typer(
    help="Super-networks: what there is, and what sub-networks cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


def first_line(thing: Any) -> str:
    """What a docstring says first."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as JSON or as a table."""
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


@reported
def algorithms(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the algorithms with their papers and options.

    \b
    Examples:
      subfleet algorithms
      subfleet algorithms --json
    """
    loading()
    from subfleet import registry

    rows = [
        {
            "name": name,
            "paper": cls.paper,
            "options": ", ".join(registry.option_names(cls)[1:]),
            "what": first_line(cls),
        }
        for name, cls in sorted(registry.algorithms().items())
    ]
    print_rows(rows, as_json)


@models_app.command("list")
@reported
def models_list(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the super-networks with their costs at full size.

    Parameters are all that a client trains, biases and norms included.

    \b
    Examples:
      subfleet models list --json
    """
    loading()
    from subfleet import registry
    from subfleet.core.units import IndexMap

    rows = []
    for name, factory in sorted(registry.models().items()):
        net = factory()
        rows.append(
            {
                "name": name,
                "params": net.stored_params(IndexMap.full(), "local"),
                "macs": net.cost().macs,
                "options": ", ".join(registry.option_names(factory, registry.MODEL_GIVEN)),
                "what": first_line(factory),
            }
        )
    print_rows(rows, as_json)


@models_app.command("describe")
@reported
def models_describe(
    name: Annotated[str, typer.Argument(help="A name, or your own 'module:attribute'.")],
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a=b", help="Set one of the model's own keys; repeatable."),
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="W", help="The sub-network of this width, e.g. 0.5.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="flops=30M", help="The largest sub-network within flops=N and/or params=N."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show units, parameters, multiply-accumulates and wire bytes, layer by layer.

    `params` are all that a client trains; `weights` leave out biases and norms, as papers
    count, and are what a budget `params=N` limits.

    \b
    Examples:
      subfleet models describe small_cnn
      subfleet models describe small_cnn --width 0.5
      subfleet models describe vgg --budget flops=30M,params=1M --json
    """
    loading()
    net = _model(name, options or [])
    layers, total = describe(net, _chosen_width(net, width, budget))
    if as_json:
        print_json({"name": name, "layers": layers, "total": total})
        return
    print_table(layers)
    print_table([total])


def _model(name: str, options: list[str]) -> SuperNetwork:
    from subfleet import registry
    from subfleet.config import Experiment

    overrides = [f"model.{option}" for option in options]
    tables = Experiment(data={"name": "-"}, model={"name": name}).with_overrides(overrides)
    return registry.build_model(tables.model)


def _chosen_width(net: SuperNetwork, width: float | None, budget: str | None) -> float:
    from subfleet.core.budget import Budget, largest_width

    if width is not None and budget is not None:
        raise InputError("--width and --budget exclude each other; give one of them")
    if budget is not None:
        return largest_width(net, Budget(**parse_budget(budget)))
    return 1.0 if width is None else width


def parse_budget(text: str) -> dict[str, int]:
    """`flops=30M,params=1.5M` as numbers; K, M and G stand for 10^3, 10^6 and 10^9.

    >>> parse_budget("flops=30M,params=1.5k")
    {'flops': 30000000, 'params': 1500}

    Raises:
        InputError: It is not of that form.
    """
    limits: dict[str, int] = {}
    for part in text.split(","):
        key, _, number = (piece.strip() for piece in part.partition("="))
        factor = _SUFFIXES.get(number[-1:].lower(), 1)
        digits = number if factor == 1 else number[:-1]
        try:
            limit = float(digits) * factor
        except ValueError:
            limit = float("nan")
        if key not in ("flops", "params") or not 1 <= limit < 1e18:
            raise InputError(
                f"--budget {text}: {part.strip()!r} is not flops=N or params=N with N of at "
                "least 1; write e.g. flops=30M"
            )
        limits[key] = round(limit)
    return limits


def describe(net: SuperNetwork, width: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each layer of the sub-network of a width, and the row of its totals.

    `params` are all that is trained; `weights` and multiply-accumulates are what budgets
    count (no biases, no norms); wire bytes hold every tensor that a message carries.
    """
    from subfleet.core.bindings import extent
    from subfleet.core.budget import width_map
    from subfleet.core.cost import BYTES_PER_ENTRY, cost_table

    index_map = width_map(net, width)
    counts = net.space.counts_by_group(index_map)
    entries: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for tensor, shape in net.space.slice_shapes(index_map).items():
        layer = tensor.rpartition(".")[0]
        entries[layer] += math.prod(shape)
        trained[layer] += math.prod(shape) if tensor in net.parameters else 0
    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "units": extent(layer.outputs, counts),
            "of": extent(layer.outputs, dict(net.space.groups)),
            "params": trained[layer.name],
            "weights": cost.params,
            "macs": cost.macs,
            "wire_bytes": entries[layer.name] * BYTES_PER_ENTRY,
        }
        for layer, cost in cost_table(net.layers, net.space, index_map)
    ]
    cost, wire = net.cost(index_map), net.wire_bytes(index_map)
    total = {
        "width": width,
        "units": sum(counts.values()),
        "of": net.space.num_units,
        "params": net.stored_params(index_map, "local"),
        "weights": cost.params,
        "macs": cost.macs,
        "wire_bytes": wire.total,
        "map_bytes": wire.map,
    }
    return rows, total
