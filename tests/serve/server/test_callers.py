"""Who calls: what each may do, and that no tenant learns or takes anything of another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.events import Started
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from serve.config import ServerConfig
from serve.engine.engine import InProcessEngine
from serve.server import tokens
from serve.server.callers import Callers
from serve.server.methods import full_name
from serve.server.ports import SERVICES, Ports
from serve.server.server import shut_down
from serve.text.codec import TextCodec
from taper_client import generate_request
from taper_client.errors import ServiceError, UnauthenticatedError, from_rpc
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb
from tests.bench.served import Runner
from tests.serve.fakes import ByteTokenizer, FakeEngine, begin
from tests.serve.server.own_loop import answer, in_loop, listening_to
from tests.serve.server.raw_calls import connection, served_by, soon
from tests.serve.server.token_files import entry

GENERATE, ABORT = "/taper.v1.InferenceService/Generate", "/taper.v1.ControlService/Abort"
HEALTH, REFLECTION = full_name(health_pb2), full_name(reflection_pb2)
ALLOWED = {
    "Generate": {"generate"},
    "Tokenize": {"generate"},
    "Detokenize": {"generate"},
    "GetModelInfo": {"generate", "control", "metrics"},
    "GetServerInfo": {"control", "metrics"},
    "GetLoad": {"control", "metrics"},
    "Abort": {"generate"},
    "SetPolicy": {"control"},
    "ServerReflectionInfo": {"generate", "control", "metrics"},
}
TENANTS = {name: f"the-token-of-{name}-here" for name in ("ann", "bob")}
ROLES = {role: f"a-token-for-{role}-only" for role in ("generate", "control", "metrics")}


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    file = tmp_path / "tokens.toml"
    lines = [entry(name, token=token) for name, token in TENANTS.items()]
    lines += [entry("one", f'["{role}"]', token=token) for role, token in ROLES.items()]
    file.write_text("".join(lines))
    return ServerConfig(port=0, tokens=str(file), max_client_calls=3)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def ann(method: grpc.aio.UnaryStreamMultiCallable, message: bytes) -> grpc.aio.UnaryStreamCall:
    return method(message, metadata=bearer(TENANTS["ann"]))


async def end_of(
    channel: grpc.aio.Channel, method: str, message: bytes = b"", token: str | None = None
) -> ServiceError | None:
    """How a call ends, whatever streams in it; None: well.

    A message goes out with the call: where it followed, gRPC's client would say INTERNAL of a call that is
    refused meanwhile.
    """
    call = channel.unary_stream(method)(message, metadata=bearer(token) if token else None)
    try:
        async for _ in call:
            call.cancel()
            return None
    except grpc.aio.AioRpcError as error:
        return from_rpc(error)
    return None


async def abort(channel: grpc.aio.Channel, name: str, token: str) -> list[str]:
    message = control_pb.AbortRequest(request_ids=[name]).SerializeToString()
    answered = await channel.unary_unary(ABORT)(message, metadata=bearer(token))
    return [*control_pb.AbortResponse.FromString(answered).aborted_request_ids]


def go(**options) -> bytes:
    return generate_request("go", **options).SerializeToString()


def every_method() -> Iterator[tuple[str, str]]:
    """Of all services of the server: path and name."""
    for service in (*SERVICES, REFLECTION):
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            yield f"/{service}/{method.name}", method.name


# --- who may do what ---------------------------------------------------------------------------------------


@in_loop
async def test_every_method_but_health_asks_for_a_token_of_one_of_its_roles(config: ServerConfig) -> None:
    service = served_by(FakeEngine(answer), config)
    assert {name for _, name in every_method()} == ALLOWED.keys()
    async with listening_to(service) as address:
        for path, name in every_method():
            async with connection(address) as channel:
                for token, reason in ((None, "NO_TOKEN"), ("not-one-of-the-tokens", "WRONG_TOKEN")):
                    error = await end_of(channel, path, b"", token)
                    assert error is not None, name
                    assert (error.code.name, error.reason) == ("UNAUTHENTICATED", reason), name
                for role, token in ROLES.items():
                    error = await end_of(channel, path, b"", token)
                    refused = error is not None and error.code.name == "PERMISSION_DENIED"
                    assert refused == (role not in ALLOWED[name]), (name, role)
        async with connection(address) as channel:
            assert await end_of(channel, f"/{HEALTH}/Check") is None
            assert await end_of(channel, f"/{HEALTH}/Watch", b"", "not-one-of-the-tokens") is None


@in_loop
async def test_nobody_without_a_token_is_asked_for_a_message_or_counted(
    config: ServerConfig,
) -> None:
    service = served_by(FakeEngine(), config)
    async with listening_to(service) as address, connection(address) as channel:
        silent = [channel.stream_stream(GENERATE)() for _ in range(10)]  # no message ever comes
        for call in silent:
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert service.inference.is_empty


@in_loop
async def test_who_is_refused_and_does_not_wait_to_be_told_shares_a_line(config: ServerConfig) -> None:
    service = served_by(FakeEngine(), replace(config, max_client_calls=16))
    ended: list[tuple[str, str]] = []
    service.request_ended = lambda call, code, reason: ended.append((code, reason))  # type: ignore[method-assign]
    async with listening_to(service) as address, connection(address) as channel:
        calls = [channel.stream_stream(GENERATE)() for _ in range(30)]
        await soon(lambda: len(ended) >= 20 and not service.inference.is_empty)
        for call in calls:
            call.cancel()
        await soon(lambda: service.inference.is_empty)
    assert {*ended} == {("UNAUTHENTICATED", "NO_TOKEN")}


@in_loop
async def test_operators_may_have_an_address_of_their_own(config: ServerConfig) -> None:
    service = served_by(FakeEngine(answer), ServerConfig(port=0, control_port=0, control_host="localhost"))
    ports = Ports(service)
    assert ports.control.startswith("localhost:")
    assert ports.control != ports.address
    await ports.start()
    missing: dict[str, set[str]] = {"address": set(), "control": set()}
    for at in missing:
        async with connection(getattr(ports, at)) as channel:
            for path, name in every_method():
                error = await end_of(channel, path)
                if error is not None and error.code is grpc.StatusCode.UNIMPLEMENTED:
                    missing[at].add(name)
            assert await end_of(channel, f"/{HEALTH}/Check") is None
    await shut_down(ports, service, timeout=0.0)
    assert missing["address"] == {"GetServerInfo", "GetLoad", "SetPolicy", "ServerReflectionInfo"}
    assert missing["control"] == {"Generate", "Tokenize", "Detokenize"}


@in_loop
async def test_a_token_that_is_replaced_ends_nothing_that_runs(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LOOK_SECONDS", 0.0)
    engine = FakeEngine()
    service = served_by(engine, config)
    async with listening_to(service) as address, connection(address) as channel:
        running = ann(channel.unary_stream(GENERATE), go(request_id="r"))
        await soon(lambda: engine.requests)
        assert config.tokens is not None
        Path(config.tokens).write_text(entry("ann", token="the-token-that-follows"))
        refused = await end_of(channel, GENERATE, go(), TENANTS["ann"])
        assert refused is not None
        assert refused.reason == "WRONG_TOKEN"
        await asyncio.to_thread(answer, engine, engine.requests["ann/r"])
        assert [pb.GenerateResponse.FromString(message) async for message in running]
        assert await abort(channel, "unknown", "the-token-that-follows") == []


class Certified:
    """A call with a certificate of these names."""

    def __init__(self, *names: bytes) -> None:
        self._names = names

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def peer_identities(self) -> tuple[bytes, ...] | None:
        return self._names or None


@pytest.mark.parametrize("names", [(), (b"",), (b"a\0b",), (b"\xff",), (b"a\nb",), (b"a" * 257,)])
def test_a_certificate_whose_name_could_be_taken_for_another_is_refused(names: tuple[bytes, ...]) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        Callers(certificates=True).of(Certified(*names))  # type: ignore[arg-type]
    assert caught.value.reason == "WRONG_CERTIFICATE"


def test_a_certificate_s_first_name_is_the_tenant_where_all_have_one() -> None:
    named = Certified("spiffe://übung/a".encode(), b"other")
    for certificates, tenant in ((True, "spiffe://übung/a"), (False, None)):
        assert Callers(certificates=certificates).of(named).tenant == tenant  # type: ignore[arg-type]


# --- tenants -----------------------------------------------------------------------------------------------


@in_loop
async def test_a_tenant_s_ids_are_its_own(config: ServerConfig) -> None:
    engine = FakeEngine()
    service = served_by(engine, config)
    async with listening_to(service) as address, connection(address) as one, connection(address) as other:
        calls = [
            one.unary_stream(GENERATE)(go(request_id="r"), metadata=bearer(token))
            for token in TENANTS.values()
        ]
        await soon(lambda: len(engine.requests) == 2)
        twice = await end_of(other, GENERATE, go(request_id="r"), TENANTS["ann"])
        assert twice is not None
        assert (twice.reason, "ann" in str(twice)) == ("DUPLICATE", False)
        assert await abort(other, "r", ROLES["generate"]) == [], "a third tenant has none of this id"
        assert await abort(other, "ann/r", TENANTS["bob"]) == []
        assert await abort(other, "r", TENANTS["ann"]) == ["r"]
        assert await calls[0].code() is grpc.StatusCode.CANCELLED
        assert {*engine.cancelled} == {"ann/r"}
        engine.tell("bob/r", Started("bob/r", 3, 0), begin("bob/r", 0))
        (event, _) = pb.GenerateResponse.FromString(await calls[1].read()).events
        assert event.started.request_id == "r", "what a tenant hears has its own id"
        calls[1].cancel()
        await soon(lambda: service.is_idle)


@in_loop
async def test_limits_are_a_tenant_s_over_all_of_its_connections(config: ServerConfig) -> None:
    engine = FakeEngine()
    service = served_by(engine, config)
    async with listening_to(service) as address, contextlib.AsyncExitStack() as channels:
        one, two, three, four = [await channels.enter_async_context(connection(address)) for _ in range(4)]
        held = [ann(channel.unary_stream(GENERATE), go()) for channel in (one, two, three)]
        await soon(lambda: len(engine.requests) == 3)
        error = await end_of(four, GENERATE, go(), TENANTS["ann"])
        assert error is not None
        assert error.reason == "TOO_MANY_CALLS"
        held.append(four.unary_stream(GENERATE)(go(), metadata=bearer(TENANTS["bob"])))
        await soon(lambda: len(engine.requests) == 4)
        assert [request.client for request in engine.requests.values()] == ["ann"] * 3 + ["bob"]
        for call in held:
            call.cancel()
        await soon(lambda: service.is_idle)


@in_loop
async def test_counters_are_by_tenant(config: ServerConfig) -> None:
    service = served_by(FakeEngine(answer), config)
    async with listening_to(service) as address, connection(address) as channel:
        for token in (*TENANTS.values(), TENANTS["bob"]):
            assert len(
                [message async for message in channel.unary_stream(GENERATE)(go(), metadata=bearer(token))]
            )
        assert await end_of(channel, GENERATE, go(), "not-one-of-the-tokens")
    value = service.metrics.registry.get_sample_value
    for tenant, calls in (("ann", 1), ("bob", 2)):
        assert value("taper_requests_total", {"code": "OK", "tenant": tenant}) == calls
        assert value("taper_tokens_total", {"kind": "completion", "tenant": tenant}) == 2 * calls
    assert value("taper_requests_total", {"code": "UNAUTHENTICATED", "tenant": ""}) == 1


@contextlib.asynccontextmanager
async def caching(config: ServerConfig) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server with the real engine and scheduler, and so a prefix cache."""
    scheduling = SchedulerConfig(num_pages=64, page_size=4, num_slots=16, max_context=200, max_queue=8)
    scheduler = Scheduler(scheduling, Controller(StepLatencyModel({8: 1e-6})), TextCodec(ByteTokenizer()))
    engine = InProcessEngine(scheduler, Runner())
    engine.start()
    try:
        async with listening_to(served_by(engine, config)) as address, connection(address) as channel:
            yield channel
    finally:
        engine.stop(drain=False, timeout=10.0)


