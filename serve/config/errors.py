"""What is said about an option that cannot work: always with its flag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def flag(option: str) -> str:
    """As it is typed: `--max-queue` for the field `max_queue`."""
    return f"--{option.replace('_', '-')}"


class OptionError(ValueError):
    """What is wrong with some options, in one line that names their flags."""

    def __init__(self, text: str, *options: str) -> None:
        super().__init__(text, *options)
        self.options = options

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def must_be(cls, option: str, what: str, value: Any) -> OptionError:
        return cls(f"{flag(option)} must be {what}, not {value!r}", option)


@contextmanager
def naming(option: str) -> Iterator[None]:
    """A ValueError or OSError inside is raised as an OptionError, told with the option's flag."""
    try:
        yield
    except OptionError:
        raise
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else error
        raise OptionError(f"{flag(option)}: {why}", option) from error
    except ValueError as error:
        raise OptionError(f"{flag(option)}: {error}", option) from error
