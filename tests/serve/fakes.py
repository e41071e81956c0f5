"""A fake engine with the engine's public face, and a byte tokenizer: the server's tests need no model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from model.spelling import Spelling
from scheduler import events
from scheduler.events import (
    BranchInfo,
    Event,
    Finished,
    StageFinished,
    StageStarted,
    Timing,
    TokenEmitted,
    Usage,
)
from scheduler.predictor import PredictionAccuracy, StepLoad
from scheduler.program import check_program
from scheduler.request import Request
from scheduler.scheduler import SchedulerLoad
from scheduler.search import Match
from scheduler.step import Sample
from scheduler.stopping import FinishReason
from serve.config import ServerConfig
from serve.door import Engine, Failed, Load, Refused, Sink, State, StepRecord, is_last
from serve.served import Served, ServedModel
from serve.server.ports import Ports
from serve.server.server import shut_down
from serve.server.service import Service
from serve.server.tls import Certificates

EOS = 256
VOCAB = 300


# A step that ended late, in figures.
STEP = StepRecord(
    ended=1.0,
    bucket=8,
    load=StepLoad(3),
    requests=2,
    branches=3,
    deferred=0,
    predicted=0.02,
    baseline=0.015,
    budget=0.02,
    seconds=0.03,
    widths=(2, 1),
)


class ByteTokenizer:
    """One token for each byte; 256 and 257 are special tokens, the ids after them have no text."""

    supports_chat = True
    spelling = Spelling(
        {**{byte: bytes([byte]) for byte in range(256)}, EOS: b"<end>", 257: b"<begin>"},
        special={"<end>": EOS, "<begin>": 257},
    )

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [257] * add_special_tokens + list(text.encode())

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last turn must be the user's")
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages)


def served_model(**changes) -> ServedModel:
    options = {
        "name": "tiny",
        "architecture": "qwen3",
        "tokenizer": ByteTokenizer(),
        "vocab_size": VOCAB,
        "max_context": 200,
        "eos_ids": (EOS,),
    }
    return ServedModel(**{**options, **changes})


class FakeEngine:
    """Takes requests and keeps them; a test says what becomes of them with `tell`."""

    def __init__(
        self, on_submit: Callable[[FakeEngine, Request], None] | None = None, *, state: State = "SERVING"
    ) -> None:
        self.state: State = state
        self.policy, self.failure = "taper", ""
        self.requests: dict[str, Request] = {}
        self.cancelled: list[str] = []
        self.refusal: Refused | None = None
        self.drained = threading.Event()
        self._sinks: dict[str, Sink] = {}
        self._on_submit = on_submit
        self._change = threading.Condition()

    # --- the engine's public face ----------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> None:
        with self._change:
            not_taken = self._not_taken(request)
            if not_taken is None:
                self.requests[request.id] = request
                self._sinks[request.id] = sink
                self._change.notify_all()
        if not_taken is not None:
            sink([not_taken])
            return
        if self._on_submit is not None:
            threading.Thread(target=self._on_submit, args=(self, request)).start()

    def _not_taken(self, request: Request) -> Refused | Failed | None:
        if self.refusal is not None:
            return self.refusal
        if self.state != "SERVING":
            return Refused("DRAINING", "no requests are taken")
        if request.id in self._sinks:
            return Refused("DUPLICATE", f"request {request.id!r} is running")
        try:
            check_program(request.program)
        except ValueError as fault:
            return Failed(str(fault))
        return None

    def cancel(self, request_id: str) -> None:
        with self._change:
            self.cancelled.append(request_id)
            self._sinks.pop(request_id, None)
            self._change.notify_all()

    def set_policy(self, policy: str) -> None:
        if policy not in ("off", "eager", "taper"):
            raise ValueError(f"{policy!r} is not a policy")
        self.policy = policy

    def load(self) -> Load:
        now = SchedulerLoad(len(self._sinks), len(self._sinks), 0, kv_used_tokens=10, kv_capacity_tokens=1000)
        return Load(now, PredictionAccuracy(), output_tokens_per_second=1.5, steps=0)

    def stop(self, *, drain: bool, timeout: float) -> None:
        """Until all requests have ended, or a second `stop` comes."""
        with self._change:
            if drain:
                self.state = "DRAINING"
                self.drained.set()
                self._change.wait_for(lambda: not self._sinks or self.state == "STOPPED", timeout)
            self.state = "STOPPED"
            left, self._sinks = [*self._sinks.values()], {}
            self._change.notify_all()
        for sink in left:
            sink([Failed("the engine stopped")])

    # --- what a test says ------------------------------------------------------------------------------

    def tell(self, request_id: str, *happened: Event | Failed) -> None:
        """A step's events, as if from the engine's thread."""
        with self._change:
            sink = self._sinks.get(request_id)
            if happened and is_last(happened[-1]):
                self._sinks.pop(request_id, None)
                self._change.notify_all()
        if sink is not None:
            sink(happened)

    def wait_for(self, condition: Callable[[FakeEngine], bool], timeout: float = 10.0) -> None:
        with self._change:
            assert self._change.wait_for(lambda: condition(self), timeout), "it did not happen"


def finished(request_id: str, tokens: int = 1) -> Finished:
    usage = Usage(
        prompt_tokens=3, cached_tokens=1, completion_tokens=tokens, critical_path_tokens=tokens, preemptions=0
    )
    timing = Timing(queue=0.25, ttft=0.5, tpot=0.01, total=1.5, tpot_slo_met=True, ttft_slo_met=False)
    return Finished(request_id, usage, timing)


@contextlib.contextmanager
def listening(
    engine: Engine,
    model: ServedModel | None = None,
    *,
    config: ServerConfig | None = None,
    certificates: Certificates | None = None,
    tokens: str | None = None,
    **changes,
) -> Iterator[str]:
    """The address of a server whose loop has a thread of its own, as blocking clients need it.

    It serves `model`, or what `served_model` makes of `changes`.
    """
    config = config or ServerConfig(port=0, tokens=tokens)
    addresses: list[str] = []
    up, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        service = Service(config)
        service.serve(Served(engine=engine, model=model or served_model(**changes)))
        ports = Ports(service, certificates)
        await ports.start()
        addresses.append(ports.address)
        up.set()
        await asyncio.to_thread(stop.wait)
        await shut_down(ports, service, timeout=0.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    up.wait()
    try:
        yield addresses[0]
    finally:
        stop.set()
        thread.join()


def begin(name: str, stage: int, *infos: tuple[int, int, str, str]) -> StageStarted:
    """A stage of branches, each as (id, parent, label, prefix); of the trunk alone if none is given."""
    branches = (
        BranchInfo(id, parent, label, tuple(prefix.encode()))
        for id, parent, label, prefix in infos or ((0, 0, "", ""),)
    )
    return StageStarted(name, stage, tuple(branches))


def say(name: str, branch: int, text: str, at: int = 1) -> list[TokenEmitted]:
    return [
        TokenEmitted(name, branch, Sample(byte, -0.5, ((7, -1.0),)), at + i)
        for i, byte in enumerate(text.encode())
    ]


def fork_and_join(engine: FakeEngine, request) -> None:
    """An introduction, two branches, one of which forks again, a conclusion. Ids that begin "held" wait."""
    name = request.id

    def end(stage: int, branch: int, reason: FinishReason, stop=None, count: int = 1, final: bool = True):
        return StageFinished(name, stage, branch, reason, stop, count, final)

    done = FinishReason.MAX_TOKENS
    engine.tell(name, events.Started(name, 3, 2), begin(name, 0, (0, 0, "", "")), *say(name, 0, "Hi. "))
    if name.startswith("held"):
        return
    engine.tell(
        name, end(0, 0, done, final=False), begin(name, 1, (1, 0, "tea", "Tea: "), (2, 0, "", "Coffee: "))
    )
    engine.tell(name, events.WidthChanged(name, 2, 2), *say(name, 1, "good"), *say(name, 2, "b"))
    engine.tell(
        name,
        *say(name, 2, "ad", 2),
        end(1, 1, FinishReason.STOP, Match("\n", 0), 4),
        end(1, 2, done, final=False),
    )
    engine.tell(
        name,
        begin(name, 2, (3, 2, "", ", or "), (4, 2, "", ", and ")),
        *say(name, 3, "x"),
        *say(name, 4, "y"),
    )
    engine.tell(name, end(2, 3, done), end(2, 4, FinishReason.EOS, 256), events.Joined(name, 2, (3, 4)))
    engine.tell(name, end(1, 2, FinishReason.FORKED, None, 3), events.Joined(name, 1, (1, 2)))
    engine.tell(name, begin(name, 3, (0, 0, "", " So: ")), *say(name, 0, "tea.", 5), end(3, 0, done, None, 8))
    engine.tell(name, finished(name, 17))
