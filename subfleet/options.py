"""The options of a TOML table: their signature checks them, its docstring explains them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from subfleet.config_text import is_plain
from subfleet.core.errors import InputError, did_you_mean

Factory = Callable[..., Any]

_SECTION = re.compile(r"(Options|Attributes|Args):")
_ENTRY = re.compile(r"    (\w+)(?: \([^)]*\))?: *(.*)")


@dataclasses.dataclass(frozen=True)
class Option:
    """A key of a table, as it is shown: `type` in words, `default` None where there is none."""

    name: str
    type: str
    default: Any
    meaning: str
    needed: bool


def option_names(factory: Factory, given: frozenset[str] = frozenset()) -> list[str]:
    """The keys that a factory's table may hold, besides `name`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in signature(factory).items() if p.kind in kinds and n not in given]


def check_options(
    table: str,
    factory: Factory,
    options: Mapping[str, Any],
    given: frozenset[str],
    name: str | None = None,
) -> dict[str, Any]:
    """The options, converted to what the factory's annotations say.

    Args:
        table: The TOML table's name, for messages.
        factory: A class or function.
        options: The table without `name`.
        given: Parameters that the platform fills; they are not options.
        name: What the experiment calls the factory; by default its own name.

    Raises:
        InputError: Naming the first key that is unknown, missing or of the wrong type.
    """
    parameters = signature(factory)
    known = option_names(factory, given)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    name = name or getattr(factory, "__name__", repr(factory))
    for key in options:
        if key in given and key in parameters:
            raise InputError(f"{table}.{key} follows from the run and cannot be set; remove it")
        if key not in known and not takes_all:
            hint = did_you_mean(key, known) if known else "it has no options; remove the key"
            raise InputError(f"{table}.{key}: not an option of {name}; {hint}")
    for key in known:
        if is_needed(parameters[key]) and key not in options:
            handed = (
                f"; the platform hands over {', '.join(sorted(given))} by name" if given else ""
            )
            raise InputError(f"{table}.{key} is missing; {name} needs it{handed}")
    hints = _hints(factory)
    return {
        key: converted(f"{table}.{key}", value, hints[key]) if key in hints else value
        for key, value in options.items()
    }


def examples(factory: Factory) -> dict[str, str]:
    """Defaults of a factory's options as TOML has them, where it can.

    >>> examples(lambda *, channels=(8, 16): None)
    {'channels': '[8, 16]'}
    """
    defaults = {name: p.default for name, p in signature(factory).items()}
    plain = (bool, int, float, str, tuple, list)
    return {n: json.dumps(v) for n, v in defaults.items() if isinstance(v, plain) and is_plain(v)}


def options(factory: Factory, given: frozenset[str] = frozenset()) -> list[Option]:
    """What a factory's table may hold, and what each key means as its docstring says."""
    parameters, hints, said = signature(factory), _hints(factory), meanings(factory)
    return [
        Option(
            name=name,
            type=_in_words(hints[name]) if name in hints else "a value",
            default=None if is_needed(parameters[name]) else parameters[name].default,
            meaning=said.get(name, ""),
            needed=is_needed(parameters[name]),
        )
        for name in option_names(factory, given)
    ]


def meanings(factory: Factory) -> dict[str, str]:
    """What the docstring says of each parameter under "Options:", "Attributes:" or "Args:".

    A class inherits the words of its bases, as it does their fields.

    >>> class Pull:
    ...     '''Holds clients near.
    ...
    ...     Options:
    ...         mu: How strongly;
    ...             0 is not at all.
    ...     '''
    >>> meanings(Pull)
    {'mu': 'How strongly; 0 is not at all.'}
    """
    bases = factory.__mro__ if isinstance(factory, type) else (factory,)
    found: dict[str, str] = {}
    for base in reversed(bases):
        found |= _entries(inspect.cleandoc(base.__doc__ or ""))
    return found


def _entries(text: str) -> dict[str, str]:
    """The entries of a docstring's sections on parameters, their lines joined."""
    found: dict[str, list[str]] = {}
    inside, name = False, ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            inside, name = _SECTION.fullmatch(line) is not None, ""
        elif inside and (entry := _ENTRY.fullmatch(line)):
            name = entry[1]
            found[name] = [entry[2]]
        elif inside and name and line.strip():
            found[name].append(line.strip())
    return {name: " ".join(lines).strip() for name, lines in found.items()}


def signature(factory: Factory) -> Mapping[str, inspect.Parameter]:
    """The parameters of a factory by name."""
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        # Some compiled callables have no signature; then any key may be right.
        return {"options": inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)}


def _hints(factory: Factory) -> dict[str, Any]:
    """Resolved annotations of the parameters; those that cannot be resolved are left out."""
    plain_class = isinstance(factory, type) and not dataclasses.is_dataclass(factory)
    try:
        return typing.get_type_hints(factory.__init__ if plain_class else factory)
    except (NameError, TypeError, AttributeError):
        return {}


def converted(key: str, value: Any, annotation: Any) -> Any:
    """The value as the annotation has it; `InputError` names the key where it does not fit."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value  # a type of the factory's own; it checks for itself
    try:
        # By way of JSON a TOML list may become a tuple, while a string never becomes a number.
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        message = detail["msg"][0].lower() + detail["msg"][1:]
        raise InputError(f"{key} = {value!r}: {message}; give {_in_words(annotation)}") from None


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "nothing",
}


def _in_words(annotation: Any) -> str:
    """What a value of a type looks like in TOML.

    >>> _in_words(tuple[int, ...]), _in_words(tuple[int, int]), _in_words(float | None)
    ('a list such as [3, 5]', 'a list of 2', 'a number')
    """
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part) for part in parts if part is not type(None))
    kind = annotation if origin is None else origin
    if isinstance(kind, type) and issubclass(kind, Sequence) and parts:
        if kind is tuple and parts[-1] is not ...:
            return f"a list of {len(parts)}"
        return "a list" + {int: " such as [3, 5]", float: " such as [0.5, 1.0]"}.get(parts[0], "")
    name = getattr(annotation, "__name__", str(annotation)).replace("typing.", "")
    return f"a value of type {name}"


def is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a parameter has no default and takes a keyword."""
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty
