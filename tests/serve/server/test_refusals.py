"""What is refused, at any method: with which status, by which path, and whether to come back."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.gate import RejectedError
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.stopping import Stopping
from serve.door import Refused, Sink
from taper_client import AsyncClient, generate_request, parallel
from taper_client.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    from_rpc,
)
from taper_client.v1 import control_service_pb2, inference_service_pb2
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.fakes import ByteTokenizer, FakeEngine
from tests.serve.server.own_loop import answer, connected, in_loop, serving, under_way


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
        running = await under_way(engine, client)
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
