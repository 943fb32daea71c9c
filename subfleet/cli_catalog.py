"""The command that lists and describes the algorithms, and what all lists are made of."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_support import DebugOption, JsonOption, loading, print_json, print_table, reported

if TYPE_CHECKING:
    from subfleet.core.algorithm import Algorithm

AlgorithmName = Annotated[
    str | None,
    typer.Argument(help="One to describe: a name, or your own 'module:attribute'."),
]


def first_line(thing: Any) -> str:
    """What a docstring says first."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as JSON or as a table, in a narrow one without what each thing is."""
    if as_json:
        print_json(rows)
    else:
        print_table(rows, hide=["what"])


@reported
def algorithms(
    name: AlgorithmName = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the algorithms with their papers, or describe one.

    \b
    Examples:
      subfleet algorithms
      subfleet algorithms adds
      subfleet algorithms my_module:MyAlgorithm --json
    """
    loading()
    from subfleet import registry

    if name is not None:
        found = described(name, registry.algorithm_class(name))
        if as_json:
            print_json(found)
        else:
            _print(found)
        return
    rows = [described(name, cls) for name, cls in sorted(registry.algorithms().items())]
    if not as_json:
        names = [", ".join(option["name"] for option in row["options"]) for row in rows]
        rows = [row | {"options": options} for row, options in zip(rows, names, strict=True)]
    print_rows(rows, as_json)


def described(name: str, cls: type[Algorithm]) -> dict[str, Any]:
    """An algorithm and its options: each with name, type, default, meaning, and if it is needed."""
    from subfleet import registry

    options = [dataclasses.asdict(option) for option in registry.algorithm_options(cls)]
    return {"name": name, "paper": cls.paper, "options": options, "what": first_line(cls)}


def _print(found: dict[str, Any]) -> None:
    typer.echo(f"{found['name']}: {found['what']}")
    if found["paper"]:
        typer.echo(f"paper: {found['paper']}")
    if not found["options"]:
        typer.echo("no options")
        return
    typer.echo("options, as keys of [algorithm]:")
    print_table(
        [
            {
                "option": option["name"],
                "default": "(needed)" if option["needed"] else _in_toml(option["default"]),
                "type": option["type"],
                "meaning": option["meaning"],
            }
            for option in found["options"]
        ],
        hide=["type"],
    )


def _in_toml(default: Any) -> str:
    """A default as a file would have it, `(none)` for a key that is left out."""
    if default is None:
        return "(none)"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:.6g}" if isinstance(default, float) else repr(default).replace("'", '"')
