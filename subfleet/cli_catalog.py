"""The command that lists the algorithms, and what all lists are made of."""

from __future__ import annotations

import inspect
from typing import Any

from subfleet.cli_support import DebugOption, JsonOption, loading, print_json, print_table, reported


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
