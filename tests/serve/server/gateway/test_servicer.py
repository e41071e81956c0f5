"""The server as a gateway meets it, over a real socket, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as vllm_grpc

from scheduler.predictor import PredictionAccuracy
from scheduler.scheduler import SchedulerLoad
from serve.config import OptionError, ServerConfig
from serve.door import Load, Refused
from serve.reading.work import Job
from serve.server import exposure
from serve.server.gateway import servicer
from serve.server.ports import Ports
from serve.server.server import shut_down
from serve.server.service import Service
from serve.server.tls import Certificates
from taper_client import AsyncClient, ServiceError, UnavailableError
from tests.serve.authorities import Authority
from tests.serve.fakes import FakeEngine, fork_and_join
from tests.serve.server.gateway.own_loop import CONFIG, answer, opened, serve
from tests.serve.server.own_loop import in_loop, until
from tests.serve.server.token_files import entry


def asked(name: str = "r", **fields: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(request_id=name, tokenized=vllm.TokenizedInput(input_ids=[5]), **fields)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), caught.value.details() or ""


@in_loop
async def test_an_answer_is_streamed_or_told_at_once() -> None:
    async with opened(FakeEngine(answer)) as (_, _, stub):
        *chunks, last = [message async for message in stub.Generate(asked(stream=True))]
        assert b"".join(bytes(each.chunk.token_ids) for each in chunks) == b"ab"
        assert not last.HasField("chunk")
        [only] = [message async for message in stub.Generate(asked("s"))]
        assert bytes(only.complete.output_ids) == b"ab"


class Unread:
    """A reader that is at it for ever."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def read(self, job: Job, client: str) -> asyncio.Future[Any]:
        self.jobs.append(job)
        return asyncio.get_running_loop().create_future()


@in_loop
async def test_a_message_is_left_to_the_readers_and_known_by_its_id_meanwhile() -> None:
    """What it costs to parse and to translate is its sender's choice."""
    async with opened(FakeEngine()) as (service, _, stub):
        readers = Unread()
        service.serve(service.served(), readers)
        message = asked(sampling_params=vllm.SamplingParams(n=1 << 31, stop=["x"] * 100_000))
        ended = asyncio.ensure_future(failure(stub.Generate(message)))
        while not readers.jobs:
            await asyncio.sleep(0.001)
        assert readers.jobs == [Job("GatewayGenerate", message.SerializeToString(), "r")]
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]))
        assert (await ended)[0] is grpc.StatusCode.CANCELLED


@in_loop
async def test_branches_are_one_text() -> None:
    async with opened(FakeEngine(fork_and_join), own_grammar="multiverse") as (_, _, stub):
        [only] = [message async for message in stub.Generate(asked())]
    assert bytes(only.complete.output_ids) == b"Hi. Tea: goodCoffee: bad, or x, and y So: tea."
    assert only.complete.completion_tokens == 17


@in_loop
async def test_who_hangs_up_aborts_and_the_engine_forgets_the_request() -> None:
    engine = FakeEngine()
    async with opened(engine) as (_, _, stub):
        call = stub.Generate(asked(stream=True))
        ended = asyncio.ensure_future(failure(call))
        await until(engine, lambda engine: "r" in engine.requests)
        await stub.Abort(vllm.AbortRequest(request_ids=["r", "unknown"]))
        assert (await ended)[0] is grpc.StatusCode.CANCELLED
        await until(engine, lambda engine: "r" in engine.cancelled)