async def cached(channel: grpc.aio.Channel, token: str, salt: str = "") -> int:
    message = generate_request("a prompt of some pages", max_tokens=1, cache_salt=salt).SerializeToString()
    call = channel.unary_stream(GENERATE)(message, metadata=bearer(token))
    events = [
        event
        for data in [data async for data in call]
        for event in pb.GenerateResponse.FromString(data).events
    ]
    (started,) = [event.started for event in events if event.HasField("started")]
    (finished,) = [event.finished for event in events if event.HasField("finished")]
    assert finished.usage.cached_tokens == started.cached_tokens
    return started.cached_tokens


@in_loop
async def test_cached_prompts_are_a_tenant_s_own(config: ServerConfig) -> None:
    async with caching(config) as channel:
        seen = [await cached(channel, TENANTS[name]) for name in ("ann", "ann", "bob", "bob", "ann")]
        assert seen == [0, 20, 0, 20, 20]
        assert await cached(channel, TENANTS["bob"], "ann\0") == 0, "a salt does not lead to another tenant"
        assert await cached(channel, ROLES["generate"], "ann") == 0


@in_loop
async def test_tenants_share_cached_prompts_where_they_are_told_to(config: ServerConfig) -> None:
    shared = ServerConfig(port=0, tokens=config.tokens, share_prefix_cache=True)
    async with caching(shared) as channel:
        assert [await cached(channel, TENANTS[name]) for name in ("ann", "bob")] == [0, 20]
