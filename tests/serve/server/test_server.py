"""The server as its clients meet it, over a real socket, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.events import BranchInfo, StageStarted, Started, TokenEmitted, WidthChanged
from scheduler.gate import RejectedError
from scheduler.predictor import PredictionAccuracy, StepLatencyModel
from scheduler.program import Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler, SchedulerLoad
from scheduler.step import Sample
from scheduler.stopping import Stopping
from serve.config import OptionError, ServerConfig
from serve.door import Failed, Load, Refused, Sink
from serve.served import Platform, Served
from serve.server.ports import SERVICES, Ports
from serve.server.server import serve, shut_down
from serve.server.service import Service
from taper_client import AsyncClient, generate_request, parallel
from taper_client.answer import Completion
from taper_client.errors import (
    CancelledError,
    DeadlineExceededError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ServiceError,
    UnavailableError,
    from_rpc,
)
from taper_client.events import Finished, events_of
from taper_client.v1 import control_service_pb2, inference_service_pb2
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.fakes import ByteTokenizer, FakeEngine, finished, served_model

CONFIG = ServerConfig(port=0)


def in_loop(test: Callable[..., Coroutine]) -> Callable:
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 300))  # of a test that hangs

    return run


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine | None = None, **options: int) -> AsyncIterator[tuple[Service, str]]:
    """A server, with an engine or still without one, and its address."""
    service = Service(CONFIG, **options)
    if engine is not None:
        service.serve(
            Served(engine=engine, model=served_model(), platform=Platform(device="fake", devices=3))
        )
    async with listening_to(service) as address:
        yield service, address


@contextlib.asynccontextmanager
async def listening_to(service: Service) -> AsyncIterator[str]:
    """The address of a server in this loop."""
    ports = Ports(service)
    await ports.start()
    try:
        yield ports.address
    finally:
        await shut_down(ports, service, timeout=0.0)


@contextlib.asynccontextmanager
async def connected(engine: FakeEngine, **options: int) -> AsyncIterator[AsyncClient]:
    async with serving(engine, **options) as (_, address), AsyncClient(address) as client:
        yield client


async def until(engine: FakeEngine, condition: Callable[[FakeEngine], bool]) -> None:
    await asyncio.to_thread(engine.wait_for, condition)


def begin(name: str = "r") -> list:
    return [Started(name, 3, 1), StageStarted(name, 0, (BranchInfo(0, 0, ""),))]


def token(count: int, name: str = "r") -> TokenEmitted:
    return TokenEmitted(name, 0, Sample(ord("a")), count)


def answer(engine: FakeEngine, request) -> None:
    """Two tokens in two steps."""
    engine.tell(request.id, *begin(request.id), token(1, request.id))
    engine.tell(request.id, token(2, request.id), finished(request.id, 2))


# --- a request's life --------------------------------------------------------------------------------------


@in_loop
async def test_a_step_is_a_message():
    engine = FakeEngine()
    async with serving(engine) as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = inference_grpc.InferenceServiceStub(channel).Generate(generate_request("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        kinds = []
        for step in ([*begin(), token(1)], [token(2), WidthChanged("r", 1, 3), token(3)], [finished("r")]):
            engine.tell("r", *step)
            message = await call.read()
            kinds.append([event.WhichOneof("kind") for event in message.events])
        assert kinds == [["started", "stage_started", "delta"], ["delta", "width_changed"], ["finished"]]
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    assert engine.cancelled == [], "what ended by itself is not cancelled"


@in_loop
async def test_a_cancelled_call_cancels_its_request():
    engine = FakeEngine()
    async with connected(engine) as client:
        stream = client.generate("go", request_id="r")
        events = aiter(stream)
        first = asyncio.ensure_future(anext(events))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        await first
        stream.cancel()
        await until(engine, lambda e: e.cancelled == ["r"])
        with pytest.raises(CancelledError):
            async for _ in events:
                pass


@in_loop
async def test_a_call_cancelled_in_the_queue_cancels_its_request():
    engine = FakeEngine()
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        waiting = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        waiting.cancel()
        await until(engine, lambda e: e.cancelled == ["r"])
        with pytest.raises(asyncio.CancelledError):
            await waiting
    value, name = service.metrics.registry.get_sample_value, "taper_requests_total"
    assert value(name, {"code": "CANCELLED", "tenant": ""}) == 1
    assert value(name, {"code": "OK", "tenant": ""}) is None


@in_loop
async def test_a_deadline_cancels_the_request():
    engine = FakeEngine()
    async with connected(engine) as client:
        with pytest.raises(DeadlineExceededError):
            await client.complete("go", request_id="r", timeout=0.2)
        await until(engine, lambda e: e.cancelled == ["r"])


@in_loop
async def test_abort_ends_exactly_the_calls_that_it_names():
    engine = FakeEngine()
    async with connected(engine) as client:
        calls = {
            name: asyncio.ensure_future(client.complete("go", request_id=name)) for name in ("r1", "r10")
        }
        await until(engine, lambda e: len(e.requests) == 2)
        assert await client.abort("r1", "r", "unknown", "r1") == ("r1",)
        with pytest.raises(CancelledError) as caught:
            await calls["r1"]
        assert (caught.value.reason, caught.value.request_id) == ("ABORTED", "r1")
        assert caught.value.retry_after is None
        await asyncio.to_thread(answer, engine, engine.requests["r10"])
        assert (await calls["r10"]).text == "aa"
        assert await client.abort("r1") == ()
    assert set(engine.cancelled) == {"r1"}


@in_loop
async def test_special_tokens_are_shown_when_they_are_wanted():
    def special(engine: FakeEngine, request) -> None:
        engine.tell(request.id, *begin(request.id), TokenEmitted(request.id, 0, Sample(257), 1))
        engine.tell(request.id, finished(request.id))

    async with connected(FakeEngine(special)) as client:
        assert (await client.complete("go")).text == ""
        assert (await client.complete("go", keep_special_tokens=True)).text == "<begin>"


@in_loop
async def test_an_id_can_be_used_again_after_its_request():
    engine = FakeEngine(answer)
    async with connected(engine) as client:
        for _ in range(2):
            assert (await client.complete("go", request_id="r")).text == "aa"


# --- refusals ----------------------------------------------------------------------------------------------


@in_loop
async def test_what_is_wrong_with_a_request_comes_back_by_path():
    engine = FakeEngine()
    async with connected(engine) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.complete([999], temperature=101)
        fields = [violation.field for violation in caught.value.violations]
        assert fields == ["prompt.token_ids.ids[0]", "sampling.temperature"]
        with pytest.raises(InvalidRequestError) as caught:
            await client.complete([1] * 500)
        assert caught.value.reason == "PROMPT_TOO_LONG"
        assert caught.value.metadata == {"limit": "199", "got": "500"}
    assert not engine.requests


@in_loop
@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("QUEUE_FULL", OverloadedError),
        ("KV_FULL", OverloadedError),
        ("SLO_UNATTAINABLE", OverloadedError),
        ("DRAINING", UnavailableError),
        ("STARTING", UnavailableError),
        ("DUPLICATE", DuplicateRequestError),
    ],
)
async def test_the_engines_refusals_reach_the_caller(reason, kind):
    engine = FakeEngine()
    engine.refusal = Refused(reason, "not now")
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        with pytest.raises(kind) as caught:
            await client.complete("go", request_id="r")
        assert (caught.value.reason, caught.value.message) == (reason, "not now")
        assert service.is_idle, "an id that was refused is free"
    assert not engine.cancelled, "another request may have this id"


class Strict(FakeEngine):
    """Refuses what a small scheduler refuses, which never runs a step: one request waits already."""

    def __init__(self) -> None:
        super().__init__()
        pages = SchedulerConfig(num_pages=20, page_size=16, num_slots=16, max_context=200, max_queue=1)
        controller = Controller(StepLatencyModel({8: 1e-3}, 1e-6))
        self.scheduler = Scheduler(pages, controller, ByteTokenizer())
        waiting = Plan(stages=(SerialStage(stopping=Stopping(max_tokens=1)),))
        self.scheduler.add(Request(id="waiting", prompt=(1,), program=waiting), 0.0)

    def submit(self, request: Request, sink: Sink) -> None:
        try:
            self.scheduler.add(request, 0.0)
        except RejectedError as rejected:
            sink([Refused(rejected.reason, str(rejected))])
            return
        raise AssertionError("the queue is full")


@in_loop
@pytest.mark.parametrize(
    ("message", "code", "reason", "hinted"),
    [
        (generate_request("go", max_tokens=9), "RESOURCE_EXHAUSTED", "QUEUE_FULL", True),
        (
            generate_request("go", plan=[parallel(["a"] * 16, max_tokens=190)]),
            "RESOURCE_EXHAUSTED",
            "KV_FULL",
            False,
        ),
        (generate_request("go", plan=[parallel([""] * 65)]), "INVALID_ARGUMENT", "INVALID_FIELD", False),
        (generate_request([1] * 500), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_can_never_be_served_is_not_asked_to_come_back(message, code, reason, hinted):
    async with serving(Strict()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_grpc.InferenceServiceStub(channel).Generate(message).read()
        error = from_rpc(caught.value)
        assert (caught.value.code().name, error.reason) == (code, reason)
        assert (error.retry_after is not None) is hinted
        assert ("grpc-retry-pushback-ms" in dict(caught.value.trailing_metadata())) is hinted


@in_loop
async def test_a_running_id_is_refused_and_the_running_request_goes_on():
    engine = FakeEngine()
    async with connected(engine) as client:
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        with pytest.raises(DuplicateRequestError) as caught:
            await client.complete("go", request_id="r")
        assert caught.value.retry_after is None
        await asyncio.to_thread(answer, engine, engine.requests["r"])
        assert (await running).text == "aa"
    assert engine.cancelled == []


@in_loop
@pytest.mark.parametrize("service", [inference_service_pb2, control_service_pb2])
async def test_no_method_drops_a_field_that_it_does_not_know(service):
    async with serving(FakeEngine()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        (descriptor,) = service.DESCRIPTOR.services_by_name.values()
        for method in descriptor.methods:
            path = f"/{descriptor.full_name}/{method.name}"
            newer = bytes([0x98, 0x06, 1])  # field 99, a varint
            stream, unary = channel.unary_stream(path), channel.unary_unary(path)
            call = stream(newer).read() if method.server_streaming else unary(newer)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc(caught.value)
            assert isinstance(error, InvalidRequestError), method.name
            assert "99" in [violation.field for violation in error.violations], method.name


@in_loop
@pytest.mark.parametrize("service", [inference_service_pb2, control_service_pb2])
async def test_every_method_that_names_a_model_refuses_another(service):
    async with serving(FakeEngine()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        (descriptor,) = service.DESCRIPTOR.services_by_name.values()
        asked = [method for method in descriptor.methods if "model" in method.input_type.fields_by_name]
        assert asked
        for method in asked:
            path = f"/{descriptor.full_name}/{method.name}"
            stream, unary = channel.unary_stream(path), channel.unary_unary(path)
            number = method.input_type.fields_by_name["model"].number
            other = bytes([number << 3 | 2, 5]) + b"other"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (stream(other).read() if method.server_streaming else unary(other))
            fields = [violation.field for violation in from_rpc(caught.value).violations]
            assert "model" in fields, method.name


@in_loop
async def test_an_interval_is_in_milliseconds_outside_and_in_seconds_inside():
    engine, intervals = FakeEngine(answer), []
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        open_stream = service.open

        def noted(request, caller, *, interval: float = 0.0):
            intervals.append(interval)
            return open_stream(request, caller, interval=interval)

        service.open = noted
        await client.complete("go", interval_ms=250.0)
    assert intervals == [0.25]


# --- readers that fall behind, or ask for fewer messages ---------------------------------------------------


@in_loop
async def test_a_reader_that_falls_behind_gets_fewer_messages_and_the_same_text():
    engine = FakeEngine()
    async with serving(engine) as (service, address), grpc.aio.insecure_channel(address) as channel:
        call = inference_grpc.InferenceServiceStub(channel).Generate(generate_request("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        for count in range(1, 1001):  # all before the loop turns once: this is the loop's thread
            engine.tell("r", token(count))
        engine.tell("r", finished("r", 1000))
        messages = [message async for message in call]
        assert len(messages) < 10
        assert "".join(event.delta.text for m in messages for event in m.events) == "a" * 1000
        assert service.is_idle


@in_loop
async def test_a_reader_with_an_interval_gets_fewer_messages_and_the_same_answer():
    """The interval is longer than the test may take: the last message does not wait for it."""
    engine = FakeEngine()
    async with (
        serving(engine) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as other,
    ):
        counts, answers = [], []
        for name, interval in (("each", 0.0), ("few", 60_000.0)):
            message = generate_request("go", request_id=name, interval_ms=interval)
            call = inference_grpc.InferenceServiceStub(channel).Generate(message)
            await until(engine, lambda e, name=name: name in e.requests)
            steps = [[token(count, name)] for count in range(1, 11)]
            for step in (begin(name), *steps, [finished(name, 10)]):
                engine.tell(name, *step)
                await other.load()  # the loop turns
            messages = [message async for message in call]
            completion = Completion()
            for event in (event for message in messages for event in events_of(message)):
                completion.add(event)
            counts.append(len(messages))
            answers.append((completion.text, completion.trunk.completion_tokens, completion.usage))
        assert counts[1] == 2 < counts[0]
        assert answers[0] == answers[1]
        assert answers[0][:2] == ("a" * 10, 10)


@in_loop
async def test_a_reader_that_does_not_read_is_given_up():
    engine = FakeEngine()
    async with connected(engine, waiting_events=100) as client:
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin(), *(token(count) for count in range(1, 200)))
        with pytest.raises(OverloadedError) as caught:
            await running
        assert (caught.value.reason, caught.value.retry_after) == ("SLOW_CONSUMER", None)
        await until(engine, lambda e: "r" in e.cancelled)


@in_loop
@pytest.mark.parametrize(("reads", "steps"), [(True, 100), (False, 1000)])
async def test_a_full_socket_counts_as_not_reading(reads, steps):
    """gRPC's own buffers are bounded: what a client leaves unread ends up waiting in the server."""
    engine = FakeEngine()
    async with (
        serving(engine, waiting_events=1000) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        message = generate_request("go", request_id="r", logprobs=True, top_logprobs=8)
        call = inference_grpc.InferenceServiceStub(channel).Generate(message)
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        await call.read()
        reader = asyncio.ensure_future(drain(call)) if reads else None
        sample = Sample(97, -1.0, ((1, -2.0),) * 64)
        async with AsyncClient(address) as other:
            for step in range(steps):
                if engine.cancelled:
                    break
                engine.tell("r", *(TokenEmitted("r", 0, sample, 40 * step + i) for i in range(40)))
                await other.load()
        assert bool(engine.cancelled) is not reads
        if reader is not None:
            engine.tell("r", finished("r"))
            await reader
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drain(call)
            assert from_rpc(caught.value).reason == "SLOW_CONSUMER"


async def drain(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata()
        )


# --- the server's life -------------------------------------------------------------------------------------


async def health(channel: grpc.aio.Channel, service: str = "") -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@in_loop
async def test_a_starting_server_says_so():
    async with (
        serving() as (service, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        assert await health(channel) == "NOT_SERVING"
        for call in (client.complete("go"), client.tokenize("go"), client.model_info(), client.load()):
            with pytest.raises(UnavailableError) as caught:
                await call
            assert (caught.value.reason, caught.value.retry_after) == ("STARTING", 1.0)
        info = await client.server_info()
        assert info.state == control_service_pb2.SERVER_STATE_STARTING
        service.serve(Served(engine=FakeEngine(answer), model=served_model()))
        assert [await health(channel, name) for name in ("", *SERVICES)] == ["SERVING"] * 3
        assert (await client.complete("go")).text == "aa"


@in_loop
async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new():
    engine = FakeEngine()
    async with (
        serving(engine) as (service, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        draining = asyncio.ensure_future(service.drain(30))
        await asyncio.to_thread(engine.drained.wait, 10)
        assert await health(channel) == "NOT_SERVING"
        with pytest.raises(UnavailableError) as caught:
            await client.complete("go")
        assert (caught.value.reason, caught.value.retry_after) == ("DRAINING", 1.0)
        assert (await client.server_info()).state == control_service_pb2.SERVER_STATE_DRAINING
        await asyncio.to_thread(answer, engine, engine.requests["r"])
        assert (await running).text == "aa"
        await draining
        assert (await client.server_info()).state == control_service_pb2.SERVER_STATE_STOPPED


@in_loop
async def test_what_a_drain_could_not_finish_is_told_so():
    engine = FakeEngine()
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        await service.drain(0.0)
        with pytest.raises(UnavailableError, match="stopping") as caught:
            await running
        assert (caught.value.reason, caught.value.retry_after) == ("STOPPED", 1.0)


@in_loop
async def test_health_is_watched():
    engine = FakeEngine()
    async with serving(engine) as (service, address), grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICES[0])]
        names = health_pb2.HealthCheckResponse.ServingStatus.Name
        assert [names((await watch.read()).status) for watch in watches] == ["SERVING"] * 2
        await service.drain(0.0)
        assert [names((await watch.read()).status) for watch in watches] == ["NOT_SERVING"] * 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "taper.v1.Unheard")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_when_the_engine_dies_callers_learn_that_and_no_more():
    engine = FakeEngine()
    async with (
        serving(engine) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        engine.state = "FAILED"
        engine.tell("r", *begin(), Failed("Traceback: secret"))
        with pytest.raises(InternalError) as caught:
            await running
        assert (caught.value.request_id, caught.value.reason) == ("r", "ENGINE_FAILED")
        assert caught.value.retry_after is None
        assert "secret" not in str(caught.value)
        assert await health(channel) == "NOT_SERVING"
        with pytest.raises(UnavailableError) as refused:
            await client.complete("go")
        assert (refused.value.reason, refused.value.retry_after) == ("FAILED", 1.0)


@in_loop
async def test_a_bug_is_told_to_the_log_alone(capsys):
    class Broken(FakeEngine):
        def submit(self, request, sink):
            raise KeyError("secret")

    async with serving(Broken()) as (service, address), AsyncClient(address) as client:
        with pytest.raises(InternalError) as caught:
            await client.complete("go", request_id="r")
        assert (caught.value.message, caught.value.request_id) == ("internal error", "r")
        assert service.is_idle
    assert "secret" in capsys.readouterr().out


# --- the other methods -------------------------------------------------------------------------------------


@in_loop
async def test_text_and_ids_are_turned_into_each_other():
    async with connected(FakeEngine()) as client:
        assert await client.tokenize("é") == [257, 0xC3, 0xA9]
        assert await client.tokenize([{"role": "user", "content": "x"}]) == list(b"user: x\n")
        assert await client.detokenize([257, 0xC3, 0xA9]) == "é"
        assert await client.detokenize([257, 97], keep_special_tokens=True) == "<begin>a"
        with pytest.raises(InvalidRequestError, match=r"token_ids\[1\]"):
            await client.detokenize([1, 300])


@in_loop
async def test_a_server_describes_itself():
    before = time.monotonic()
    async with connected(FakeEngine()) as client:
        model, server, load = await client.model_info(), await client.server_info(), await client.load()
        assert (model.model, model.vocab_size, model.max_context_tokens) == ("tiny", 300, 200)
        assert model.default_join == inference_service_pb2.JOIN_REPREFILL
        assert list(model.tag_sets) == ["multiverse"]
        assert model.supports_chat
        assert (server.device, server.device_count, server.policy) == ("fake", 3, "taper")
        assert server.kv_capacity_tokens == 1000
        assert list(server.api_versions) == ["taper.v1"]
        assert server.state == control_service_pb2.SERVER_STATE_SERVING
        assert 0 < server.uptime.ToNanoseconds() / 1e9 <= time.monotonic() - before
        assert (load.kv_used_tokens, load.output_tokens_per_second) == (10, 1.5)


@in_loop
async def test_every_limit_of_the_model_has_a_field_of_its_own():
    served = served_model(
        eos_ids=(7, 8),
        join="kv",
        own_grammar="multiverse",
        max_branches=11,
        max_depth=12,
        max_top_logprobs=13,
        max_logit_bias=14,
        default_max_tokens=15,
        min_tpot=0.5,
        default_slo=Slo(tpot=0.75, ttft=2.0),
    )
    service = Service(CONFIG)
    service.serve(Served(engine=FakeEngine(), model=served))
    async with listening_to(service) as address, AsyncClient(address) as client:
        assert await client.model_info() == control_service_pb2.GetModelInfoResponse(
            model="tiny",
            architecture="qwen3",
            vocab_size=300,
            max_context_tokens=200,
            max_branches=11,
            max_depth=12,
            max_top_logprobs=13,
            max_logit_bias=14,
            default_max_tokens=15,
            eos_token_ids=[7, 8],
            default_join=inference_service_pb2.JOIN_KV,
            tag_sets=["multiverse"],
            default_tag_set="multiverse",
            supports_chat=True,
            min_tpot_slo_ms=500,
            default_tpot_slo_ms=750,
            default_ttft_slo_ms=2000,
        )


@in_loop
async def test_a_server_says_what_it_can_hold_and_which_one_it_is():
    service = Service(ServerConfig(port=0, max_queue=17))
    platform = Platform(largest_bucket=23)
    service.serve(Served(engine=FakeEngine(), model=served_model(), platform=platform))
    async with listening_to(service) as address, AsyncClient(address) as client:
        info = await client.server_info()
        assert (info.max_queued_requests, info.max_step_branches) == (17, 23)
        assert info.instance_id == service.instance_id
        assert info.version


@in_loop
async def test_every_figure_of_the_load_has_a_field_of_its_own():
    class Busy(FakeEngine):
        def load(self) -> Load:
            return Load(SchedulerLoad(1, 2, 3, 4, 5), PredictionAccuracy(), 6.5, steps=7)

    async with connected(Busy()) as client:
        assert await client.load() == control_service_pb2.GetLoadResponse(
            running_requests=1,
            running_branches=2,
            queued_requests=3,
            kv_used_tokens=4,
            kv_capacity_tokens=5,
            output_tokens_per_second=6.5,
            steps=7,
        )


@in_loop
async def test_the_loop_does_not_wait_for_a_long_prompt_to_be_tokenized():
    encoders: set[int] = set()

    class Noting(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            encoders.add(threading.get_ident())
            return super().encode(text, add_special_tokens)

    service = Service(CONFIG)
    service.serve(Served(engine=FakeEngine(answer), model=served_model(tokenizer=Noting())))
    async with listening_to(service) as address, AsyncClient(address) as client:
        for call in (client.complete("go"), client.tokenize("go")):
            encoders.clear()
            await call
            assert encoders
            assert threading.get_ident() not in encoders


@in_loop
async def test_the_policy_can_be_switched_while_running():
    async with connected(FakeEngine()) as client:
        assert await client.set_policy("off") == "taper"
        assert await client.set_policy("eager") == "off"
        assert (await client.server_info()).policy == "eager"
        with pytest.raises(InvalidRequestError, match="policy: 'fast' is not a policy"):
            await client.set_policy("fast")


@in_loop
async def test_reflection_shows_every_service_with_its_real_file_names():
    async with serving(FakeEngine()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**request):
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]))
            return await anext(aiter(call))

        listed = {service.name for service in (await ask(list_services="")).list_services_response.service}
        assert listed >= {*SERVICES, "grpc.health.v1.Health"}
        answer = await ask(file_by_filename="taper/v1/control_service.proto")
        assert answer.file_descriptor_response.file_descriptor_proto


@in_loop
async def test_it_listens_with_the_largest_limits_that_there_can_be():
    most = 2**29 - 1
    ports = Ports(Service(ServerConfig(port=0, max_message_bytes=most, max_client_calls=most)))
    await ports.stop(0)


@in_loop
async def test_a_second_server_does_not_share_the_port():
    async with serving(FakeEngine()) as (_, address):
        taken = int(address.rpartition(":")[2])
        with pytest.raises(OptionError, match=f"^--port: cannot listen on {address}"):
            Ports(Service(ServerConfig(port=taken)))
        with pytest.raises(OptionError, match=f"^--control-port: cannot listen on {address}"):
            Ports(Service(ServerConfig(port=0, control_port=taken)))
        with pytest.raises(OptionError, match=f"^--metrics-port: cannot listen on {address} for metrics: "):
            await serve(
                ServerConfig(port=0, metrics_port=taken, readers=0), lambda *_: pytest.fail("it is loaded")
            )


@in_loop
async def test_requests_are_counted_by_how_they_ended():
    engine = FakeEngine(answer)
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        await client.complete("go")
        await client.load()
        with pytest.raises(ServiceError):
            await client.complete([999])
        with pytest.raises(ServiceError):
            await client.set_policy("fast")
    value = service.metrics.registry.get_sample_value
    assert value("taper_requests_total", {"code": "OK", "tenant": ""}) == 1
    assert value("taper_requests_total", {"code": "INVALID_ARGUMENT", "tenant": ""}) == 1
    assert value("taper_tokens_total", {"kind": "completion", "tenant": ""}) == 2
    assert value("taper_refusals_total", {"reason": "INVALID_FIELD"}) == 1, "of Generate alone"


@pytest.mark.parametrize("wanted", [False, True])
def test_the_load_has_vllms_names_too_if_they_are_asked_for(wanted: bool):
    service = Service(ServerConfig(port=0, vllm_metric_names=wanted))
    service.serve(Served(engine=FakeEngine(), model=served_model(), platform=Platform(page_size=50)))
    value, model = service.metrics.registry.get_sample_value, {"model_name": "tiny"}
    assert value("taper_model_info", model) == 1
    assert value("taper_kv_used_ratio", model) == 0.01
    vllms = model | {"engine": "0"}
    assert value("vllm:kv_cache_usage_perc", vllms) == (0.01 if wanted else None)
    pages = {"block_size": "50", "num_gpu_blocks": "20"}
    assert value("vllm:cache_config_info", vllms | pages) == (1 if wanted else None)


# --- the process -------------------------------------------------------------------------------------------

PROCESS = """
import sys, threading
from serve.config import ServerConfig
from serve.door import Failed
from serve.served import Platform, Served
from serve.server.server import run
from tests.serve.fakes import STEP, FakeEngine, served_model
from tests.serve.server.test_server import answer

def die(engine, request):
    engine.state, engine.failure = "FAILED", "a step found no memory"
    engine.tell(request.id, Failed("the device is gone"))

def answer_late(engine, request):
    engine.drained.wait(10)
    answer(engine, request)

def load(config, on_step):
    if "fails" in sys.argv:
        raise ValueError("no such model")
    if "hangs" in sys.argv:
        print("loading", flush=True)
        threading.Event().wait()
    on_step(STEP)
    work = {"waits": None, "late": answer_late, "dies": die}.get(sys.argv[-1], answer)
    return Served(engine=FakeEngine(work), model=served_model())

run(ServerConfig(port=0, metrics_port=0, drain_timeout=20.0, readers=0), load)
"""


@contextlib.contextmanager
def process(*args: str):
    command = [sys.executable, "-c", PROCESS, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def ready(child: subprocess.Popen) -> str:
    line = child.stdout.readline()
    assert line.startswith("taper-serve ready on 127.0.0.1:"), line + child.stderr.read()
    return line.split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_process_ends_well(number):
    with process() as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                return (await client.complete("go")).text

        assert asyncio.run(use()) == "aa"
        child.send_signal(number)
        assert child.wait(20) == 0, child.stderr.read()
        assert child.stdout.read() == ""


def test_what_runs_when_the_signal_comes_is_finished():
    with process("late") as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                running = asyncio.ensure_future(client.complete("go"))
                while not (await client.load()).running_requests:
                    pass
                child.send_signal(signal.SIGTERM)
                return (await running).text

        assert asyncio.run(use()) == "aa"
        assert child.wait(15) == 0, child.stderr.read()


def test_a_second_signal_does_not_wait_for_what_runs():
    with process("waits") as child:
        address = ready(child)

        async def use() -> None:
            async with AsyncClient(address) as client:
                running = asyncio.ensure_future(client.complete("go"))
                while not (await client.load()).running_requests:
                    pass
                child.send_signal(signal.SIGTERM)
                while (await client.server_info()).state == control_service_pb2.SERVER_STATE_SERVING:
                    pass
                child.send_signal(signal.SIGTERM)
                with pytest.raises(UnavailableError):
                    await running

        asyncio.run(use())
        assert child.wait(15) == 0, child.stderr.read()


def test_a_signal_ends_a_start_that_has_not_come_to_its_end():
    with process("hangs") as child:
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(15) == 0, child.stderr.read()


def test_when_the_engine_dies_callers_are_told_and_the_process_ends_with_an_error():
    with process("dies") as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                with pytest.raises(InternalError) as caught:
                    await client.complete("go")
                return caught.value.reason

        assert asyncio.run(use()) == "ENGINE_FAILED"
        assert child.wait(15) == 1
        assert "EngineFailedError: the engine failed: a step found no memory" in child.stderr.read()


def test_a_failed_start_ends_the_process_with_its_reason():
    with process("fails") as child:
        assert child.wait(20) == 1
        assert "no such model" in child.stderr.read()


def test_metrics_are_served_on_a_port_of_their_own():
    with process() as child:
        ready(child)
        line = next(line for line in child.stderr if "/metrics" in line)
        url = line[line.index("http") :].split()[0].split("\x1b")[0]
        with urllib.request.urlopen(url, timeout=10) as response:
            page = response.read()
        assert b'taper_kv_capacity_tokens{model_name="tiny"} 1000.0' in page
        assert b"taper_step_seconds_count 1.0" in page, "of every step that the loader tells of"


def test_finished_is_the_clients_last_event():
    engine = FakeEngine(answer)

    async def use() -> list:
        async with connected(engine) as client:
            return [event async for event in client.generate("go")]

    assert isinstance(asyncio.run(use())[-1], Finished)
