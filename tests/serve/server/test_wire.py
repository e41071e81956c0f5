"""Messages whose bytes are put together by hand are those that protobuf makes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.events import Event, TokenEmitted
from scheduler.request import Request
from serve.server.responses import ResponseWriter
from serve.server.wire import Delta
from serve.text.reader import Speller
from taper_client.v1 import inference_service_pb2 as pb
from tests.scheduler.alphabet import FOLLOWS, PLAIN, TALKATIVE
from tests.scheduler.strategies import examples, loads, plans, serving, tag_programs
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, serve
from tests.serve.fakes import ByteTokenizer

numbers = st.integers(0, 2**32 - 1) | st.integers(0, 300)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.text(max_size=3, alphabet="aé🙂")


@settings(max_examples=200)
@given(numbers, texts, numbers, st.lists(numbers, max_size=40))
def test_a_delta_has_the_bytes_that_protobuf_gives_it(
    branch: int, text: str, count: int, ids: list[int]
) -> None:
    delta = Delta(branch)
    delta.text, delta.count, delta.ids = text, count, ids
    told = pb.BranchDelta(branch_id=branch, text=text, completion_tokens=count, token_ids=ids)
    message = pb.GenerateResponse(events=[pb.Event(delta=told)])
    assert delta.event() == message.SerializeToString()


options = st.builds(
    pb.OutputOptions,
    token_ids=st.booleans(),
    logprobs=st.sampled_from([False, False, True]),
    include_stop=st.booleans(),
    prompt_token_ids=st.booleans(),
)


def writer(request: Request, asked: pb.OutputOptions) -> ResponseWriter:
    return ResponseWriter(request, asked, Speller(ByteTokenizer.spelling, skip_special_tokens=True))


def assert_same(
    request: Request, asked: pb.OutputOptions, events: list[Event], cuts: list[int], stand_for: bytes
) -> None:
    """The messages of all batches, written and built object by object, are equal byte by byte."""
    events = [spoken(event, stand_for) for event in events]
    quick, plain = writer(request, asked), writer(request, asked)
    places = sorted({cut % len(events) for cut in cuts} | {0})
    for start, stop in zip(places, [*places[1:], len(events)], strict=True):
        written, built = quick.write(events[start:stop]), plain.build(events[start:stop])
        assert written == built
        assert written.SerializeToString() == built.SerializeToString()


def spoken(event: Event, stand_for: bytes) -> Event:
    """Sampled tokens say something, in characters of several tokens at that."""
    if not isinstance(event, TokenEmitted):
        return event
    token = stand_for[event.sample.token % len(stand_for)] if stand_for else event.sample.token
    return event._replace(sample=event.sample._replace(token=token))


cuts = st.lists(st.integers(0, 1000), max_size=30)
sayings = st.sampled_from([b"", "aé🙂".encode(), b"ab#"])


@examples(60)
@given(loads(plans), serving, options, cuts, sayings)
def test_all_that_a_request_says_is_written_as_it_is_built(
    load: list[Request], setting: Setting, asked: pb.OutputOptions, cuts: list[int], stand_for: bytes
) -> None:
    """Every kind of event, in batches of one step and of several, with whatever is asked for."""
    for name, events in serve(load, setting, SymbolicModel(PLAIN)).events.items():
        request = next(each for each in load if each.id == name)
        assert_same(request, asked, events, cuts, stand_for)


@examples(30)
@given(loads(tag_programs), serving, options, cuts, sayings)
def test_so_it_is_under_forks_of_the_model(
    load: list[Request], setting: Setting, asked: pb.OutputOptions, cuts: list[int], stand_for: bytes
) -> None:
    for name, events in serve(load, setting, SymbolicModel(TALKATIVE, FOLLOWS)).events.items():
        request = next(each for each in load if each.id == name)
        assert_same(request, asked, events, cuts, stand_for)
