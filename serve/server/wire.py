"""Deltas as the bytes that protobuf makes of them.

Nearly all that a server says are deltas of a token or a few. To put the bytes together and let protobuf read
them takes a third of the time of making its objects one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from taper_client.v1 import inference_service_pb2 as pb

_NUMBER, _BYTES = 0, 2  # wire types


@lru_cache(maxsize=65536)
def varint(number: int) -> bytes:
    """A number that is not negative, in groups of seven bits, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _tag(message: Any, field: str, wire_type: int) -> bytes:
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type)


_EVENTS = _tag(pb.GenerateResponse, "events", _BYTES)
_DELTA = _tag(pb.Event, "delta", _BYTES)
_BRANCH = _tag(pb.BranchDelta, "branch_id", _NUMBER)
_TEXT = _tag(pb.BranchDelta, "text", _BYTES)
_IDS = _tag(pb.BranchDelta, "token_ids", _BYTES)
_COUNT = _tag(pb.BranchDelta, "completion_tokens", _NUMBER)


class Delta:
    """What one branch has sampled: its text, the ids if they are asked for, and its tokens so far."""

    __slots__ = ("branch", "count", "ids", "text")

    def __init__(self, branch: int) -> None:
        self.branch = branch
        self.text = ""
        self.ids: list[int] = []
        self.count = 0

    def event(self) -> bytes:
        """As an event of a `GenerateResponse`, with its tag and length."""
        text = self.text.encode()
        fields = _branch(self.branch) + _begin_text(len(text)) + text
        if self.ids:
            ids = b"".join(map(varint, self.ids))
            fields += _IDS + varint(len(ids)) + ids
        fields += _count(self.count)
        return _begin_event(len(fields)) + fields


# What is 0 or empty is left out.


@lru_cache(maxsize=1024)
def _branch(branch: int) -> bytes:
    return _BRANCH + varint(branch) if branch else b""


@lru_cache(maxsize=1024)
def _begin_text(size: int) -> bytes:
    return _TEXT + varint(size) if size else b""


@lru_cache(maxsize=65536)
def _count(tokens: int) -> bytes:
    return _COUNT + varint(tokens) if tokens else b""


@lru_cache(maxsize=1024)
def _begin_event(size: int) -> bytes:
    """In front of a delta's fields of so many bytes."""
    delta = _DELTA + varint(size)
    return _EVENTS + varint(len(delta) + size) + delta
