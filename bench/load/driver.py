"""Sends requests to a running server, and keeps what comes back with the time at which it came.

A request is serialized before the clock runs, and a message is read after it has stopped: in between, this
process only takes bytes and notes times, so that it can follow hundreds of streams. Times are those of
`time.perf_counter`, in seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import grpc

from bench.load.measures import Record
from bench.load.workload import Item, Lengths
from bench.timing import clock
from scheduler.program import ParallelStage, Plan
from scheduler.request import Slo
from taper_client import Join, Options, branch, generate_request, parallel, serial
from taper_client.v1 import inference_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]


# --- what is sent ------------------------------------------------------------------------------------------


def message(
    item: Item,
    id: str,
    seed: int,
    vocab_size: int,
    *,
    slo: Slo | None = None,
    salt: str = "",
    interval_ms: float | None = None,
) -> bytes:
    """A serialized GenerateRequest for the same tokens as `item.request` asks of the scheduler.

    Every length is forced: no stage ends before its limit. Prompts are only found in the server's cache by
    requests of the same `salt`. Messages come at least `interval_ms` apart; None: as the server likes.
    """
    request = item.request(id, Slo(), seed, vocab_size)
    program = request.program
    assert isinstance(program, Plan)
    stages: list[pb.Stage] = []
    for stage in program.stages:
        if isinstance(stage, ParallelStage):
            branches = [branch(spec.prefix, max_tokens=spec.stopping.max_tokens) for spec in stage.branches]
            stages.append(parallel(branches, join=cast(Join, item.join)))
        else:
            prefix = stage.prefix or ""
            stages.append(serial(prefix, max_tokens=stage.stopping.max_tokens))
    options = Options(plan=stages, ignore_eos=True, seed=seed, request_id=id, cache_salt=salt)
    if slo is not None:
        options |= asking_for(slo)
    if interval_ms is not None:
        options |= Options(interval_ms=interval_ms)
    return generate_request(request.prompt, **options).SerializeToString()


def asking_for(slo: Slo) -> Options:
    """The targets, and whether the request would rather be refused than late, if it would."""
    options = Options(tpot_slo_ms=1e3 * slo.tpot, ttft_slo_ms=1e3 * slo.ttft)
    return options | Options(on_miss="reject") if slo.reject else options


# --- what comes back ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reply:
    """A call: when it was due, sent and ended, its messages as they came, and what ended it if not OK.

    An answer that a client put together (bench.load.client_forks) has no messages, but `parts`: the replies
    of each stage in turn.
    """

    due: float
    sent: float = math.nan
    ended: float = math.nan
    messages: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""
    parts: list[list[Reply]] = field(default_factory=list)

    @property
    def refused(self) -> float | None:
        """When the server said that it would not serve it, if it did."""
        return self.ended if self.error.startswith("RESOURCE_EXHAUSTED") else None

    @property
    def calls(self) -> list[Reply]:
        """Those that were made for it: itself, or its parts."""
        return [part for stage in self.parts for part in stage] or [self]


class Emission(NamedTuple):
    """Tokens that came in one message, over all branches, and how many steps brought them.

    A reader may find several steps in a message; each brought as many tokens as branches advanced.
    """

    at: float
    tokens: int
    steps: float


@dataclass(slots=True)
class Answer:
    """A reply, read. `stages`: tokens of each branch of each stage of the trunk, in order of branch ids."""

    emissions: list[Emission]
    stages: Lengths
    prompt_tokens: int
    finished: bool

    @classmethod
    def of(cls, reply: Reply) -> Answer:
        if reply.parts:
            return cls._joined([[cls.of(part) for part in stage] for stage in reply.parts], reply.error)
        reader = _Reader()
        for at, raw in reply.messages:
            reader.read(at, pb.GenerateResponse.FromString(raw))
        stages = tuple(tuple(stage[branch] for branch in sorted(stage)) for stage in reader.stages)
        return cls(reader.emissions, stages, reader.prompt_tokens, reader.finished)

    @classmethod
    def _joined(cls, parts: Sequence[Sequence[Answer]], error: str) -> Answer:
        """One answer of those to requests without branches, stage by stage."""
        every = [part for stage in parts for part in stage]
        emissions = sorted(emission for part in every for emission in part.emissions)
        stages = tuple(tuple(sum(map(sum, part.stages)) for part in stage) for stage in parts)
        whole = not error and all(part.finished for part in every)
        return cls(emissions, stages, parts[0][0].prompt_tokens, whole)

    @property
    def token_times(self) -> list[float]:
        """When each token came."""
        return [emission.at for emission in self.emissions for _ in range(emission.tokens)]

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages with tokens."""
        return [after.at - before.at for before, after in itertools.pairwise(self.emissions)]

    def record(self, item: Item, arrival: float) -> Record:
        """What the measures are of. It is finished if it has the lengths that `item` asked for."""
        record = Record(item, arrival)
        for emission in self.emissions:
            record.emit(emission.at, emission.tokens)
        record.finished = self.finished and self.stages == item.stages
        return record


