"""The id and the model are found in a message's bytes as protobuf finds them."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from serve.reading.envelope import MAX_FIELDS, Envelope, look
from taper_client.errors import InvalidRequestError
from taper_client.v1 import inference_service_pb2 as pb

texts = st.text(max_size=200)
messages = st.builds(
    pb.GenerateRequest,
    request_id=texts,
    model=texts,
    prompt=st.builds(pb.Prompt, text=texts),
    priority=st.integers(-100, 100),
    cache_salt=texts,
    slo=st.builds(pb.Slo, tpot_ms=st.floats(width=32)),
)
pieces = st.binary(max_size=20) | st.builds(lambda message: message.SerializeToString(), messages)


def as_protobuf(data: bytes) -> Envelope | None:
    """None for what is no message."""
    try:
        message = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return None
    return Envelope(message.request_id, message.model)


def seen(data: bytes) -> Envelope | None:
    with contextlib.suppress(InvalidRequestError):
        return look(data)
    return None


@settings(max_examples=300)
@given(st.lists(messages, max_size=4))
def test_of_several_messages_one_after_the_other_the_last_field_counts(
    parts: list[pb.GenerateRequest],
) -> None:
    data = b"".join(part.SerializeToString() for part in parts)
    assert look(data) == as_protobuf(data)


@settings(max_examples=1000)
@given(st.lists(pieces, max_size=4), st.data())
def test_any_bytes_that_protobuf_takes_say_the_same_here(parts: list[bytes], more: st.DataObject) -> None:
    data = bytearray(b"".join(parts))
    for _ in range(more.draw(st.integers(0, 3)) if data else 0):
        data[more.draw(st.integers(0, len(data) - 1))] = more.draw(st.integers(0, 255))
    expected, found = as_protobuf(bytes(data)), seen(bytes(data))
    if expected is not None and found is not None:
        assert found == expected
    if found is None and expected is not None:  # what is refused here only has what no field of ours is
        message = pb.GenerateRequest.FromString(bytes(data))
        size = message.ByteSize()
        message.DiscardUnknownFields()
        assert message.ByteSize() < size


def test_a_gateways_message_has_an_id_and_no_model() -> None:
    message = vllm.GenerateRequest(request_id="r", tokenized=vllm.TokenizedInput(original_text="\n\u20ac"))
    message.tokenized.input_ids.extend([255, 1 << 31])
    assert look(message.SerializeToString(), vllm.GenerateRequest) == Envelope("r", "")


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\xff" * 11,
        b"\x0a\x02\xff\xfe",
        b"\x0b\x0c",
        b"\x00\x00",
        b"\x08" + b"\x80" * 11,
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        look(data)
    assert caught.value.reason == "MALFORMED"
    assert caught.value.violations


def test_the_fields_that_are_walked_past_are_bounded() -> None:
    one = pb.GenerateRequest(request_id="r").SerializeToString()
    assert look(one * MAX_FIELDS).request_id == "r"
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_FIELDS} fields"):
        look(one * (MAX_FIELDS + 1))
