"""Settings: a JSON file of a model folder, read key by key, with every fault noted.

Other people's files can hold anything. Whatever is wrong with them ends in one line that names the file, the
key, what was expected there and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST = 2**31 - 1  # of sizes and ids: positions and tokens are int32 on the device
_LARGEST = 1e300  # of other numbers: JSON knows larger ones than a float does
_POINTER = b"version https://git-lfs.github.com/spec/"  # what Git leaves in the place of a large file
_SHOWN = 60  # characters of a value that an error shows


class CheckpointError(ValueError):
    """A file of a model folder is unreadable, or does not say what it must. One line."""


def shown(value: Any) -> str:
    """A value from a file, fit for a line of an error message: short, and without control characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the host or of the device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def listed(faults: Iterable[str], most: int = 8) -> str:
    """Faults in one line: the first few of them, and how many there are besides."""
    faults = list(faults)
    more = len(faults) - most
    return "; ".join([*faults[:most], *([f"and {more} more"] if more > 0 else [])])


def present(path: Path) -> bool:
    """Whether there is something at `path`; a link to nothing is, since whoever made it meant a file."""
    return path.exists() or path.is_symlink()


def check_file(path: Path) -> None:
    """Raises CheckpointError unless this is a file, or a link to one, and it has been fetched."""
    if not path.is_file():
        kinds = {"a folder": path.is_dir, "something else": path.exists, "a link to nothing": path.is_symlink}
        found = next((kind for kind, holds in kinds.items() if holds()), "nothing")
        raise CheckpointError(f"{path}: expected a file, found {found}")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{path}: expected the file, found a pointer of Git LFS to it: fetch it")


def read_text(path: Path) -> str:
    """A text file's content. Raises CheckpointError if it is not UTF-8, or no file."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read {path}: expected UTF-8, found {one_line(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    text = read_text(path)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell half of a character
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: expected JSON, found {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}: expected a JSON object, found {shown(value)}")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is none."""
    return read_object(path) if present(path) else {}


class Settings:
    """An object of a JSON file. `null` counts as a key that is not there.

    Whoever finds a fault goes on with something usable; in the end, `faults` has them all.
    """

    def __init__(self, values: Mapping[str, Any], source: str, faults: list[str] | None = None) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._source = source
        self.faults: list[str] = [] if faults is None else faults

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def fault(self, key: str, expected: str) -> None:
        found = shown(self._values[key]) if key in self._values else "nothing"
        line = f"{self._source}: {key}: expected {expected}, found {found}"
        if line not in self.faults:  # a key may be asked for twice
            self.faults.append(line)

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """A whole number; one without a default has to be there."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(key, f"a whole number from {least} to {most}")
            return least
        return value

    def number(
        self, key: str, default: float | None = None, *, above: float = 0.0, or_equal: bool = False
    ) -> float:
        """A finite number greater than `above`, or equal to it; one without a default has to be there."""
        value = self._values.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (above < value < _LARGEST or (or_equal and value == above)):
            self.fault(key, f"a number {'of at least' if or_equal else 'greater than'} {above:g}")
            return above + 1.0
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            self.fault(key, "true or false")
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self._values.get(key, default)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            self.fault(key, "a text of one line")
            return default
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fault(key, "a list of texts")
            return ()
        return tuple(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one of them, or a list."""
        value = self._values.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MOST for i in ids):
            self.fault(key, "a token id or a list of them")
            return ()
        return tuple(ids)

    def section(self, key: str) -> Settings:
        """The object under `key`, or an empty one; its faults are noted here."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.fault(key, "an object")
            value = {}
        return Settings(value, f"{self._source}: {key}", self.faults)