@dataclass(slots=True)
class _Reader:
    emissions: list[Emission] = field(default_factory=list)
    stages: list[dict[int, int]] = field(default_factory=list)  # of each branch, its tokens
    prompt_tokens: int = 0
    finished: bool = False
    _counts: dict[int, int] = field(default_factory=dict)  # by branch, over all of its stages
    _width: int | None = None  # not told before the second step

    def read(self, at: float, response: pb.GenerateResponse) -> None:
        new: dict[int, int] = {}
        steps = 0.0
        for event in response.events:
            kind = event.WhichOneof("kind")
            if kind == "delta":
                branch = event.delta.branch_id
                tokens = self._delta(event.delta)
                new[branch] = new.get(branch, 0) + tokens
                steps += tokens / self._width if self._width else 0.0
            elif kind == "width_changed":
                self._width = event.width_changed.width
            elif kind == "stage_started":
                self._stage(event.stage_started)
            elif kind == "started":
                self.prompt_tokens = event.started.prompt_tokens
            elif kind == "finished":
                self.finished = True
        if any(new.values()):
            self.emissions.append(Emission(at, sum(new.values()), steps or max(new.values())))

    def _delta(self, delta: pb.BranchDelta) -> int:
        """How many tokens are new."""
        branch, stage = delta.branch_id, self.stages[-1]
        tokens = delta.completion_tokens - self._counts[branch]
        self._counts[branch] = delta.completion_tokens
        stage[branch] = stage.get(branch, 0) + tokens
        return tokens

    def _stage(self, started: pb.StageStarted) -> None:
        """A stage of the trunk: it goes on, or forks. Others are parts of one of its branches."""
        if any(
            branch.branch_id == 0 or (branch.parent_branch_id == 0 and branch.branch_id not in self._counts)
            for branch in started.branches
        ):
            self.stages.append({})
        for begun in started.branches:
            self._counts.setdefault(begun.branch_id, 0)


# --- sending -----------------------------------------------------------------------------------------------


class Driver:
    """A connection to a server's InferenceService."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._generate: Any = self._channel.unary_stream(f"/{SERVICE.full_name}/Generate")

    async def close(self) -> None:
        await self._channel.close()

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Make a call and read it into `reply` to its end, an error included, or until cancelled."""
        reply.sent = clock()
        call = self._generate(request)
        try:
            async for raw in call:
                reply.messages.append((clock(), raw))
        except grpc.aio.AioRpcError as error:
            reply.error = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            reply.error = "cancelled by the client"
            raise
        finally:
            reply.ended = clock()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Driver]:
    connection = Driver(address)
    try:
        yield connection
    finally:
        await connection.close()


async def sleep_until(at: float) -> None:
    while (left := at - clock()) > 0:
        await asyncio.sleep(left)


async def play(
    driver: Driver,
    requests: Sequence[bytes],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_reply: Callable[[Reply], None] = lambda reply: None,
) -> list[Reply]:
    """The replies to `requests`, each sent at its time (seconds from now) or, if so many are open, later."""
    room = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    start = clock()
    replies = [Reply(start + arrival) for arrival in arrivals]

    async def one(request: bytes, reply: Reply) -> None:
        async with room:
            await driver.ask(request, reply)
        on_reply(reply)

    async with asyncio.TaskGroup() as calls:
        for request, reply in zip(requests, replies, strict=True):
            await sleep_until(reply.due)
            calls.create_task(one(request, reply))
    return replies
