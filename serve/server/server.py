"""The gRPC server around the engine: taper.v1, health and reflection, from start to drain.

It listens before the model is loaded, and answers UNAVAILABLE until the engine serves. The engine knows
nothing of calls: each call owns one request, and whatever ends the call (its reader, its deadline, Abort, a
drain) cancels that request.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from scheduler.events import Finished
from scheduler.request import Request
from scheduler.step import FinishedStep
from serve.api.errors import (
    CancelledError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    ServiceError,
    UnavailableError,
    Violation,
    abort,
    refused,
)
from serve.api.protos.taper.v1 import control_service_pb2 as control_pb
from serve.api.protos.taper.v1 import control_service_pb2_grpc as control_grpc
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.api.protos.taper.v1 import inference_service_pb2_grpc as inference_grpc
from serve.config import ServerConfig
from serve.engine.engine import Engine, Failed, Refused
from serve.engine.step_log import StepLog
from serve.server.health import Health
from serve.server.metrics import Metrics
from serve.server.requests import (
    ServedModel,
    check_ids,
    check_model,
    read_prompt,
    read_request,
    unknown_fields,
)
from serve.server.responses import ResponseWriter, duration
from serve.server.stream import Doorbell, Stream
from serve.text.detokenizer import Speller

log = structlog.get_logger("taper")

SERVICES = (
    pb.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    control_pb.DESCRIPTOR.services_by_name["ControlService"].full_name,
)
_STATES = {
    "STARTING": control_pb.SERVER_STATE_STARTING,
    "SERVING": control_pb.SERVER_STATE_SERVING,
    "DRAINING": control_pb.SERVER_STATE_DRAINING,
    "STOPPED": control_pb.SERVER_STATE_STOPPED,
    "FAILED": control_pb.SERVER_STATE_FAILED,
}
_LOADER = "taper-load"
_WAITING_EVENTS = 8192  # of one stream whose reader is slow
_SWITCH_SECONDS = 0.0005  # a step takes the interpreter back a dozen times: it should not wait 5 ms each time
_FLUSH_SECONDS = 5.0  # for last messages, once the engine has stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What is served: a started engine, and its model as clients see it.

    largest_bucket  rows that one step can have
    summary         what getting ready came to, for the operator
    """

    engine: Engine
    model: ServedModel
    device: str = "cpu"
    largest_bucket: int = 64
    summary: str = ""


Load = Callable[[ServerConfig, Callable[[FinishedStep], None]], Backend]
"""Loads, compiles and starts everything; may take minutes. It is handed what every step is reported to."""


class Service:
    """What the servicers share: the backend, once there is one, and the calls that run."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.instance_id = uuid.uuid4().hex
        self.started = time.monotonic()
        self.draining = False
        self._backend: Backend | None = None
        self._streams: dict[str, Stream] = {}
        self._doorbell: Doorbell | None = None  # made in the event loop
        self._spellers: dict[bool, Speller] = {}

    @property
    def state(self) -> str:
        if self._backend is None:
            return "DRAINING" if self.draining else "STARTING"
        state = self._backend.engine.state
        return "DRAINING" if self.draining and state == "SERVING" else state

    @property
    def is_idle(self) -> bool:
        return not self._streams

    def serve(self, backend: Backend) -> None:
        """From here on, requests are taken."""
        self._backend = backend
        self._spellers = {
            skip: Speller(backend.model.tokenizer, skip_special_tokens=skip) for skip in (False, True)
        }
        self.metrics.watch_load(backend.engine.load)

    def backend(self) -> Backend:
        """Raises UnavailableError until the model is loaded."""
        if self._backend is None:
            raise UnavailableError("the server is starting", reason="STARTING", retry_after=1.0)
        return self._backend

    def accepting(self) -> Backend:
        """Raises UnavailableError while no requests are taken."""
        state = self.state
        if state != "SERVING":
            raise UnavailableError(f"the server is {state.lower()}", reason=state, retry_after=1.0)
        return self.backend()

    def speller(self, *, skip_special_tokens: bool) -> Speller:
        return self._spellers[skip_special_tokens]

    def open(self, request: Request, *, interval: float = 0.0) -> Stream:
        """Submit a request; `interval` is its stream's. Raises ServiceError when it is not taken."""
        engine = self.accepting().engine
        if request.id in self._streams:
            raise DuplicateRequestError(f"request {request.id!r} is running", reason="DUPLICATE")
        if self._doorbell is None:
            self._doorbell = Doorbell()
        stream = Stream(
            self._doorbell,
            bound=_WAITING_EVENTS,
            on_overflow=functools.partial(engine.cancel, request.id),
            explain=functools.partial(self._explain, request.id),
            interval=interval,
        )
        try:
            engine.submit(request, stream.put)
        except Refused as refusal:
            raise refused(refusal.reason, refusal.detail) from refusal
        self._streams[request.id] = stream
        return stream

    def close(self, request_id: str, *, finished: bool) -> None:
        """The call has ended. What it had asked for is forgotten, if it runs still."""
        del self._streams[request_id]
        if not finished:
            self.backend().engine.cancel(request_id)

    def abort(self, request_id: str) -> bool:
        """End a call from outside of it; False if there is none."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self.backend().engine.cancel(request_id)
        stream.end(CancelledError("aborted", reason="ABORTED", request_id=request_id))
        return True

    async def drain(self, timeout: float) -> None:
        """Take no more requests, and finish those that run, for up to `timeout` seconds."""
        self.draining = True
        if self._backend is not None:
            await asyncio.to_thread(self._backend.engine.stop, drain=True, timeout=timeout)
        for stream in self._streams.values():
            stream.end(_stopping())

    def halt(self) -> None:
        """Cut a drain short."""
        if self._backend is not None:
            stop = functools.partial(self._backend.engine.stop, drain=False, timeout=0.0)
            threading.Thread(target=stop, name="taper-halt", daemon=True).start()

    def _explain(self, request_id: str, failed: Failed) -> ServiceError:
        """What the caller is told when the engine gives up its request."""
        if self.state != "FAILED":
            return _stopping()
        log.error("the engine failed", request_id=request_id, error=failed.error)
        return InternalError("the engine failed", reason="ENGINE_FAILED", request_id=request_id)


def _stopping() -> ServiceError:
    return UnavailableError("the server is stopping", reason="STOPPED", retry_after=1.0)


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
        request = await asyncio.to_thread(read_request, message, model)
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
        model = self.service.backend().model
        _refuse([*unknown_fields(request), *check_model(request.model, model)])
        ids = await asyncio.to_thread(read_prompt, request.prompt, model)
        return pb.TokenizeResponse(token_ids=ids)

    @_answers
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        model = self.service.backend().model
        ids = check_ids(request.token_ids, model, "token_ids")
        _refuse([*unknown_fields(request), *check_model(request.model, model), *ids])
        speller = self.service.speller(skip_special_tokens=not request.keep_special_tokens)
        return pb.DetokenizeResponse(text=await asyncio.to_thread(speller.text, list(request.token_ids)))


class ControlServicer(control_grpc.ControlServiceServicer):
    def __init__(self, service: Service) -> None:
        self.service = service

    @_answers
    async def GetModelInfo(  # noqa: N802
        self, request: control_pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetModelInfoResponse:
        model = self.service.backend().model
        _refuse([*unknown_fields(request), *check_model(request.model, model)])
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
        )

    @_answers
    async def GetServerInfo(  # noqa: N802
        self, request: control_pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetServerInfoResponse:
        _refuse([*unknown_fields(request)])
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
            backend = service.backend()
            info.device, info.policy = backend.device, backend.engine.policy
            info.max_step_branches = backend.largest_bucket
            info.kv_capacity_tokens = backend.engine.load().kv_capacity_tokens
        return info

    @_answers
    async def GetLoad(  # noqa: N802
        self, request: control_pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.GetLoadResponse:
        _refuse([*unknown_fields(request)])
        load = self.service.backend().engine.load()
        return control_pb.GetLoadResponse(
            running_requests=load.running_requests,
            running_branches=load.running_branches,
            queued_requests=load.queued_requests,
            kv_used_tokens=load.kv_used_tokens,
            kv_capacity_tokens=load.kv_capacity_tokens,
            output_tokens_per_second=load.output_tokens_per_second,
            steps=load.steps,
        )

    @_answers
    async def Abort(  # noqa: N802
        self, request: control_pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.AbortResponse:
        _refuse([*unknown_fields(request)])
        ended = [name for name in dict.fromkeys(request.request_ids) if self.service.abort(name)]
        return control_pb.AbortResponse(aborted_request_ids=ended)

    @_answers
    async def SetPolicy(  # noqa: N802
        self, request: control_pb.SetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> control_pb.SetPolicyResponse:
        _refuse([*unknown_fields(request)])
        engine = self.service.backend().engine
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


def _refuse(violations: list[Violation]) -> None:
    if violations:
        raise InvalidRequestError.of(violations)


def listen(service: Service) -> tuple[grpc.aio.Server, str]:
    """A server that is bound to the config's address, but not started; and that address. Raises OSError."""
    # Without so_reuseport=0, a second server could take half of the first one's calls.
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    inference_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(service), server)
    control_grpc.add_ControlServiceServicer_to_server(ControlServicer(service), server)
    health = Health(SERVICES, lambda: service.state == "SERVING")
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    host = f"[{service.config.host}]" if ":" in service.config.host else service.config.host
    try:
        port = server.add_insecure_port(f"{host}:{service.config.port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{service.config.port}: {error}") from error
    return server, f"{host}:{port}"


