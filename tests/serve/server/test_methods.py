"""The methods beside Generate: tokens of a text, the model, the server, its load, its policy; reflection."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from scheduler.predictor import PredictionAccuracy
from scheduler.request import Slo
from scheduler.scheduler import SchedulerLoad
from serve.config import ServerConfig
from serve.door import Load
from serve.served import Platform, Served
from serve.server.ports import SERVICES
from serve.server.service import Service
from taper_client import AsyncClient
from taper_client.errors import InvalidRequestError
from taper_client.v1 import control_service_pb2, inference_service_pb2
from tests.serve.fakes import ByteTokenizer, FakeEngine, served_model
from tests.serve.server.own_loop import CONFIG, answer, connected, in_loop, listening_to, serving


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
