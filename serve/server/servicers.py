"""The RPCs of taper.v1: messages in, calls of the `Service`, messages out."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from importlib import metadata
from typing import Any

import grpc
import structlog

from scheduler.events import Finished
from serve.api.errors import InternalError, InvalidRequestError, ServiceError, Violation, abort
from serve.api.protos.taper.v1 import control_service_pb2 as control_pb
from serve.api.protos.taper.v1 import control_service_pb2_grpc as control_grpc
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.api.protos.taper.v1 import inference_service_pb2_grpc as inference_grpc
from serve.served import ServedModel
from serve.server.faults import check_ids, check_model, refuse_text, unknown_fields
from serve.server.requests import read_prompt, read_request
from serve.server.responses import ResponseWriter, duration
from serve.server.service import Service

log = structlog.get_logger("taper")

_STATES = {
    "STARTING": control_pb.SERVER_STATE_STARTING,
    "SERVING": control_pb.SERVER_STATE_SERVING,
    "DRAINING": control_pb.SERVER_STATE_DRAINING,
    "STOPPED": control_pb.SERVER_STATE_STOPPED,
    "FAILED": control_pb.SERVER_STATE_FAILED,
}


def _answers(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Turns exceptions into statuses. What is not a ServiceError is a bug, and told to the log alone."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        code = "CANCELLED"
        try:
            result = await method(self, request, context)
            code = "OK"
            return result
        except ServiceError as error:
            code, failure = error.code.name, error
        except grpc.aio.BaseError:
            raise  # the call itself is broken
        except Exception:
            log.exception("bug", method=method.__name__)
            request_id = getattr(request, "request_id", "")
            code, failure = "INTERNAL", InternalError("internal error", request_id=request_id)
        finally:
            if method.__name__ == "Generate":
                self.service.metrics.count_request(code)
        return await abort(context, failure)

    return answer


class InferenceServicer(inference_grpc.InferenceServiceServicer):
    def __init__(self, service: Service) -> None:
        self.service = service

    @_answers
    async def Generate(  # noqa: N802 - gRPC's name
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        model = self.service.accepting().model
        request = replace(await asyncio.to_thread(read_request, message, model), client=context.peer())
        skip = not message.output.keep_special_tokens
        speller = self.service.speller(skip_special_tokens=skip)
        writer = ResponseWriter(request, message.output, speller)
        stream = self.service.open(request, interval=message.output.interval_ms / 1e3)
        finished = False
        try:
            while not finished:
                events = await stream.take()
                last = events[-1]
                finished = isinstance(last, Finished)
                if isinstance(last, Finished):
                    self.service.metrics.observe_finished(last)
                await context.write(writer.write(events))
        finally:
            self.service.close(request.id, finished=finished)

    @_answers
    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        model = self.service.served().model
        _check(request, model)
        ids = await asyncio.to_thread(read_prompt, request.prompt, model)
        return pb.TokenizeResponse(token_ids=ids)

    @_answers
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        model = self.service.served().model
        refuse_text(request, model)
        _check(request, model, check_ids(request.token_ids, model, "token_ids"))
        speller = self.service.speller(skip_special_tokens=not request.keep_special_tokens)
        return pb.DetokenizeResponse(text=await asyncio.to_thread(speller.text, list(request.token_ids)))


class ControlServicer(control_grpc.ControlServiceServicer):
    def __init__(self, service: Service) -> None:
        self.service = service

    @_answers
    async def GetModelInfo(  # noqa: N802
        self, request: control_pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetModelInfoResponse:
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

    @_answers
    async def GetServerInfo(  # noqa: N802
        self, request: control_pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetServerInfoResponse:
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

    @_answers
    async def GetLoad(  # noqa: N802
        self, request: control_pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetLoadResponse:
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

    @_answers
    async def Abort(  # noqa: N802
        self, request: control_pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.AbortResponse:
        _check(request)
        ended = [name for name in dict.fromkeys(request.request_ids) if self.service.abort(name)]
        return control_pb.AbortResponse(aborted_request_ids=ended)

    @_answers
    async def SetPolicy(  # noqa: N802
        self, request: control_pb.SetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.SetPolicyResponse:
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


def _check(request: Any, model: ServedModel | None = None, *more: Iterable[Violation]) -> None:
    """Raises InvalidRequestError for unknown fields, another model's name, and what `more` finds."""
    violations = [*unknown_fields(request), *(check_model(request.model, model) if model else ())]
    violations += [violation for found in more for violation in found]
    if violations:
        raise InvalidRequestError.of(violations)
