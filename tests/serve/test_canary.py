"""What was asked and answered is nowhere but with its caller: not in logs, metrics, the step log, or other
callers' errors, whatever becomes of the request and whatever bug it meets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import structlog
from prometheus_client import generate_latest

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from serve.config import ServerConfig
from serve.engine.engine import InProcessEngine
from serve.engine.step_log import StepLog
from serve.logs import STDERR, LogForm, log_loop, log_to_stderr
from serve.reading.frames import begin
from serve.reading.pool import ReaderPool
from serve.served import Served
from serve.server.responses import ResponseWriter
from serve.server.service import Service
from serve.text.codec import TextCodec
from taper_client import AsyncClient, branch, generate_request, parallel, serial
from taper_client.errors import InternalError, InvalidRequestError, ServiceError
from tests.serve.fakes import ByteTokenizer, served_model
from tests.serve.server.own_loop import listening_to
from tests.serve.server.raw_calls import GENERATE, connection, end_of

CANARY = "Xyzzy-9051 plugh_frotz"
PIECE = 8  # characters of it that are enough to be found out


def leaks(text: str) -> list[str]:
    """The lines in which there is a piece of the canary, as characters or as tokens."""
    pieces = {CANARY[at : at + PIECE] for at in range(len(CANARY) - PIECE + 1)}
    for separator in (", ", ","):
        pieces |= {separator.join(str(ord(each)) for each in piece) for piece in pieces if piece in CANARY}
    return [line for line in text.splitlines() if any(piece in line for piece in pieces)]


@dataclass(frozen=True)
class Said:
    """A step's tokens."""

    tokens: str

    def is_ready(self) -> bool:
        return True

    def samples(self) -> tuple[Sample, ...]:
        return tuple(Sample(ord(each)) for each in self.tokens)


class Parrot:
    """A device that says the canary, again and again, until it has a bug."""

    def __init__(self) -> None:
        self.bug: Exception | None = None
        self._words = itertools.cycle(CANARY)

    def launch(self, step: Step) -> Said:
        if self.bug is not None:
            raise self.bug
        return Said("".join(itertools.islice(self._words, sum(entry.samples for entry in step.entries))))


@dataclass(frozen=True)
class World:
    service: Service
    address: str
    client: AsyncClient
    device: Parrot
    steps: Path


@contextlib.asynccontextmanager
async def world(steps: Path) -> AsyncIterator[World]:
    """The real server, engine, scheduler and readers, over a device that is none."""
    log_loop()
    service, device, model = Service(ServerConfig(port=0)), Parrot(), served_model()
    scheduling = SchedulerConfig(num_pages=256, page_size=4, num_slots=32, max_context=200, max_queue=8)
    controller = Controller(StepLatencyModel({16: 1e-6}))
    scheduler = Scheduler(scheduling, controller, TextCodec(ByteTokenizer()))
    engine = InProcessEngine(scheduler, device, watch=service.metrics.observe_step, step_log=StepLog(steps))
    engine.start()
    readers = ReaderPool(size=1, seconds=2.0)
    await readers.begin(begin(model, service.config, tokenizer="tests.serve.reading.hostile.tokenizer"))
    service.serve(Served(engine=engine, model=model), readers)
    try:
        async with listening_to(service) as address, AsyncClient(address) as client:
            yield World(service, address, client, device, steps)
    finally:
        engine.stop(drain=False, timeout=10.0)
        await readers.close()


async def failure(call: Awaitable[object]) -> ServiceError | None:
    try:
        await call
    except ServiceError as error:
        return error
    return None


async def answered(there: World) -> None:
    """All ways in which a request carries text."""
    complete = there.client.complete
    assert CANARY in (await complete(CANARY, max_tokens=50)).text
    await complete([{"role": "user", "content": CANARY}], max_tokens=30)
    parts = parallel([branch(f"{CANARY}: ", label=CANARY), branch(CANARY[::-1])], max_tokens=5)
    await complete("go", plan=[parts, serial(f" {CANARY}", max_tokens=5)], stop=CANARY, cache_salt=CANARY)
    await there.client.tokenize(CANARY)
    await there.client.detokenize([*CANARY.encode()])