@in_loop
async def test_a_gateway_learns_why_a_request_is_refused() -> None:
    engine = FakeEngine(answer)
    async with opened(engine) as (_, _, stub):
        code, details = await failure(stub.Generate(asked(sampling_params=vllm.SamplingParams(min_tokens=1))))
        assert (code, "sampling_params.min_tokens" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        code, details = await failure(stub.Generate(asked("no id")))
        assert (code, "request_id" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        code, _ = await failure(stub.Generate(vllm.GenerateRequest(request_id="r")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        engine.refusal = Refused("QUEUE_FULL", "256 requests are waiting already")
        assert (await failure(stub.Generate(asked())))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


@in_loop
async def test_it_is_healthy_when_it_serves_and_says_nothing_before_its_model_is_loaded() -> None:
    """A gateway that had an answer would take it for a worker of an unknown model."""
    async with opened() as (service, ports, stub):
        for method, request in (
            (stub.HealthCheck, vllm.HealthCheckRequest()),
            (stub.GetModelInfo, vllm.GetModelInfoRequest()),
            (stub.GetServerInfo, vllm.GetServerInfoRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(request)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        serve(service, FakeEngine(answer))
        assert (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
        async with grpc.aio.insecure_channel(ports.gateway) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            told = await health.Check(health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine"))
        assert told.status == health_pb2.HealthCheckResponse.SERVING
        service.draining = True
        assert not (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
        assert (await failure(stub.Generate(asked())))[0] is grpc.StatusCode.UNAVAILABLE


@in_loop
async def test_a_gateway_learns_what_is_served_and_how_busy_it_is() -> None:
    async with opened(FakeEngine(answer)) as (_, _, stub):
        model = await stub.GetModelInfo(vllm.GetModelInfoRequest())
        server = await stub.GetServerInfo(vllm.GetServerInfoRequest())
        [load] = (await stub.GetLoads(vllm.GetLoadsRequest())).loads
    assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("tiny", 200, 300)
    assert ([*model.eos_token_ids], model.is_generation) == ([256], True)
    assert (server.server_type, server.block_size, server.max_num_seqs) == ("vllm-grpc", 16, 64)
    assert (load.num_used_tokens, load.max_total_num_tokens, load.token_usage) == (10, 1000, 0.01)


@in_loop
async def test_the_tokenizer_comes_whole_with_its_digest() -> None:
    async with opened(FakeEngine(answer)) as (_, _, stub):
        chunks = [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()


@in_loop
async def test_the_tokenizer_is_packed_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Path] = []
    large = bytes(5 << 19)  # of three chunks

    def pack(folder: Path) -> bytes:
        packed.append(folder)
        return large

    async def data(call: Any) -> bytes:
        chunks = [chunk async for chunk in call]
        assert [chunk.sha256 for chunk in chunks] == ["", "", hashlib.sha256(large).hexdigest()]
        return b"".join(chunk.data for chunk in chunks)

    monkeypatch.setattr(servicer, "archive", pack)
    async with opened(FakeEngine(answer)) as (_, _, stub):
        calls = [data(stub.GetTokenizer(common.GetTokenizerRequest())) for _ in range(3)]
        assert await asyncio.gather(*calls) == [large] * 3
    assert len(packed) == 1


@in_loop
async def test_a_model_without_a_tokenizer_has_none_to_give(tmp_path: Path) -> None:
    config = ServerConfig(port=0, gateway_port=0, model=str(tmp_path))
    async with opened(FakeEngine(answer), config) as (_, _, stub):
        assert (await failure(stub.GetTokenizer(common.GetTokenizerRequest())))[
            0
        ] is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_what_a_gateway_can_do_without_is_not_implemented() -> None:
    async with opened(FakeEngine(answer)) as (_, _, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(vllm.EmbedRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@in_loop
async def test_gateways_bring_no_token_and_others_do_not_come_in_by_their_door(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry(roles='["generate", "control"]', token="a-token-that-may-generate"))
    config = ServerConfig(port=0, gateway_port=0, tokens=str(tokens))
    certificates = Certificates(Authority(tmp_path).issue())
    async with opened(FakeEngine(answer), config, certificates) as (_, ports, stub):
        assert [message async for message in stub.Generate(asked())]
        async with AsyncClient(ports.gateway) as client:  # a client of taper.v1
            with pytest.raises(ServiceError) as caught:
                await client.complete("go")
            assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
        async with AsyncClient(ports.address) as client:  # in plaintext, where TLS is spoken
            with pytest.raises(UnavailableError, match="TLS"):
                await client.complete("go", timeout=5)


@in_loop
async def test_there_is_no_door_for_gateways_unless_one_is_asked_for() -> None:
    service = Service(ServerConfig(port=0))
    ports = Ports(service)
    await ports.start()
    assert ports.gateway is None
    async with grpc.aio.insecure_channel(ports.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await vllm_grpc.VllmEngineStub(channel).HealthCheck(vllm.HealthCheckRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await shut_down(ports, service, timeout=0.0)


@in_loop
async def test_an_address_that_is_taken_is_said_with_its_option() -> None:
    async with opened(FakeEngine(answer)) as (_, ports, _):
        taken = int(str(ports.gateway).rpartition(":")[2])
        with pytest.raises(OptionError, match="--gateway-port"):
            Ports(Service(ServerConfig(port=0, gateway_port=taken)))


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True), ("::", True)])
def test_an_operator_is_warned_where_others_reach_it(
    host: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(exposure.log, "warning", lambda text, **facts: said.append(facts["see"]))
    exposure.warn_of_open_gateway(host)
    assert said == ["--gateway-host"] * warned


class BusyEngine(FakeEngine):
    """One whose queue is full."""

    def load(self) -> Load:
        now = SchedulerLoad(3, 5, CONFIG.max_queue, kv_used_tokens=10, kv_capacity_tokens=1000)
        return Load(now, PredictionAccuracy(), output_tokens_per_second=1.5, steps=0)


@in_loop
async def test_a_full_queue_is_told_and_refuses_before_there_is_a_prompt_to_read() -> None:
    engine = BusyEngine(answer)
    async with opened(engine) as (_, _, stub):
        [load] = (await stub.GetLoads(vllm.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs) == (3, CONFIG.max_queue)
        assert load.num_total_reqs == 3 + CONFIG.max_queue
        code, _ = await failure(stub.Generate(asked()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert engine.requests == {}
