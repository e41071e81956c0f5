"""What the log says of an exception: where it was raised and what it is.

What it says itself may be a prompt or an answer, as in KeyError("the prompt"). From the moment when there may
be prompts, it is shown only where it can be none, or where the operator has asked for everything.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

_DEVICE = ("jax", "jaxlib")  # what these say is of programs, sizes and devices

_MOST = 50  # exceptions of a chain or a group that are shown

_everything = True


def show_everything(yes: bool) -> None:
    """Whether, from here on, whatever exceptions say is shown."""
    global _everything
    _everything = yes


class OperatorError(Exception):
    """What it says is for the operator, and holds nothing of a prompt."""


def what(error: BaseException) -> str:
    """An exception's type, and what it says where that can be shown."""
    name = type(error).__qualname__
    try:
        said = str(error)
    except Exception:
        said = "?"
    if not said:
        return name
    if _everything or _can_be_shown(error, said):
        return f"{name}: {said}"
    return f"{name}: ({len(said)} characters)"


def trace(error: BaseException) -> str:
    """An exception with its frames, after those that led to it."""
    return "\n".join(_lines(error, set()))


def _can_be_shown(error: BaseException, said: str) -> bool:
    """Words for the operator, those of the system and of the device, and what stands in the code itself."""
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, SystemExit):
        return isinstance(error.code, int)
    if isinstance(error, OperatorError) or type(error).__module__.partition(".")[0] in _DEVICE:
        return True
    return _is_written_where_raised(error, said)


def _is_written_where_raised(error: BaseException, said: str) -> bool:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and said in last.tb_frame.f_code.co_consts


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    if len(seen) >= _MOST:
        yield "and more"
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _lines(before, seen)
        yield "which caused:" if error.__cause__ is not None else "which led to:"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):"
        yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield what(error)
    if isinstance(error, BaseExceptionGroup):
        for number, part in enumerate(error.exceptions, 1):
            if id(part) not in seen:
                yield f"{number} of {len(error.exceptions)}:"
                yield from _lines(part, seen)
