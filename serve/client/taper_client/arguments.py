"""What a caller wrote, checked before anything of it is sent.

What a field can hold is in its descriptor, so most checks are read from there. A wrong type is a TypeError,
a value that no server could take a ValueError; both name the argument, what was given and what is needed.
Where a range ends is the server's to say: it answers with InvalidRequestError, which is a ValueError too.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import reprlib
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_AT_LEAST_ONE = {"max_tokens", "branch_max_tokens", "max_branches", "max_depth"}
_MAX_ID = 2**32 - 1

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60


def wrong_type(name: str, value: object, needed: str) -> TypeError:
    return TypeError(f"{name} is {_shown.repr(value)} ({type(value).__name__}): {needed}")


def wrong_value(name: str, value: object, needed: str) -> ValueError:
    return ValueError(f"{name} is {_shown.repr(value)}: {needed}")


# --- messages ----------------------------------------------------------------------------------------------


def message(
    kind: type[MessageT], values: Mapping[str, Any], called: Mapping[str, str] | None = None
) -> MessageT:
    """A `kind` of the values that are not None, by field. An error names a field as its caller knows it."""
    fields = kind.DESCRIPTOR.fields_by_name
    checked = {
        name: _checked(fields[name], (called or {}).get(name, name), value)
        for name, value in values.items()
        if value is not None
    }
    return kind(**checked)


def merged(base: MessageT, own: MessageT) -> MessageT:
    """`base`, with all that `own` sets in its place. A list or a map is replaced, not added to."""
    both = type(base)()
    both.CopyFrom(base)
    for field, _ in own.ListFields():
        both.ClearField(field.name)
    both.MergeFrom(own)
    return both


def instance(name: str, value: Any, kind: type[MessageT], maker: str) -> MessageT:
    """`value`, which must be what `maker` returns."""
    if not isinstance(value, kind):
        raise wrong_type(name, value, f"what {maker} returns is needed")
    return value


def _checked(field: Any, name: str, value: Any) -> Any:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return _map(entry.fields_by_name["key"], entry.fields_by_name["value"], name, value)
    if not field.is_repeated:
        return _single(field, name, value)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _strings(name, value)
    return token_ids(name, value)


def _map(key: FieldDescriptor, item: FieldDescriptor, name: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(name, value, "a dict from token ids to numbers is needed, as in {50: -100.0}")
    return {
        _single(key, f"a key of {name}", each): _single(item, f"{name}[{each!r}]", value[each])
        for each in value
    }


def _single(field: FieldDescriptor, name: str, value: Any) -> Any:
    if field.cpp_type in _WHOLE:
        low, high = _WHOLE[field.cpp_type]
        return whole(name, value, 1 if field.name in _AT_LEAST_ONE else low, high)
    if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        return _float32(name, number(name, value))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise wrong_type(name, value, "True or False is needed")
        return value
    return text(name, value)


# --- single values -----------------------------------------------------------------------------------------


def whole(name: str, value: Any, low: int, high: int = _MAX_ID) -> int:
    """A whole number of any integer type, numpy's too."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong_type(name, value, f"a whole number is needed{_instead(value, int)}")
    try:
        given = operator.index(value)
    except TypeError:
        raise wrong_type(name, value, "a whole number is needed") from None
    if not low <= given <= high:
        needed = "at least 1 is needed" if given < low == 1 else f"{low} to {high} are possible"
        raise wrong_value(name, given, needed)
    return given


def number(name: str, value: Any) -> float:
    """A finite number of any real type, numpy's too."""
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise wrong_type(name, value, f"a number is needed{_instead(value, float)}")
    try:
        given = float(value)
    except OverflowError:
        given = math.inf
    except (TypeError, ValueError):
        raise wrong_type(name, value, "a number is needed") from None
    if not math.isfinite(given):
        raise wrong_value(name, value, "a finite number is needed")
    return given


