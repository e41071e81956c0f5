"""What the servicers share: what is served, once it is loaded, and the calls that run.

The engine knows nothing of calls: each call owns one request, and whatever ends the call (its reader, its
deadline, Abort, a drain) cancels that request.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from scheduler.request import Request
from serve.config import ServerConfig
from serve.door import Failed, Refused, StepRecord
from serve.logs import expect_prompts
from serve.reading.work import Answer, Job, Readers, ReadHere
from serve.served import Served
from serve.server.arrivals import Arrivals
from serve.server.callers import Caller, Callers
from serve.server.calls import Call, Calls
from serve.server.metrics import Metrics
from serve.server.request_log import RequestLog
from serve.server.status import Status
from serve.server.stream import Doorbell, Stream
from serve.server.tokens import Tokens
from serve.text.reader import Speller
from taper_client.errors import (
    CancelledError,
    DuplicateRequestError,
    InternalError,
    ServiceError,
    UnavailableError,
    refused,
)

log = structlog.get_logger("taper")

WAITING_EVENTS = 8192  # of one stream whose reader is slow
_OVERTAKEN_SECONDS = 0.05  # that an Abort of an unknown id waits for the call, as gRPC keeps no order
_ARRIVAL_SECONDS = 1.0  # that it waits for the messages of calls that are here


@dataclass(slots=True)
class _Reading:
    """A message that is being read, until it has been, or something else ends its call."""

    answer: asyncio.Future[Answer]
    error: ServiceError | None = None

    def end(self, error: ServiceError) -> None:
        self.error = self.error or error
        self.answer.cancel()


class Service:
    """What the servicers share: what is served, once it is loaded, and the calls that run."""

    def __init__(self, config: ServerConfig, *, waiting_events: int = WAITING_EVENTS) -> None:
        """`waiting_events`: the most events of a stream that wait for its reader. Raises OptionError
        where the file of tokens is none."""
        self.config = config
        self._waiting_events = waiting_events
        tokens = Tokens(config.tokens) if config.tokens else None
        self.callers = Callers(tokens, certificates=config.tls_client_ca_cert_path is not None)
        self.metrics = Metrics()
        self.status = Status()
        self._request_log = RequestLog()
        self.instance_id = uuid.uuid4().hex
        self.started = time.monotonic()
        self.draining = False
        self.arrivals = Arrivals()
        self.inference = Calls(total=config.max_calls, per_client=config.max_client_calls)
        self.control = Calls(total=config.max_calls, per_client=config.max_client_calls)
        self._served: Served | None = None
        self._readers: Readers | None = None
        self._readings: dict[str, _Reading] = {}
        self._prompts = 0  # of the readings, those of requests
        self._streams: dict[str, Stream] = {}
        self._doorbell: Doorbell | None = None  # made in the event loop
        self._spellers: dict[bool, Speller] = {}

    @property
    def state(self) -> str:
        if self._served is None:
            return "DRAINING" if self.draining else "STARTING"
        state = self._served.engine.state
        return "DRAINING" if self.draining and state == "SERVING" else state

    @property
    def failure(self) -> str:
        """What the engine failed of, in a line for the operator."""
        return self._served.engine.failure if self._served else ""

    @property
    def is_idle(self) -> bool:
        return not self._streams and not self._readings

    def serve(self, served: Served, readers: Readers | None = None) -> None:
        """From here on, requests are taken, and read by `readers`: in this process unless given."""
        expect_prompts()
        self._served = served
        self._readers = readers or ReadHere(served.model)
        self._spellers = {
            skip: Speller(served.model.tokenizer.spelling, skip_special_tokens=skip) for skip in (False, True)
        }
        self._report(served)

    def _report(self, served: Served) -> None:
        """Let the metrics tell of it."""
        metrics, name = self.metrics, served.model.name
        metrics.describe_model(name)
        metrics.watch_load(served.engine.load, name)
        if self.config.vllm_metric_names:
            metrics.watch_load_as_vllm(served.engine.load, name, served.platform.page_size)
        metrics.describe_devices(served.platform.device, served.platform.devices)
        metrics.describe_targets(served.model.default_slo.tpot, served.model.min_tpot)

    def observe_step(self, step: StepRecord) -> None:
        """A step has ended; told by the engine's thread."""
        self.metrics.observe_step(step)
        self.status.observe_step(step)

    def told(self) -> Mapping[str, Any]:
        """What the status page shows."""
        return self.status.told(self.state, self._served)

    def served(self) -> Served:
        """Raises UnavailableError until the model is loaded."""
        if self._served is None:
            raise UnavailableError.because("STARTING", "the server is starting")
        return self._served

    def accepting(self) -> Served:
        """Raises UnavailableError while no requests are taken."""
        state = self.state
        if state != "SERVING":
            raise UnavailableError.because(state, f"the server is {state.lower()}")
        return self.served()

    def check_queue(self, client: str) -> None:
        """Raises OverloadedError if the engine's queue is full by all that is known here (what the engine has
        said last, and what is on its way there), or if the client has as many requests as it may have."""
        load, config = self.accepting().engine.load(), self.config
        waiting = load.scheduler.queued_requests + self._prompts
        if waiting >= config.max_queue:
            raise refused("QUEUE_FULL", f"{waiting} requests are waiting already", load.start_gap or None)
        if config.max_client_queue is not None and config.max_client_running is not None:
            most, calls = config.max_client_queue + config.max_client_running, self.inference.of(client)
            if calls > most:  # with the one that asks
                raise refused("CLIENT_LIMIT", f"{most} requests of this client wait or run already")

    async def read(self, job: Job, caller: Caller) -> Answer:
        """Have the message of a call read. The call can be aborted meanwhile. Raises ServiceError."""
        self.served()
        assert self._readers is not None
        key = self._new_key(job.id, caller)
        reading = self._readings[key] = _Reading(self._readers.read(job, caller.client))
        prompts = int(job.brings_request)
        self._prompts += prompts
        try:
            await asyncio.wait({reading.answer})
        finally:
            self._prompts -= prompts
            del self._readings[key]
            reading.answer.cancel()  # if the client has left
        if reading.error is not None:
            raise reading.error
        return reading.answer.result()

    def _new_key(self, request_id: str, caller: Caller) -> str:
        """The id among those of all callers. Raises DuplicateRequestError if the caller has it in use."""
        key = caller.key(request_id)
        if key in self._streams or key in self._readings:
            raise DuplicateRequestError.because("DUPLICATE", f"request {request_id!r} is running")
        return key

    def request_ended(self, call: Call, code: str, reason: str) -> None:
        """A call of Generate has ended, with a gRPC status."""
        self.metrics.count_request(code, call.caller.tenant or "", reason)
        self._request_log.ended(call, code, reason)

    def speller(self, *, skip_special_tokens: bool) -> Speller:
        return self._spellers[skip_special_tokens]

    def open(self, request: Request, caller: Caller, *, interval: float = 0.0) -> Stream:
        """Submit a caller's request; `interval` is its stream's. Raises ServiceError while no requests are
        taken; what the engine refuses is said by the stream."""
        engine = self.accepting().engine
        key = self._new_key(request.id, caller)
        if self._doorbell is None:
            self._doorbell = Doorbell()
        stream = Stream(
            self._doorbell,
            bound=self._waiting_events,
            on_overflow=functools.partial(engine.cancel, key),
            explain=functools.partial(self._explain, request.id),
            interval=interval,
        )
        salt = caller.salt(request.cache_salt, shared=self.config.share_prefix_cache)
        engine.submit(replace(request, id=key, client=caller.client, cache_salt=salt), stream.put)
        self._streams[key] = stream
        return stream

    def close(self, request_id: str, caller: Caller, *, finished: bool) -> None:
        """The call has ended. What it had asked for is forgotten, if it runs still."""
        key = caller.key(request_id)
        stream = self._streams.pop(key)
        if not (finished or stream.given_up):
            self.served().engine.cancel(key)

    async def abort_each(self, request_ids: Iterable[str], caller: Caller) -> list[str]:
        """End calls of the caller's tenant from outside of them. Returns the ids of those that ran."""
        names = dict.fromkeys(request_ids)
        ended = {name for name in names if self._abort(name, caller)}
        if len(ended) < len(names):  # some may be of calls that this one has overtaken
            await asyncio.sleep(_OVERTAKEN_SECONDS)
            await self.arrivals.all_here(_ARRIVAL_SECONDS)
            ended |= {name for name in names.keys() - ended if self._abort(name, caller)}
        return [name for name in names if name in ended]

    def _abort(self, request_id: str, caller: Caller) -> bool:
        key = caller.key(request_id)
        call = self._streams.get(key) or self._readings.get(key)
        if call is None:
            return False
        if isinstance(call, Stream):
            self.served().engine.cancel(key)
        call.end(CancelledError.because("ABORTED", "aborted", request_id=request_id))
        return True

    async def drain(self, timeout: float) -> None:
        """Take no more requests, and finish those that run, for up to `timeout` seconds."""
        self.draining = True
        if self._served is not None:
            await asyncio.to_thread(self._served.engine.stop, drain=True, timeout=timeout)
        for call in (*self._streams.values(), *self._readings.values()):
            call.end(_stopping())

    def end_calls(self) -> None:
        """End those that are left."""
        for calls in (self.inference, self.control):
            calls.end(_stopping())

    def end_log(self) -> None:
        """Write what of its requests the log has put off."""
        self._request_log.flush()

    def halt(self) -> None:
        """Cut a drain short."""
        if self._served is not None:
            stop = functools.partial(self._served.engine.stop, drain=False, timeout=0.0)
            threading.Thread(target=stop, name="taper-halt", daemon=True).start()

    def _explain(self, request_id: str, why: Refused | Failed) -> ServiceError:
        """What the caller is told when the engine does not take its request, or gives it up."""
        if isinstance(why, Refused):
            return refused(why.reason, why.detail, why.retry_after)
        state = self.state
        if state in ("DRAINING", "STOPPED"):
            return _stopping()
        log.error("the engine gave a request up", request_id=request_id, error=why.error)
        if state == "FAILED":
            return InternalError.because("ENGINE_FAILED", "the engine failed", request_id=request_id)
        return InternalError("internal error", request_id=request_id)


def _stopping() -> ServiceError:
    return UnavailableError.because("STOPPED", "the server is stopping")
