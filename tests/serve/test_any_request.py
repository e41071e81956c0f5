"""Whatever comes as a request ends in a documented status or in a well-formed stream, and leaves nothing."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, seed, settings

import serve.reading
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from serve.engine.engine import InProcessEngine
from serve.reading.faults import Faults
from serve.text.codec import TextCodec
from taper_client.errors import RETRY_AFTER, from_rpc
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.any_message import messages, requests
from tests.serve.fakes import EOS, VOCAB, ByteTokenizer, listening, served_model
from tests.serve.stream_rules import StreamRules
from tests.serve.waiting import until

CODES = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS"}
READING = Path(serve.reading.__file__).parent
SAID = b"ab <plan>\n" + b"<step>:x</step></plan>" * 3


class Parrot:
    """A device that says something at once: letters, tags, and now and then the end."""

    def __init__(self) -> None:
        self._count = 0

    def launch(self, step: Step) -> Parrot.Launched:
        said = []
        for entry in step.entries:
            if entry.samples:
                self._count += 7
                token = EOS if self._count % 97 == 0 else SAID[self._count % len(SAID)]
                said.append(Sample(token, -1.0, ((97, -1.0),)))
        return Parrot.Launched(tuple(said))

    @dataclass(frozen=True)
    class Launched:
        said: tuple[Sample, ...]

        def is_ready(self) -> bool:
            return True

        def samples(self) -> tuple[Sample, ...]:
            return self.said


@dataclass
class Server:
    engine: InProcessEngine
    channel: grpc.Channel
    ends: Counter[str] = field(default_factory=Counter)

    def generate(self, data: bytes) -> None:
        """Raises AssertionError if the call does not end as documented."""
        rules = StreamRules()
        call = self.channel.unary_stream("/taper.v1.InferenceService/Generate")(data, timeout=60)
        try:
            for message in call:
                rules.message(pb.GenerateResponse.FromString(message))
        except grpc.RpcError as error:
            self.refused(error)
            assert not rules.faults
            return
        assert rules.end() == []
        self.ends["OK"] += 1

    def refused(self, error: Any) -> None:
        failure = from_rpc(error)
        assert failure.code.name in CODES, failure
        assert failure.reason in RETRY_AFTER, failure
        assert (failure.code.name == "INVALID_ARGUMENT") == bool(failure.violations)
        self.ends[failure.reason] += 1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    sizes = SchedulerConfig(num_pages=100, page_size=16, num_slots=64, max_context=200)
    controller = Controller(StepLatencyModel({8: 1e-4, 32: 1e-4}))
    engine = InProcessEngine(Scheduler(sizes, controller, TextCodec(ByteTokenizer())), Parrot())
    engine.start()
    model = served_model(own_grammar="multiverse", default_max_tokens=4, vocab_size=VOCAB)
    with listening(engine, model) as address, grpc.insecure_channel(address) as channel:
        yield Server(engine, channel)


@pytest.fixture(scope="module")
def places() -> Iterator[set[tuple[str, int]]]:
    """Where in the reader a fault was found, by file and line; the tests of this module fill it."""
    found: set[tuple[str, int]] = set()
    kept = Faults.extend

    def extend(self: Faults, violations: Any) -> None:
        before = len(self)
        kept(self, violations)
        frame = sys._getframe(1)
        while frame is not None and len(self) > before and Path(frame.f_code.co_filename).parent == READING:
            found.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
            frame = frame.f_back

    Faults.extend = extend
    yield found
    Faults.extend = kept


def all_places() -> dict[str, set[int]]:
    """Every line of the reader that adds a fault, by file."""
    lines: dict[str, set[int]] = {}
    for path in READING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                if of.endswith("faults") and node.func.attr in ("add", "check_room", "below_floor", "size"):
                    lines.setdefault(path.name, set()).add(node.lineno)
    return lines


def run(server: Server, number: int, examples: int) -> None:
    """So many examples, others for each number."""
    relaxed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @seed(number)
    @settings(max_examples=examples, database=None, suppress_health_check=relaxed)
    @given(requests())
    def check(data: bytes) -> None:
        server.generate(data)

    check()
    assert server.engine.state == "SERVING"
    until(lambda: server.engine.load().scheduler.running_requests == 0, 10)
    load = server.engine.load().scheduler
    assert (load.running_requests, load.running_branches, load.queued_requests) == (0, 0, 0)
    assert load.kv_used_tokens == 0, "every page is free"


@pytest.mark.parametrize("number", range(5))
def test_whatever_is_asked_ends_as_documented(server: Server, places: set, number: int) -> None:
    run(server, number, 200)


@pytest.mark.full
@pytest.mark.parametrize("number", range(100, 110))
def test_so_does_much_more(server: Server, places: set, number: int) -> None:
    run(server, number, 2000)


def test_ids_and_texts_are_turned_into_each_other_or_refused(server: Server, places: set) -> None:
    @settings(max_examples=100, database=None)
    @seed(0)
    @given(messages(pb.TokenizeRequest, 5), messages(pb.DetokenizeRequest, 5))
    def check(tokenize: Any, detokenize: Any) -> None:
        for name, message in (("Tokenize", tokenize), ("Detokenize", detokenize)):
            method = server.channel.unary_unary(f"/taper.v1.InferenceService/{name}")
            try:
                method(message.SerializeToString(), timeout=60)
            except grpc.RpcError as error:
                server.refused(error)

    check()


def test_most_places_that_find_fault_were_reached(
    server: Server, places: set, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the tests above; those of tests/serve/reading reach each of them on its own."""
    expected = {(name, line) for name, lines in all_places().items() for line in lines}
    reached = expected & places
    assert server.ends["OK"] > 100, "requests that run are among them"
    with capsys.disabled():
        print(f"\n{len(reached)} of {len(expected)} places that find fault were reached; {dict(server.ends)}")
        print(f"not reached: {sorted(expected - reached)}")
    assert len(reached) > 0.5 * len(expected)