def _float32(name: str, value: float) -> float:
    """A number that stays what it is on the wire: there, one of more than 3.4e38 would be infinite."""
    try:
        (sent,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        raise wrong_value(name, value, "a number of at most 3.4e38 is needed") from None
    if value and not sent:
        raise wrong_value(name, value, "this is too small to be told from 0; write 0 if that is meant")
    return value


def _instead(value: Any, kind: type[int] | type[float]) -> str:
    """What was probably meant by something of another type."""
    if not isinstance(value, str | float):
        return ""
    try:
        meant = kind(value)
    except (ValueError, OverflowError):
        return ""
    return f"; write {meant}" if float(meant) == float(value) and math.isfinite(meant) else ""


def text(name: str, value: Any) -> str:
    """A str that UTF-8 can hold."""
    if isinstance(value, bytes | bytearray):
        raise wrong_type(name, value, "a str is needed; decode it first")
    if not isinstance(value, str):
        raise wrong_type(name, value, "a str is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start]
        # Python reads a byte of a command line or a file name that is not UTF-8 as one of these.
        byte = f" (the byte 0x{ord(lone) - 0xDC00:02X}, if this was read from bytes)" * (
            "\udc80" <= lone <= "\udcff"
        )
        problem = f"{lone!r} at {error.start} is half of a surrogate pair{byte}, which UTF-8 cannot hold"
        raise wrong_value(name, value, problem) from None
    return value


def seconds(name: str, value: Any) -> float | None:
    """A time to wait; None is as long as it takes."""
    if value is None:
        return None
    if hasattr(value, "total_seconds"):
        raise wrong_type(name, value, f"seconds are needed; write {value.total_seconds():g}")
    if number(name, value) <= 0:
        raise wrong_value(name, value, "more than 0 seconds are needed; None waits as long as it takes")
    return float(value)


# --- lists -------------------------------------------------------------------------------------------------


def items(name: str, value: Any, needed: str) -> Sequence[Any]:
    """A list, tuple, array or other sequence; not a string, of which it would be the characters."""
    one = isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set | Message)
    if one or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        listed = "; wrap it in list(...)" if isinstance(value, Iterable) and not one else ""
        raise wrong_type(name, value, f"{needed} is needed{listed}")
    return value


def token_ids(name: str, value: Any) -> list[int]:
    """Token ids of any integer type."""
    given = items(name, value, "a list of token ids")
    if all(type(id) is int and 0 <= id <= _MAX_ID for id in given):
        return [*given]
    return [whole(f"{name}[{index}]", id, 0) for index, id in enumerate(given)]


def _strings(name: str, value: Any) -> list[str]:
    """Strings that are not empty; a lone one is a list of one."""
    given = [value] if isinstance(value, str) else items(name, value, "a str or a list of them")
    strings = [text(f"{name}[{index}]", each) for index, each in enumerate(given)]
    if "" in strings:
        where = name if isinstance(value, str) else f"{name}[{strings.index('')}]"
        raise wrong_value(where, "", "at least one character is needed; leave it out")
    return strings


# --- names -------------------------------------------------------------------------------------------------


def known(given: Iterable[str], possible: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raises TypeError for the first name that is not possible, with what may have been meant.

    elsewhere   what to write for names that other libraries have for such a thing
    """
    for name in given:
        if name in possible:
            continue
        near = difflib.get_close_matches(name, possible, n=1)
        hint = elsewhere.get(name) or (f"did you mean {near[0]}?" if near else "")
        raise TypeError(f"no such option: {name}" + (f"; {hint}" if hint else ""))


def one_of(name: str, value: Any, possible: Collection[str]) -> str:
    """One of some words."""
    if text(name, value) not in possible:
        raise wrong_value(name, value, f"one of {', '.join(map(repr, possible))} is needed")
    return value


TARGET = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds|google-c2p):.+")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")


def target(name: str, value: Any) -> str:
    """Where a channel leads: host:port, or what gRPC calls a target, such as unix:/path."""
    address = text(name, value)
    if TARGET.fullmatch(address):
        return address
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None:
        raise wrong_value(name, address, "host:port is needed, as in '127.0.0.1:50051' or '[::1]:50051'")
    if not 1 <= int(found[2]) <= 65535:
        raise wrong_value(name, address, "a port is 1 to 65535")
    return address
