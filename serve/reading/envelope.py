"""What the bytes of a request say on the outside: its id and its model, found without reading the rest.

A call has to be known by its id before anything is waited for, and the event loop reads no message that may
be large. So the wire format's top level alone is walked, past at most `MAX_FIELDS` fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from functools import cache
from typing import Any, NamedTuple

from serve.reading.work import malformed
from taper_client.v1 import inference_service_pb2 as pb

MAX_FIELDS = 64  # on the top level of a message; a client that sets every field has eleven

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Envelope(NamedTuple):
    """As protobuf would read them: empty if not set, the last one if set more than once."""

    request_id: str = ""
    model: str = ""


def look(data: bytes, kind: Any = pb.GenerateRequest) -> Envelope:
    """`kind` is the class of the message, which may have no model. Raises InvalidRequestError for bytes that
    are no message, or have too many fields."""
    numbers = _numbers(kind)
    found = dict.fromkeys(numbers.values(), b"")
    try:
        for count, (number, value) in enumerate(_fields(data, found.keys())):
            if count == MAX_FIELDS:
                raise malformed(f"the message has more than {MAX_FIELDS} fields on its top level")
            if value is not None:
                found[number] = value
        return Envelope(**{name: found[number].decode() for name, number in numbers.items()})
    except (IndexError, UnicodeDecodeError):
        raise malformed(f"these bytes are no {kind.DESCRIPTOR.full_name}") from None


@cache
def _numbers(kind: Any) -> Mapping[str, int]:
    """Of those fields of an envelope that a class of messages has: looked up once, and not for each call."""
    fields = kind.DESCRIPTOR.fields_by_name
    return {name: fields[name].number for name in Envelope._fields if name in fields}


def _fields(data: bytes, wanted: Set[int]) -> Iterator[tuple[int, bytes | None]]:
    """Numbers of the fields, with the bytes of those that are wanted. IndexError: the data is cut off."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind, value = tag >> 3, tag & 7, None
        if kind == _BYTES:
            size, begin = _varint(data, at)
            at = begin + size
            value = data[begin:at] if number in wanted else None
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:  # a group, which this schema has none of
            raise IndexError
        if not number or at > len(data):
            raise IndexError
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError
