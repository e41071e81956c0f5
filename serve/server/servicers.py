"""The RPCs of taper.v1: messages in, calls of the `Service`, messages out."""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any

from serve.reading.envelope import look
from serve.reading.faults import check_model, unknown_fields
from serve.reading.requests import is_id
from serve.reading.work import Job, Prompted
from serve.served import ServedModel
from serve.server.answering import answer
from serve.server.calls import Call
from serve.server.responses import ResponseWriter, duration
from serve.server.service import Service
from taper_client.errors import InvalidRequestError, Violation
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb

_STATES = {
    "STARTING": control_pb.SERVER_STATE_STARTING,
    "SERVING": control_pb.SERVER_STATE_SERVING,
    "DRAINING": control_pb.SERVER_STATE_DRAINING,
    "STOPPED": control_pb.SERVER_STATE_STOPPED,
    "FAILED": control_pb.SERVER_STATE_FAILED,
}


class InferenceServicer:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def generate(self, call: Call) -> None:
        """What needs no prompt is refused before there is one to read."""
        service = self.service
        service.check_queue(call.caller.client)
        request, output = await self._prompted(call)
        options = pb.OutputOptions.FromString(output)
        speller = service.speller(skip_special_tokens=not options.keep_special_tokens)
        writer = ResponseWriter(request, options, speller, server=call.server)
        await answer(service, call, request, writer, interval=options.interval_ms / 1e3)

    async def _prompted(self, call: Call) -> Prompted:
        """The request that the call brings. From the moment its message is here, its id is known."""
        data = await self.service.arrivals.message(call)
        request_id, model = look(data)
        if is_id(request_id):
            call.id = request_id
        if violations := [*check_model(model, self.service.accepting().model)]:
            raise InvalidRequestError.of(violations)
        prompted = await self.service.read(Job("Generate", data, call.id), call.caller)
        assert isinstance(prompted, Prompted)
        return prompted

    async def tokenize(self, call: Call) -> bytes:
        self.service.served()
        job = Job("Tokenize", await self.service.arrivals.message(call), call.id)
        return await self._read(job, call)

    async def detokenize(self, call: Call) -> bytes:
        self.service.served()
        job = Job("Detokenize", await self.service.arrivals.message(call), call.id)
        return await self._read(job, call)

    async def _read(self, job: Job, call: Call) -> bytes:
        response = await self.service.read(job, call.caller)
        assert isinstance(response, bytes)
        return response


class ControlServicer:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def get_model_info(self, call: Call) -> control_pb.GetModelInfoResponse:
        request = await call.read(control_pb.GetModelInfoRequest)
        model = self.service.served().model
        _check(request, model)
        return control_pb.GetModelInfoResponse(
            model=model.name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_context_tokens=model.max_context,
            max_branches=model.max_branches,
            max_depth=model.max_depth,
            max_top_logprobs=model.max_top_logprobs,
            max_logit_bias=model.max_logit_bias,
            default_max_tokens=model.default_max_tokens,
            eos_token_ids=model.eos_ids,
            default_join=pb.JOIN_KV if model.join == "kv" else pb.JOIN_REPREFILL,
            tag_sets=model.grammars,
            default_tag_set=model.own_grammar or "",
            supports_chat=model.tokenizer.supports_chat,
            min_tpot_slo_ms=1e3 * model.min_tpot,
            default_tpot_slo_ms=1e3 * model.default_slo.tpot,
            default_ttft_slo_ms=1e3 * model.default_slo.ttft,
        )

    async def get_server_info(self, call: Call) -> control_pb.GetServerInfoResponse:
        request = await call.read(control_pb.GetServerInfoRequest)
        _check(request)
        service, config = self.service, self.service.config
        info = control_pb.GetServerInfoResponse(
            version=_version(),
            api_versions=[pb.DESCRIPTOR.package],
            instance_id=service.instance_id,
            policy=config.policy,
            state=_STATES[service.state],
            max_queued_requests=config.max_queue,
            uptime=duration(time.monotonic() - service.started),
        )
        if service.state != "STARTING":
            served = service.served()
            info.device, info.device_count = served.platform.device, served.platform.devices
            info.policy = served.engine.policy
            info.max_step_branches = served.platform.largest_bucket
            info.kv_capacity_tokens = served.engine.load().scheduler.kv_capacity_tokens
        return info

    async def get_load(self, call: Call) -> control_pb.GetLoadResponse:
        request = await call.read(control_pb.GetLoadRequest)
        _check(request)
        load = self.service.served().engine.load()
        now = load.scheduler
        return control_pb.GetLoadResponse(
            running_requests=now.running_requests,
            running_branches=now.running_branches,
            queued_requests=now.queued_requests,
            kv_used_tokens=now.kv_used_tokens,
            kv_capacity_tokens=now.kv_capacity_tokens,
            output_tokens_per_second=load.output_tokens_per_second,
            steps=load.steps,
        )

    async def abort(self, call: Call) -> control_pb.AbortResponse:
        request = await call.read(control_pb.AbortRequest)
        _check(request)
        ended = await self.service.abort_each(request.request_ids, call.caller)
        return control_pb.AbortResponse(aborted_request_ids=ended)

    async def set_policy(self, call: Call) -> control_pb.SetPolicyResponse:
        request = await call.read(control_pb.SetPolicyRequest)
        _check(request)
        engine = self.service.served().engine
        previous = engine.policy
        try:
            engine.set_policy(request.policy)
        except ValueError as error:
            raise InvalidRequestError.of([Violation("policy", str(error))]) from error
        return control_pb.SetPolicyResponse(previous_policy=previous)


def _version() -> str:
    try:
        return metadata.version("taper")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "source"


def _check(request: Any, model: ServedModel | None = None) -> None:
    """Raises InvalidRequestError for unknown fields, and for another model's name."""
    violations = [*unknown_fields(request), *(check_model(request.model, model) if model else ())]
    if violations:
        raise InvalidRequestError.of(violations)
