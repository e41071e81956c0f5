"""The engine in another process, as the server sees it: an `Engine` like any other.

What it knows of the other side (its load, what has ended) is as new as the last message from there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import structlog

from scheduler.events import TokenEmitted
from scheduler.policy import policy as policy_named
from scheduler.request import Request
from serve.config import ServerConfig
from serve.door import Failed, Load, Refused, Sink, State, Watcher, is_last
from serve.rate import TokenRate
from serve.remote.channel import Channel
from serve.remote.messages import (
    ERRORS,
    Begin,
    Broken,
    Cancel,
    Happened,
    Message,
    SetPolicy,
    Stop,
    Submit,
    Up,
)
from serve.remote.rows import Rows, unpack

log = structlog.get_logger("taper")

GRACE = 10.0  # seconds that the other process gets to end, beyond those that its requests get
GONE = "its process ended without a word: it was killed, or it crashed (see the log above)"
LOOKS = 20  # in a row that see no step end: counted, as this process may have been stopped itself meanwhile


class RemoteEngine:
    """Serves requests by an engine at the other end of a channel.

    `watch` is told of every step, from this object's own thread, as sinks are. `kill` ends the other process
    where it does not end by itself, or where requests run and no step has ended for `patience` seconds.
    """

    def __init__(
        self,
        channel: Channel,
        watch: Watcher,
        kill: Callable[[], None],
        *,
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: State = "STARTING"
        self.policy = self.failure = ""
        self._channel, self._watch, self._kill, self._clock = channel, watch, kill, clock
        self._patience = patience
        self._lock = threading.Lock()
        self._numbers = count()
        self._handles: dict[str, int] = {}  # of the requests that have not ended, by their ids
        self._ids: dict[int, str] = {}
        self._sinks: dict[int, Sink] = {}
        self._load: Load | None = None
        self._rate = TokenRate()
        self._steps = 0  # that have ended
        self._started: Up | Broken | None = None
        self._settled = threading.Event()  # it is up, or will never be
        self._ended = threading.Event()  # the other side is gone, and everybody has been told

    def begin(self, config: ServerConfig) -> None:
        """Let the other side start an engine."""
        threading.Thread(target=self._listen, name="taper-engine-door", daemon=True).start()
        self._channel.send(Begin(config))
        if math.isfinite(self._patience):
            threading.Thread(target=self._guard, name="taper-watchdog", daemon=True).start()

    def up(self) -> Up:
        """Wait until it is up. Raises what kept it from starting: of `ERRORS`, or a RuntimeError."""
        self._settled.wait()
        if isinstance(self._started, Up):
            return self._started
        if self._started is None:
            raise RuntimeError("the engine's process ended before it was ready")
        raise ERRORS.get(self._started.kind, RuntimeError)(self._started.text)

    def submit(self, request: Request, sink: Sink) -> None:
        with self._lock:
            refused = None
            if self.state != "SERVING":
                refused = Refused("DRAINING", "the server takes no new requests")
            elif request.id in self._handles:
                refused = Refused("DUPLICATE", f"request {request.id!r} is running")
            else:
                handle = next(self._numbers)
                self._handles[request.id], self._ids[handle], self._sinks[handle] = handle, request.id, sink
                self._channel.send(Submit(handle, request))
        if refused is not None:
            sink([refused])

    def cancel(self, request_id: str) -> None:
        with self._lock:
            handle = self._handles.get(request_id)
            if handle is not None:
                self._forget(handle)
                self._channel.send(Cancel(handle))

    def set_policy(self, policy: str) -> None:
        policy_named(policy)
        self._channel.send(SetPolicy(policy))
        self.policy = policy

    def load(self) -> Load:
        with self._lock:
            assert self._load is not None, "it is asked for once the engine is up"
            return replace(self._load, output_tokens_per_second=self._rate.per_second(self._clock()))

    def stop(self, *, drain: bool, timeout: float) -> None:
        with self._lock:
            if self.state == "SERVING":
                self.state = "DRAINING" if drain else "STOPPED"
            elif self.state == "DRAINING" and not drain:
                self.state = "STOPPED"
            self._channel.send(Stop(drain, timeout))
        if not self._ended.wait((timeout if drain else 0.0) + GRACE):
            self._kill()
            log.error("the engine's process did not end, and was killed")
        self._ended.wait()

    def _guard(self) -> None:
        """Give the other side up once it is stuck."""
        seen = looks = 0
        while not self._ended.wait(self._patience / LOOKS):
            with self._lock:
                waits = bool(self._sinks) and self._steps == seen
                looks, seen = looks + 1 if waits else 0, self._steps
            if looks >= LOOKS:
                self.failure = f"no step ended in {self._patience:g} seconds (--step-timeout)"
                self._kill()
                log.error("no step has ended, and the engine's process was killed", seconds=self._patience)
                return

    # --- from the other side ---------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            self._channel.serve(self._handle)
        except Exception:
            log.exception("bug: the engine is heard no more, and its process is killed")
            self._kill()
        with self._lock:
            expected = self.state in ("DRAINING", "STOPPED") and not self._sinks
            if not expected and not self.failure:
                self.failure = GONE
            self.state = "STOPPED" if expected else "FAILED"
            left = [*self._sinks.values()]
            for handle in [*self._sinks]:
                self._forget(handle)
        for sink in left:
            sink([Failed(GONE)])
        self._settled.set()
        self._ended.set()

    def _handle(self, message: Message) -> None:
        if isinstance(message, Happened):
            self._happened(message)
        elif isinstance(message, Up):
            self._load, self.policy, self.state = message.load, message.policy, "SERVING"
            self._started = message
            self._settled.set()
        elif isinstance(message, Broken):
            self._started = message

    def _happened(self, message: Happened) -> None:
        if message.failed:
            self.failure, self.state = message.failed, "FAILED"  # before sinks hear of it
        with self._lock:
            self._load = message.load
            self._steps += len(message.steps)
            news = unpack(Rows(message.tokens, message.rare), self._ids)
            told = [(self._sinks[handle], batch) for handle, batch in news.items()]
            for handle, batch in news.items():
                if is_last(batch[-1]):
                    self._forget(handle)
            tokens = sum(isinstance(piece, TokenEmitted) for _, batch in told for piece in batch)
            self._rate.add(self._clock(), tokens)
        for sink, batch in told:
            sink(batch)
        for step in message.steps:
            self._watch(step)

    def _forget(self, handle: int) -> None:
        del self._sinks[handle]
        del self._handles[self._ids.pop(handle)]