async def refused(there: World) -> None:
    """What is wrong may be said to the caller, and to nobody else."""
    for options in (
        {"stop": CANARY * 100},
        {"cache_salt": CANARY * 100},
        {"plan": [parallel([CANARY] * 99)]},
    ):
        with pytest.raises(InvalidRequestError):
            await there.client.complete(CANARY, **options)
    with pytest.raises(InvalidRequestError):
        await there.client.complete(CANARY * 100)
    with pytest.raises(InvalidRequestError):
        await there.client.complete([{"role": "assistant", "content": CANARY}])
    message = generate_request(CANARY, max_tokens=3).SerializeToString()
    async with connection(there.address) as channel:
        for broken in (message[:-3] + b"\xff\xff", message * 100, b"\x0a" + message):
            assert await end_of(channel.unary_stream(GENERATE)(broken))


async def given_up(there: World) -> None:
    client = there.client
    running = client.generate(CANARY, max_tokens=10_000, ignore_eos=True, request_id="r")
    await anext(aiter(running))
    running.cancel()
    assert await failure(client.complete(CANARY, timeout=0.001))
    waiting = asyncio.ensure_future(client.complete(CANARY, request_id="s", max_tokens=100_000))
    await client.abort("s")
    await failure(waiting)


async def read_by_a_hostile_tokenizer(there: World) -> None:
    for what in ("BUG", "EXIT", "ABORT", "MEMORY"):
        error = await failure(there.client.complete(f"{what} {CANARY}"))
        assert error is not None
        assert leaks(str(error)) == []


async def met_by_bugs(there: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the server's own rooms; nothing of them is told to the caller either."""

    def bug(*_: object, **__: object) -> Any:
        try:
            CANARY.encode() + b"\xff" + bytes(CANARY, "utf-8")
            (CANARY.encode() + b"\xff").decode()
        except ValueError as error:
            raise KeyError(CANARY, [*CANARY.encode()]) from error

    rooms: list[tuple[Any, str]] = [
        (ResponseWriter, "write"),
        (there.service, "open"),
        (there.service, "read"),
        (there.service, "check_queue"),
        (there.service.served().engine, "submit"),
        (there.service.metrics, "observe_finished"),
        (there.service, "request_ended"),
    ]
    for room, name in rooms:
        with monkeypatch.context() as patched:
            patched.setattr(room, name, bug)
            error = await failure(there.client.complete(CANARY, max_tokens=1))
            assert leaks(str(error)) == [], name
            # By the time the call has ended for the log, the answer is there.
            assert isinstance(error, NoneType if name == "request_ended" else InternalError), name

    async def forgotten() -> None:
        raise KeyError(CANARY)

    asyncio.get_running_loop().call_soon(bug)
    task = asyncio.ensure_future(forgotten())
    await asyncio.sleep(0)
    del task  # its exception was never retrieved


async def cut_off_by_a_bug_of_the_device(there: World) -> None:
    """The last thing, for the engine ends with it."""
    there.device.bug = ValueError(f"no room for {CANARY}")
    error = await failure(there.client.complete("of somebody else"))
    assert isinstance(error, InternalError)
    assert leaks(str(error)) == []
    there.service.served().engine.stop(drain=False, timeout=10.0)
    structlog.get_logger("taper").error("last", failure=there.service.failure)


@pytest.fixture(params=get_args(LogForm))
def logged(request: pytest.FixtureRequest, restored_log: None) -> Iterator[LogForm]:
    log_to_stderr(request.param)
    return request.param


def test_nothing_of_a_prompt_or_of_an_answer_is_written_down(
    logged: LogForm, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> str:
        async with world(tmp_path / "steps.jsonl") as there:
            await answered(there)
            await refused(there)
            await given_up(there)
            await read_by_a_hostile_tokenizer(there)
            await met_by_bugs(there, monkeypatch)
            await cut_off_by_a_bug_of_the_device(there)
            return generate_latest(there.service.metrics.registry).decode()

    metrics = asyncio.run(asyncio.wait_for(use(), 60))
    STDERR.drain()
    out, err = capfd.readouterr()
    steps = (tmp_path / "steps.jsonl").read_text()
    assert err.count("KeyError") > 8, "the bugs are told"
    assert "completion_tokens" in err
    assert len(steps.splitlines()) > 10
    for name, text in (("log", err), ("output", out), ("metrics", metrics), ("step log", steps)):
        assert leaks(text) == [], name


def test_a_leak_would_be_found() -> None:
    tokens = ",".join(map(str, CANARY.encode()))
    for text in (f"a\nb {CANARY[3:12]} c\nd", f"b {[*CANARY.encode()]}", f"b {tokens}"):
        assert [line[:1] for line in leaks(text)] == ["b"]
    assert leaks("Xyzzy plugh") == []
