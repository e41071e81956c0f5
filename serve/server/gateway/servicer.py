"""The RPCs of `vllm.grpc.engine.VllmEngine`, by the same calls of the `Service` as those of taper.v1.

Those that are not here (embeddings, profiles, a stream of KV events, an emptied cache) end with
UNIMPLEMENTED, and gateways do without them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import UTC, datetime

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from model.find import tokenizer_folder
from serve.reading.envelope import look
from serve.reading.requests import is_id
from serve.reading.work import Job, Prompted
from serve.server.answering import answer
from serve.server.calls import Call
from serve.server.gateway.messages import AnswerWriter
from serve.server.gateway.tokenizer import archive
from serve.server.service import Service
from taper_client.errors import InvalidRequestError, ServiceError, Violation

_SERVER_TYPE = "vllm-grpc"  # by which a gateway knows what it speaks with
_CHUNK_BYTES = 1 << 20  # of the tokenizer's archive


class GatewayServicer:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._archive: bytes | None = None
        self._archiving = asyncio.Lock()

    async def generate(self, call: Call) -> None:
        service = self.service
        service.check_queue(call.caller.client)
        data = await service.arrivals.message(call)
        request_id, _ = look(data, vllm.GenerateRequest)
        if not is_id(request_id):
            text = "1 to 128 letters, digits, '.', '_' and '-' are needed: it is what Abort names"
            raise InvalidRequestError.of([Violation("request_id", text)])
        call.id = request_id
        prompted = await service.read(Job("GatewayGenerate", data, request_id), call.caller)
        assert isinstance(prompted, Prompted)
        manner = vllm.GenerateRequest.FromString(prompted.output)
        asked = manner.sampling_params
        writer = AnswerWriter(answers=asked.n, streams=manner.stream, has_logprobs=asked.HasField("logprobs"))
        await answer(service, call, prompted.request, writer)

    async def abort(self, call: Call) -> vllm.AbortResponse:
        """A gateway's client that hangs up arrives so."""
        request = await call.read(vllm.AbortRequest)
        await self.service.abort_each(request.request_ids, call.caller)
        return vllm.AbortResponse()

    async def health_check(self, call: Call) -> vllm.HealthCheckResponse:
        """Fails until the model is loaded: a gateway that gets any answer asks for the model at once, and
        takes a worker that has none yet for one of an unknown model."""
        await call.read(vllm.HealthCheckRequest)
        self.service.served()
        state = self.service.state
        return vllm.HealthCheckResponse(healthy=state == "SERVING", message=state.lower())

    async def get_model_info(self, call: Call) -> vllm.GetModelInfoResponse:
        await call.read(vllm.GetModelInfoRequest)
        model = self.service.served().model
        return vllm.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            tokenizer_path=model.name,
            is_generation=True,
            max_context_length=model.max_context,
            max_req_input_len=model.max_context - 1,
            vocab_size=model.vocab_size,
            model_type=model.architecture,
            eos_token_ids=model.eos_ids,
        )

    async def get_server_info(self, call: Call) -> vllm.GetServerInfoResponse:
        await call.read(vllm.GetServerInfoRequest)
        served = self.service.served()
        return vllm.GetServerInfoResponse(
            active_requests=served.engine.load().scheduler.running_requests,
            uptime_seconds=time.monotonic() - self.service.started,
            server_type=_SERVER_TYPE,
            data_parallel_size=1,
            block_size=served.platform.page_size,
            max_num_seqs=served.platform.largest_bucket,
        )

    async def get_loads(self, call: Call) -> vllm.GetLoadsResponse:
        await call.read(vllm.GetLoadsRequest)
        served = self.service.served()
        load = served.engine.load()
        now = load.scheduler
        told = vllm.SchedulerLoad(
            num_running_reqs=now.running_requests,
            num_waiting_reqs=now.queued_requests,
            num_total_reqs=now.running_requests + now.queued_requests,
            num_used_tokens=now.kv_used_tokens,
            max_total_num_tokens=now.kv_capacity_tokens,
            token_usage=load.kv_used_ratio,
            gen_throughput=load.output_tokens_per_second,
            max_running_requests=served.platform.largest_bucket,
        )
        moment = datetime.now(UTC).isoformat()
        return vllm.GetLoadsResponse(timestamp=moment, dp_rank_count=1, loads=[told])

    async def get_tokenizer(self, call: Call) -> None:
        await call.read(common.GetTokenizerRequest)
        self.service.served()
        data = await self._tokenizer()
        if data is None:
            error = ServiceError("this model has no tokenizer: the gateway needs one of its own")
            error.code = grpc.StatusCode.NOT_FOUND
            raise error
        digest = hashlib.sha256(data).hexdigest()
        for at in range(0, len(data), _CHUNK_BYTES):
            part = data[at : at + _CHUNK_BYTES]
            last = at + _CHUNK_BYTES >= len(data)
            chunk = common.GetTokenizerChunk(data=part, sha256=digest if last else "")
            await call.write(chunk.SerializeToString())

    async def _tokenizer(self) -> bytes | None:
        """The archive, which is made once: a large one takes a core for a second."""
        async with self._archiving:
            if self._archive is None:
                folder = tokenizer_folder(self.service.config.model)
                self._archive = await asyncio.to_thread(archive, folder)
        return self._archive
