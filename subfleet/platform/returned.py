"""What the functions of an author's program hand back, checked where the platform calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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
    """A client's result; InputError names the function that returned anything else."""
    if isinstance(returned, ClientResult):
        return returned
    raise InputError(
        f"{_name(made_by)} returned {_shown(returned)}; it is to return a ClientResult, such as "
        "ClientResult(update=params)"
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
