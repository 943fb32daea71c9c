"""Commands about super-networks: what there is, what sub-networks cost, why units are kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_catalog import first_line, print_rows
from subfleet.cli_support import DebugOption, JsonOption, loading, print_json, print_table, reported
from subfleet.core.errors import InputError

if TYPE_CHECKING:
    from subfleet.core.supernet import SuperNetwork
    from subfleet.describe import Description

models_app = typer.Typer(
    help="Super-networks: what there is, and what sub-networks cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ModelName = Annotated[str, typer.Argument(help="A name, or your own 'module:attribute'.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a=b", help="Set one of the model's own keys; repeatable."),
]
_OPTION = re.compile(r"\s*[\w.-]+\s*=")
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


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
    name: ModelName,
    options: ModelOptions = None,
    width: Annotated[
        float | None, typer.Option(metavar="W", help="The sub-network of this width, e.g. 0.5.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="flops=30M", help="The largest sub-network within flops=N and/or params=N."
        ),
    ] = None,
    depth: Annotated[
        float, typer.Option(metavar="D", help="The share of skippable blocks to keep, if any.")
    ] = 1.0,
    kernel: Annotated[
        int | None, typer.Option(metavar="K", help="The largest kernel, if kernels may shrink.")
    ] = None,
    convention: Annotated[
        str, typer.Option(metavar="C", help="How to count: macs, adds, dwnp or profiler.")
    ] = "macs",
    count_bias: Annotated[
        bool, typer.Option("--count-bias", help="Count biases among the weights.")
    ] = False,
    count_norm: Annotated[
        bool, typer.Option("--count-norm", help="Count norms among the weights.")
    ] = False,
    batch: Annotated[
        int, typer.Option(metavar="B", help="Samples of a batch, for the training memory.")
    ] = 20,
    optimizer: Annotated[
        str, typer.Option(metavar="O", help="sgd, momentum or adam, for the training memory.")
    ] = "sgd",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show units, parameters, multiply-accumulates, wire bytes and training memory.

    `params` are all that a client trains; `weights` leave out biases and norms, as papers
    count, and are what a budget `params=N` limits. A budget counts by the convention
    macs, whatever is shown.

    \b
    Examples:
      subfleet models describe small_cnn
      subfleet models describe mobilenet_v2 --width 0.5 --batch 32 --optimizer adam
      subfleet models describe vgg --budget flops=30M,params=1M --json
      subfleet models describe my_module:my_model --set 'input_shape=[3, 32, 32]'
    """
    loading()
    from subfleet.core.budget import Budget, largest_width, width_map
    from subfleet.describe import describe

    net = build(name, options or [])
    if width is not None and budget is not None:
        raise InputError("--width and --budget exclude each other; give one of them")
    if budget is not None:
        limits = Budget(**parse_budget(budget))
        width = largest_width(net, limits, depth=depth, kernel=kernel)
    width = 1.0 if width is None else width
    shown = describe(
        net,
        width_map(net, width, depth=depth, kernel=kernel),
        convention=convention,  # pyright: ignore[reportArgumentType]
        count_bias=count_bias,
        count_norm=count_norm,
        batch=batch,
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]
    )
    if as_json:
        head = {"name": name, "convention": convention}
        total = {"width": width, "depth": depth, "kernel": kernel} | shown.total
        print_json(head | dataclasses.asdict(shown) | {"total": total})
        return
    found = f"{name} at width {width:.4g}"
    found += f", depth {depth:g}" if net.stages else ""
    found += f", kernel {kernel}" if net.space.kernels and kernel else ""
    for note in _notes(net, depth, kernel):
        typer.echo(f"note: {note}", err=True)
    _print_tables(shown, f"{found}, the largest within {budget}" if budget else found)


