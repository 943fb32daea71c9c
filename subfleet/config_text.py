"""Reading TOML files and the `a.b=c` overrides of the command line."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

from subfleet.core.errors import InputError

_BARE_WORD = re.compile(r"[A-Za-z_./~][\w./~:@+\- ]*")
_KEY_PART = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InputError: The file does not exist, cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of an experiment's TOML") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the path of an experiment's TOML") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"{path}: not valid TOML: {error}; give an experiment, such as "
            "examples/quickstart.toml, or correct that line"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def parse_value(text: str) -> Any:
    """A value as TOML would read it; a bare word is a string.

    >>> parse_value("0.1"), parse_value("true"), parse_value("fedpa"), parse_value("[1, 2]")
    (0.1, True, 'fedpa', [1, 2])

    Raises:
        ValueError: It is neither.
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        table = {}
    # A line break in the text could smuggle in a second key.
    if table.keys() == {"value"}:
        return table["value"]
    if _BARE_WORD.fullmatch(text.strip()):
        return text.strip()
    raise ValueError(text)


def is_plain(value: Any) -> bool:
    """Whether `value` is made of what TOML and JSON share, with finite numbers only."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return isinstance(value, bool | int | str) or (
        isinstance(value, float) and math.isfinite(value)
    )


def split_override(override: str) -> tuple[list[str], str]:
    """The key's parts and the value's text of one `a.b=c`.

    >>> split_override("train.lr = 0.1")
    (['train', 'lr'], '0.1')

    Raises:
        InputError: It is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(_KEY_PART.fullmatch(part) for part in parts):
        raise InputError(
            f"override {override!r} is not of the form table.key=value; write e.g. train.lr=0.1"
        )
    return parts, text.strip()


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Set one key of `tables` in place; a number in the key picks an entry of a list.

    >>> tables = {"fleet": {"tiers": [{"width": 1.0}]}}
    >>> apply_override(tables, "fleet.tiers.0.width=0.5")
    >>> tables
    {'fleet': {'tiers': [{'width': 0.5}]}}

    Raises:
        InputError: The override is malformed or leads through something that is not a table.
    """
    parts, text = split_override(override)
    try:
        value = parse_value(text)
    except ValueError:
        raise InputError(
            f"override {override!r}: {text!r} is not a TOML value; put quotes around a string"
        ) from None
    set_key(tables, parts, value)


def set_key(tables: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set the key named by `parts` in place, making tables on the way."""
    place: Any = tables
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, list):
            place = place[_position(place, parts, depth)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
    if isinstance(place, list):
        place[_position(place, parts, len(parts) - 1)] = value
    elif isinstance(place, dict):
        place[parts[-1]] = value
    else:
        raise InputError(
            f"{'.'.join(parts)} cannot be set: {'.'.join(parts[:-1])} is not a table; "
            "check the key's dots"
        )


def _position(items: list[Any], parts: list[str], depth: int) -> int:
    part, name = parts[depth], ".".join(parts[:depth])
    if not part.isdecimal() or int(part) >= len(items):
        raise InputError(
            f"{name}.{part}: {name} has {len(items)} entries, numbered from 0; "
            f"give a number below {len(items)}"
        )
    return int(part)


def parse_grid(override: str) -> tuple[str, list[Any]]:
    """One axis of a sweep: the key and its values, separated by commas.

    >>> parse_grid("train.lr=0.1,0.2")
    ('train.lr', [0.1, 0.2])
    >>> parse_grid("algorithm.name=fedavg,fedpa")
    ('algorithm.name', ['fedavg', 'fedpa'])

    Raises:
        InputError: It is not of the form table.key=value,value.
    """
    parts, text = split_override(override)
    values = _list_of(text)
    if not values:
        raise InputError(
            f"override {override!r}: cannot read the values {text!r}; "
            "separate TOML values by commas, with quotes around strings"
        )
    return ".".join(parts), values


def _list_of(text: str) -> list[Any]:
    try:
        table = tomllib.loads(f"value = [{text}]")
        if table.keys() == {"value"}:
            return table["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return [parse_value(item) for item in text.split(",")]
    except ValueError:
        return []
