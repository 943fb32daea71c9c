"""Pydantic's findings, said as this project says them: key, value, bound, remedy."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from subfleet.core.errors import did_you_mean

_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 63 bits",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def explain(error: ValidationError, root: type[BaseModel], given: dict[str, Any]) -> str:
    """One line for one finding; several are counted and listed below each other."""
    lines = [_line(detail, root, given) for detail in error.errors(include_url=False)]
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines)


def _line(detail: ErrorDetails, root: type[BaseModel], given: dict[str, Any]) -> str:
    place = detail["loc"]
    key = dotted(place)
    if detail["type"] == "extra_forbidden":
        return _unknown_key(place, root)
    field = field_at(root, place)
    if detail["type"] == "missing":
        return f"{key} is missing; {_remedy(field)}"
    context = {name: _shown_bound(value) for name, value in detail.get("ctx", {}).items()}
    if detail["type"] == "value_error":
        # From a validator of ours: the message already names values and remedy.
        return f"{key}: {context['error']}"
    bound = _BOUNDS.get(detail["type"], "{message}").format(message=detail["msg"], **context)
    return f"{key} = {_shown(detail['input'])}: {bound}; {_remedy(field)}"


def dotted(place: tuple[int | str, ...]) -> str:
    """The key as a user would write it.

    >>> dotted(("fleet", "tiers", 1, "share"))
    'fleet.tiers[1].share'
    """
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shown_bound(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _remedy(field: FieldInfo | None) -> str:
    if field is None:
        return "correct it"
    words = field.description or "correct it"
    default = field.default
    if default in (PydanticUndefined, None):
        return words
    return f"{words} (default {_shown(default)})"


def _unknown_key(place: tuple[int | str, ...], root: type[BaseModel]) -> str:
    *parents, name = place
    table = model_at(root, tuple(parents))
    known = list(table.model_fields) if table else []
    kind = "table" if not parents else "key"
    elsewhere = [
        f"{other}.{name}"
        for other in root.model_fields
        if (inner := model_at(root, (other,))) and name in inner.model_fields
    ]
    hint = f"did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(str(name), known)
    return f"{dotted(place)}: unknown {kind}; {hint}"


def model_at(root: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model of the table at `place`, or None where no table is."""
    model: type[BaseModel] | None = root
    for part in place:
        if isinstance(part, int):
            continue  # an entry of a list: the list's field already gave the entry's model
        if model is None or part not in model.model_fields:
            return None
        model = _inner_model(model.model_fields[part].annotation)
    return model


def field_at(root: type[BaseModel], place: tuple[int | str, ...]) -> FieldInfo | None:
    """The declaration of the key at `place`, or None where it is a free one."""
    names = [part for part in place if isinstance(part, str)]
    if not names:
        return None
    table = model_at(root, tuple(names[:-1]))
    return table.model_fields.get(names[-1]) if table else None


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if (found := _inner_model(argument)) is not None:
            return found
    return None
