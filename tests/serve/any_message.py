"""Messages built from their descriptors: every field, with values at the edges of what it may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from hypothesis import strategies as st

from taper_client.v1 import inference_service_pb2 as pb

_DEPTH = 9  # of messages inside of each other
KINDS = ("mended", "mended", "plain", "odd", "odd", "odd", "much", "much", "mutated", "longer")
PROMPTS = (
    pb.Prompt(text="go"),
    pb.Prompt(text="é"),
    pb.Prompt(token_ids=pb.TokenIds(ids=[1, 97])),
    pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")])),
)
_CLEARED = ("top_k", "top_logprobs", "first_k", "tag_set")
_SMALL = ("max_tokens", "branch_max_tokens", "max_branches", "max_depth")
_FEW = ("token_ids", "stop_token_ids", "logit_bias", "stop", "cache_salt")
TEXTS = (
    "",
    "a",
    "ab\n",
    "é🙂",
    "<end>",
    "<plan>",
    "{label}",
    "multiverse",
    "user",
    "assistant",
    "tiny",
    "x" * 300,
)
_WHOLE = (0, 1, 2, 3, 7, 64, 65, 97, 255, 256, 257, 299, 300, 2**31 - 1)
_NUMBERS = (0.0, 0.5, 1.0, -1.0, 0.01, 2.0, 100.0, 1e3, 1e-9, 1e30, float("inf"), float("nan"))


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    if field.cpp_type == Field.CPPTYPE_STRING:
        return st.sampled_from(TEXTS) | st.text(max_size=5)
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return st.sampled_from(_NUMBERS)
    if field.cpp_type == Field.CPPTYPE_ENUM:
        return st.integers(0, 4) | st.just(99)
    if field.cpp_type == Field.CPPTYPE_INT32:
        return st.sampled_from((0, 1, -1, 100, -100, 101, -(2**31)))
    most = 2**64 - 1 if field.cpp_type == Field.CPPTYPE_UINT64 else 2**32 - 1
    return st.sampled_from((*_WHOLE, most))


@st.composite
def messages(draw: st.DrawFn, kind: Any, density: int = 3, depth: int = 0) -> Any:
    """A message of a class. Of ten fields, `density` are set."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if draw(st.integers(0, 9)) < density:
            _fill(draw, made, field, density, depth)
    return made


def _fill(draw: st.DrawFn, made: Message, field: Any, density: int, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(draw(st.integers(0, 2))):
            getattr(made, field.name)[draw(_scalar(key))] = draw(_scalar(value))
    elif field.is_repeated:
        for _ in range(draw(st.integers(0, 3))):
            here = getattr(made, field.name)
            if field.message_type is None:
                here.append(draw(_scalar(field)))
            elif depth < _DEPTH:
                here.append(draw(messages(field.message_type._concrete_class, density, depth + 1)))
    elif field.message_type is None:
        setattr(made, field.name, draw(_scalar(field)))
    elif depth < _DEPTH:
        part = draw(messages(field.message_type._concrete_class, density, depth + 1))
        getattr(made, field.name).CopyFrom(part)


def _plausible(draw: st.DrawFn, message: pb.GenerateRequest) -> None:
    """Mends most of what would be refused for one field in many, so that others are looked at, and run."""
    message.ClearField("request_id")
    message.ClearField("model")
    if message.priority not in range(-100, 101):
        message.ClearField("priority")
    if not 0 <= message.output.interval_ms <= 10:
        message.output.ClearField("interval_ms")
    _mend(message)
    message.prompt.CopyFrom(draw(st.sampled_from(PROMPTS)))


def _mend(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name in _CLEARED or field.cpp_type == Field.CPPTYPE_FLOAT:
            message.ClearField(field.name)
        elif field.cpp_type == Field.CPPTYPE_ENUM:
            setattr(message, field.name, value % 3)
        elif field.name in _SMALL:
            setattr(message, field.name, min(max(value, 1), 4))
        elif field.name in _FEW and len(repr(value)) % 2:  # by itself, so that it is always mended so
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                _mend(part)
    if isinstance(message, pb.ForkTags):
        for field in message.DESCRIPTOR.fields:
            if field.cpp_type == Field.CPPTYPE_STRING:
                setattr(message, field.name, getattr(message, field.name)[:20] or "<plan>")
    elif isinstance(message, pb.Plan) and not message.stages:
        message.stages.add()
    if isinstance(message, pb.Plan | pb.BranchSpec):
        for stage in message.stages:
            if stage.WhichOneof("kind") is None:
                stage.serial.prefix.text = "so:"
            elif stage.HasField("parallel") and not stage.parallel.branches:
                stage.parallel.branches.add(label="a", prefix=pb.Prefix(text="b"))


def _parts(message: Message) -> Iterator[Message]:
    """A message and all that are inside of it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from _parts(part)


def _odd(draw: st.DrawFn, message: Message) -> None:
    """A few fields of it are changed."""
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from([*_parts(message)]))
        field = draw(st.sampled_from([*part.DESCRIPTOR.fields]))
        part.ClearField(field.name)
        _fill(draw, part, field, 0, 0)


def _much(draw: st.DrawFn, message: Message) -> None:
    """There is more of something: of a list, or of a text."""
    found = [
        (part, field)
        for part in _parts(message)
        for field, _ in part.ListFields()
        if field.is_repeated or field.cpp_type == Field.CPPTYPE_STRING
    ]
    part, field = draw(st.sampled_from(found))
    value = getattr(part, field.name)
    if not field.is_repeated:
        setattr(part, field.name, 300 * value)
    elif field.message_type is None or not field.message_type.GetOptions().map_entry:
        value.extend([*value] * 70)
    else:
        for key in range(draw(st.sampled_from((64, 65)))):
            value[key] = 0.0


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """The bytes of a GenerateRequest, or nearly."""
    message = draw(messages(pb.GenerateRequest, draw(st.sampled_from((2, 4, 6, 9)))))
    kind = draw(st.sampled_from(KINDS))
    if kind != "plain":
        _plausible(draw, message)
    if kind == "odd":
        _odd(draw, message)
    elif kind == "much":
        _much(draw, message)
    data = bytearray(message.SerializeToString())
    if kind == "mutated":
        for _ in range(draw(st.integers(1, 3)) if data else 0):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data) + (draw(st.binary(max_size=10)) if kind == "longer" else b"")
