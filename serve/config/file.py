"""A TOML file of options: by the names of their flags, all in a row or under the names of their groups.

    model = "qwen3-0.6b"
    max-queue = 64

    [memory]
    buckets = [8, 16, 32]

What TOML has no word for is written as it is typed: `compilation-cache = "None"`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from serve.config import GROUPS, ServerConfig, flag

NONE = "None"
_SHOWN = 60  # characters of a value that an error shows
_GROUP_OF = {option.name: name for name, group in GROUPS.items() for option in fields(group)}
_HINTS = {name: hint for name, hint in get_type_hints(ServerConfig).items() if name in _GROUP_OF}
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


class ConfigFileError(ValueError):
    """What is wrong with a file of options, in one line."""


def read(path: Path) -> dict[str, Any]:
    """The options that a file gives, by their names, with values of their types. Raises ConfigFileError."""
    faults: list[str] = []
    taken: dict[str, Any] = {}
    for group, key, value in _entries(_document(path)):
        option = key.replace("-", "_")
        fault = _misplaced(group, key, value)
        if fault is None and option in taken:
            fault = f"{flag(option)} is given twice"
        if fault is None:
            try:
                taken[option] = _fitted(value, _HINTS[option])
            except TypeError:
                fault = f"{flag(option)} must be {_wanted(_HINTS[option])}, not {_shown(value)}"
        if fault is not None:
            faults.append(fault)
    if faults:
        raise ConfigFileError(f"{path}: {'; '.join(faults)}")
    return taken


def _document(path: Path) -> dict[str, Any]:
    """Raises ConfigFileError for what is no file, or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigFileError(f"--config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"--config: {path} is not UTF-8, at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # TOML's own, or of too many digits
        raise ConfigFileError(f"--config: {path} is not TOML: {' '.join(str(error).split())}") from error


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str | None, str, Any]]:
    """Group, key and value of everything that stands in the file; the group is None outside of tables."""
    for key, value in document.items():
        if key in GROUPS and isinstance(value, dict):
            yield from ((key, inner, told) for inner, told in value.items())
        else:
            yield None, key, value


def _misplaced(group: str | None, key: str, value: Any) -> str | None:
    """Why no option can stand here under this key."""
    option = key.replace("-", "_")
    if option == "config":
        return "--config cannot be given in a file"
    if option in _GROUP_OF:
        own = _GROUP_OF[option]
        return None if group in (None, own) else f"{flag(option)} belongs in [{own}], not in [{group}]"
    if key in GROUPS and group is None:
        return f"{key} is a table of options, [{key}], not {_shown(value)}"
    kind, known = ("table", [*GROUPS]) if isinstance(value, dict) else ("option", [*_GROUP_OF])
    near = [name.replace("_", "-") for name in difflib.get_close_matches(option, known, n=1)]
    return f"unknown {kind} {_shown(key)}{''.join(f' (is it {name}?)' for name in near)}"


def _fitted(value: Any, hint: Any) -> Any:
    """A value of TOML's as a field of this type takes it. Raises TypeError."""
    if get_origin(hint) in (Union, UnionType):
        if value == NONE:
            return None
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_fitted(each, get_args(hint)[0]) for each in value)
    elif isinstance(value, _KINDS[hint][0]) and (hint is bool or not isinstance(value, bool)):
        return float(str(value)) if hint is float else value  # through text: an integer may be too large
    raise TypeError


def _wanted(hint: Any) -> str:
    """What a field of this type takes, in the words of TOML."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return f'{" or ".join(_wanted(each) for each in inner if each is not NoneType)} or "{NONE}"'
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(_shown, inner))}"
    if get_origin(hint) is tuple:
        return f"a list, each item {_wanted(inner[0])}"
    return _KINDS[hint][1]


def _shown(value: Any) -> str:
    """Short, in one line, and much as it stands in the file."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
