"""What the functions of an author's program hand back, checked where the platform calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult


def stepped(step: Callable[..., Any], returned: Any) -> tuple[Any, Mapping[str, Tensor]]:
    """A `StepProgram`'s (local, metrics); InputError names the function for anything else."""
    match returned:
        case (local, Mapping() as metrics) if all(isinstance(v, Tensor) for v in metrics.values()):
            return local, metrics
        case (_, Mapping() as metrics):
            wrong = next(name for name, v in metrics.items() if not isinstance(v, Tensor))
            got = f"the metric {wrong!r} as {_shown(metrics[wrong])}"
        case _:
            got = _shown(returned)
    raise InputError(
        f"{_name(step)} returned {got}; a StepProgram's step returns two things, (local, metrics): "
        "the client's next state, in the form that init gave it, and a dict of scalar tensors, "
        'such as {"loss": loss} or {}'
    )


def result(made_by: Callable[..., Any], returned: Any) -> ClientResult:
    """A client's result, with its trace as arrays of its own.

    InputError names the function that returned anything else.
    """
    if isinstance(returned, ClientResult):
        if returned.trace is None:
            return returned
        return replace(returned, trace=_traced(made_by, returned.trace))
    raise InputError(
        f"{_name(made_by)} returned {_shown(returned)}; it is to return a ClientResult, such as "
        "ClientResult(update=params)"
    )


_OF_THE_ROW = ("round", "client")  # columns that the platform puts before those of a trace
_LARGEST = np.iinfo(np.int64).max


def _traced(made_by: Callable[..., Any], trace: Any) -> dict[str, np.ndarray]:
    """A trace's columns as 1-D arrays: bool, int64, float64 or text."""
    if not isinstance(trace, Mapping):
        raise InputError(
            f"{_name(made_by)} returned {_shown(trace)} as trace; it is to be a dict of columns, "
            'such as {"step": [0, 1], "accuracy": [0.3, 0.4]}'
        )
    columns = {}
    for name, values in trace.items():
        if not isinstance(name, str) or name in _OF_THE_ROW:
            raise InputError(
                f"{_name(made_by)}: the trace's column {name!r} cannot be called so; give a string "
                f"other than {' and '.join(map(repr, _OF_THE_ROW))}, which are filled in"
            )
        columns[name] = _column(made_by, name, values)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise InputError(
            f"{_name(made_by)}: the trace's columns differ in length ({given}); give each one "
            "value a row"
        )
    return columns


def _column(made_by: Callable[..., Any], name: str, values: Any) -> np.ndarray:
    try:
        column = np.array(values)
    except (TypeError, ValueError, RuntimeError):  # ragged, or on another device
        column = np.array(None)
    # One type for each kind: a column is then the same in the clients that narrow it and others.
    match column.ndim, column.dtype.kind:
        case 1, "b":
            return column
        case 1, "i" | "u" if not (column > _LARGEST).any():
            return column.astype(np.int64)
        case 1, "f":
            return column.astype(np.float64)
        case 1, "U" if all(isinstance(value, str) for value in values):
            return column
    raise InputError(
        f"{_name(made_by)}: the trace's column {name!r} is {_shown(values)}; it is to hold numbers "
        "alone or strings alone, one a row, whole numbers below 2**63"
    )


def _shown(value: Any) -> str:
    """A value by its type, and what is in it.

    >>> _shown({"fc.weight": 1}), _shown((1, 2, 3)), _shown(None)
    ("a dict of 'fc.weight'", 'a tuple of 3', 'None')
    """
    if value is None:
        return "None"
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        keys = [repr(key) for key in list(value)[:3]] + ["..."] * (len(value) > 3)
        return f"{kind} of {', '.join(keys) or 'nothing'}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def _name(function: Callable[..., Any]) -> str:
    """How an author knows a function: `Sam.step`, with the algorithm's own class in front."""
    while isinstance(function, partial):
        function = function.func
    if (own := getattr(function, "__self__", None)) is not None:
        return f"{type(own).__name__}.{function.__name__}"
    return getattr(function, "__qualname__", repr(function)).replace(".<locals>", "")