async def shut_down(server: grpc.aio.Server, service: Service, timeout: float) -> None:
    """Drain, let the calls that are left write their last messages, and close."""
    await service.drain(timeout)
    deadline = time.monotonic() + _FLUSH_SECONDS
    while not service.is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await server.stop(grace=0.2)  # only health watchers and readers that stopped reading are left


async def serve(config: ServerConfig, load: Load, announce: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the drain short."""
    service = Service(config)
    steps = StepLog(Path(config.step_log)) if config.step_log else None
    server, address = listen(service)
    stop_metrics = _serve_metrics(service)
    stop = _on_signals(service)

    def on_step(finished: FinishedStep) -> None:
        service.metrics.observe_step(finished)
        if steps is not None:
            steps.observe_step(finished)

    await server.start()
    try:
        loading = _in_thread(functools.partial(load, config, on_step))
        signalled = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loading, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            backend = loading.result()
            service.serve(backend)
            if config.explain:
                announce(backend.summary)
                return
            print(backend.summary, file=sys.stderr, flush=True)
            announce(f"taper-serve ready on {address}")
        await signalled
        log.info("draining", seconds=config.drain_timeout)
    finally:
        await shut_down(server, service, config.drain_timeout)
        stop_metrics()
        if steps is not None:
            steps.close()


def run(config: ServerConfig, load: Load) -> None:
    """`serve` in a process of its own: returns after a drain, raises what kept it from starting."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(serve(config, load, functools.partial(print, flush=True)))
    if any(thread.name == _LOADER and thread.is_alive() for thread in threading.enumerate()):
        os._exit(0)  # a compilation cannot be interrupted, and crashes under an interpreter that finalizes


def _serve_metrics(service: Service) -> Callable[[], None]:
    if service.config.metrics_port is None:
        return lambda: None
    port, stop = service.metrics.listen(service.config.metrics_port)
    log.info("metrics", url=f"http://127.0.0.1:{port}/metrics")
    return stop


def _on_signals(service: Service) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            service.halt()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _in_thread(work: Callable[[], Backend]) -> asyncio.Future[Backend]:
    """Like asyncio.to_thread, but the process may end before the work does."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Backend] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if future.done() else set_outcome(outcome))

    def target() -> None:
        try:
            settle(future.set_result, work())
        except BaseException as error:
            settle(future.set_exception, error)

    threading.Thread(target=target, name=_LOADER, daemon=True).start()
    return future