@models_app.command("explain")
@reported
def models_explain(
    name: ModelName,
    options: ModelOptions = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show each layer's unit groups, or why all its units are kept in every sub-network.

    \b
    Examples:
      subfleet models explain resnet56
      subfleet models explain my_module:my_model --json
    """
    loading()
    from subfleet.describe import reasons

    rows = reasons(build(name, options or []))
    if not as_json:
        rows = [row | {"groups": ", ".join(row["groups"])} for row in rows]
    print_rows(rows, as_json)


def build(name: str, options: list[str]) -> SuperNetwork:
    """The super-network of a name with options `a=b`; raises `InputError` for anything else."""
    from subfleet import registry
    from subfleet.config import Experiment
    from subfleet.core.supernet import SuperNetwork

    for option in options:
        if not _OPTION.match(option):
            raise InputError(
                f"--set {option}: is not of the form key=value; {_example_of_set(name)}"
            )
    overrides = [f"model.{option}" for option in options]
    tables = Experiment(data={"name": "-"}, model={"name": name}).with_overrides(overrides)
    net = registry.build_model_alone(tables.model)
    if not isinstance(net, SuperNetwork):
        raise InputError(
            f"model {name!r} makes a {type(net).__name__}, which is no super-network; let it "
            "return subfleet.models.supernet(module, example_batch)"
        )
    return net


def _example_of_set(name: str) -> str:
    """What `--set` may be for a model, e.g. one of its defaults."""
    from subfleet import registry

    factory = registry.model_factory(name)
    known = registry.option_names(factory, registry.MODEL_GIVEN)
    examples = registry.examples(factory)
    example = next((f"{key}={examples[key]}" for key in known if key in examples), "width=0.5")
    return f"write e.g. --set '{example}'; {name} has {', '.join(known) or 'no keys'}"


def _notes(net: SuperNetwork, depth: float, kernel: int | None) -> Iterator[str]:
    """What the tables do not say of a sub-network."""
    for told, elastic, what in (
        (depth < 1, net.stages, "depth"),
        (kernel is not None, net.space.kernels, "kernel"),
    ):
        if told and not elastic:
            yield f"--{what} has no effect: {net.name} is not elastic in it"
    least = {min(sizes) for sizes in net.space.kernels.values()}
    if kernel is not None and (larger := sorted(size for size in least if size > kernel)):
        sizes = " and ".join(str(size) for size in larger)
        yield f"--kernel {kernel} is below the smallest there is; layers have {sizes} instead"
    if net.uncounted:
        yield f"not counted: {', '.join(net.uncounted)}"


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
        if key in limits:
            raise InputError(f"--budget {text}: {key} stands there twice; give one limit of it")
        limits[key] = round(limit)
    return limits


# --- text -----------------------------------------------------------------------------------------


def _print_tables(shown: Description, title: str) -> None:
    # A budget limits the weights and the multiply-accumulates: these go last, or never.
    hide = ["kind", "wire_bytes", "inputs", "weights"]
    print_table(layer_rows(shown), title=title, hide=hide)
    if shown.groups:
        print_table(shown.groups)
    memory = dict(shown.memory)
    batch, optimizer, peak = (memory.pop(key) for key in ("batch", "optimizer", "total"))
    sizes = {
        "on the wire, each way": shown.total["wire_bytes"],
        "  the index map": shown.total["map_bytes"],
        f"training memory, batch {batch}, {optimizer}": peak,
        **{f"  {part}": size for part, size in memory.items()},
    }
    print_table([{"what": what, "bytes": size} for what, size in sizes.items()])


def layer_rows(shown: Description) -> list[dict[str, Any]]:
    """The layers and their total as they are printed: `kept/of`, or `of` where all are kept."""
    total = {"layer": "total", "kind": "", "inputs": 0, "inputs_of": 0} | shown.total
    rows = []
    for row in [*shown.layers, total]:
        both = {"inputs": ("inputs", "inputs_of"), "units": ("units", "of")}
        fractions = {key: _fraction(row[kept], row[of]) for key, (kept, of) in both.items()}
        costs = {key: row[key] for key in ("params", "weights", "macs", "wire_bytes")}
        rows.append({"layer": row["layer"], "kind": row["kind"]} | fractions | costs)
    for key in ("inputs", "units"):
        widest = max(len(row[key]) for row in rows)
        for row in rows:
            row[key] = row[key].rjust(widest)
    return rows


def _fraction(kept: int, of: int) -> str:
    return f"{kept}/{of}" if kept != of else str(of or "")
