"""Processes that read: whatever a message does to its reader, the others are read, and a new reader comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from serve.config import ServerConfig
from serve.reading.frames import begin
from serve.reading.pool import LEAST, ROOM, ReaderPool
from serve.reading.work import Job, Prompted, Readers, ReadHere
from taper_client import generate_request
from taper_client.errors import InternalError, InvalidRequestError, OverloadedError, ServiceError
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import served_model

SECONDS = 0.3  # that one message may take
HOSTILE = "tests.serve.reading.hostile.tokenizer"
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def tokenize(text: str) -> Job:
    return Job("Tokenize", pb.TokenizeRequest(prompt=pb.Prompt(text=text)).SerializeToString(), "the-id")


def ids(answer: object) -> bytes:
    assert isinstance(answer, bytes)
    return bytes(token for token in pb.TokenizeResponse.FromString(answer).token_ids if token < 256)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs in the one loop of the pool."""
    with asyncio.Runner() as runner:
        yield lambda use: runner.run(asyncio.wait_for(use, 30))


@pytest.fixture(scope="module")
def pool(run: Run) -> Iterator[ReaderPool]:
    async def make() -> ReaderPool:
        made = ReaderPool(size=2, seconds=SECONDS)
        await made.begin(begin(served_model(), ServerConfig(), tokenizer=HOSTILE))
        return made

    made = run(make())
    yield made
    run(made.close())


@pytest.fixture(params=["process", "thread"])
def readers(request: pytest.FixtureRequest) -> Readers:
    if request.param == "thread":
        return ReadHere(served_model())
    return request.getfixturevalue("pool")


# --- what is the same wherever a message is read -----------------------------------------------------------


def test_a_request_is_read(run: Run, readers: Readers) -> None:
    message = generate_request("ab", max_tokens=7, interval_ms=5.0)
    answer = run(read(readers, Job("Generate", message.SerializeToString(), "made")))
    assert isinstance(answer, Prompted)
    assert (answer.request.id, answer.request.prompt) == ("made", (257, 97, 98))
    assert pb.OutputOptions.FromString(answer.output).interval_ms == 5.0
    named = generate_request("ab", request_id="given").SerializeToString()
    assert run(read(readers, Job("Generate", named, "given"))).request.id == "given"


def test_text_and_ids_are_turned_into_each_other(run: Run, readers: Readers) -> None:
    assert ids(run(read(readers, tokenize("abc")))) == b"abc"
    asked = pb.DetokenizeRequest(token_ids=[97, 257]).SerializeToString()
    answer = run(read(readers, Job("Detokenize", asked)))
    assert pb.DetokenizeResponse.FromString(answer).text == "a"


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05abc", b"\x0a\x02\xff\xfe", b"\x1b" * 300, b"\x12\x03\x0a\x01\xff"],
    ids=["cut off", "not UTF-8", "too deep", "not UTF-8 inside"],
)
def test_what_is_no_message_is_said_to_be_none(run: Run, readers: Readers, method: Any, data: bytes) -> None:
    if method == "Detokenize":
        data = b"\x0a\x02\xff\xfe" + data
    with pytest.raises(InvalidRequestError) as caught:
        run(read(readers, Job(method, data)))
    assert caught.value.reason == "MALFORMED"
    assert caught.value.violations


def test_what_is_wrong_with_a_message_is_said_by_path(run: Run, readers: Readers) -> None:
    message = generate_request([999], temperature=101).SerializeToString()
    with pytest.raises(InvalidRequestError) as caught:
        run(read(readers, Job("Generate", message)))
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["prompt.token_ids.ids[0]", "sampling.temperature"]


async def read(readers: Readers, job: Job) -> Any:
    return await readers.read(job, "c")


# --- what only processes can do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("LOOP", OverloadedError, "PROMPT_TOO_COSTLY"),
        ("MEMORY", OverloadedError, "PROMPT_TOO_COSTLY"),
        ("ABORT", OverloadedError, "PROMPT_TOO_COSTLY"),
        ("EXIT", InternalError, ""),
        ("BUG", InternalError, ""),
    ],
)
def test_a_message_that_its_reader_does_not_survive_fails_alone(
    run: Run, pool: ReaderPool, text: str, kind: type[ServiceError], reason: str
) -> None:
    async def use() -> None:
        bad = pool.read(tokenize(text), "bad")
        for number in range(20):
            assert ids(await pool.read(tokenize(f"good {number}"), "good")) == f"good {number}".encode()
        with pytest.raises(kind) as caught:
            await bad
        assert (caught.value.reason, caught.value.retry_after) == (reason, None)
        assert ids(await pool.read(tokenize("again"), "bad")) == b"again", "there is a reader again"

    run(use())


def test_a_message_that_was_there_when_its_reader_ended_is_read_once_more(
    run: Run, pool: ReaderPool, tmp_path
) -> None:
    text = f"ONCE {tmp_path / 'here'}"
    assert ids(run(read(pool, tokenize(text)))) == text.encode()


def test_one_connection_leaves_readers_to_others(run: Run, pool: ReaderPool) -> None:
    async def use() -> None:
        loops = [pool.read(tokenize("LOOP"), "bad") for _ in range(2)]
        assert ids(await pool.read(tokenize("good"), "good")) == b"good"
        assert not loops[1].done()
        for loop in loops:
            loop.cancel()

    run(use())


def test_whoever_leaves_is_not_read(run: Run, pool: ReaderPool, tmp_path) -> None:
    """The reader at it may go on, until its time is over."""

    async def use() -> None:
        loop = pool.read(tokenize("LOOP"), "c")
        here = tmp_path / "here"
        second = pool.read(tokenize(f"ONCE {here}"), "c")
        await asyncio.sleep(0)
        loop.cancel()
        second.cancel()
        assert ids(await pool.read(tokenize("third"), "c")) == b"third"
        assert not here.exists()

    run(use())


def test_a_bug_is_told_to_the_log_with_its_id_and_without_the_prompt(
    run: Run, pool: ReaderPool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InternalError):
        run(read(pool, tokenize("BUG of a secret")))
    said = capsys.readouterr()
    log = said.out + said.err
    assert "the-id" in log
    assert "KeyError" in log
    assert "hostile.py" in log
    assert "secret" not in log


def test_what_waits_is_bounded(run: Run, pool: ReaderPool) -> None:
    async def use() -> None:
        loops = [pool.read(tokenize("LOOP"), name) for name in "ab"]  # all readers are busy
        while len(pool._queue):
            await asyncio.sleep(0.01)
        most = ROOM // LEAST
        waiting = [pool.read(tokenize(str(number)), "c") for number in range(most)]
        assert not any(each.done() for each in waiting)
        over = pool.read(tokenize("one more"), "c")
        with pytest.raises(OverloadedError) as caught:
            await over
        assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", 1.0)
        other = pool.read(tokenize("another"), "d")
        assert waiting[-1].done(), "who has most waiting makes room for who has least"
        with pytest.raises(OverloadedError):
            await waiting[-1]
        for each in (*waiting, *loops):
            each.cancel()
        assert ids(await other) == b"another"

    run(use())


def test_a_reader_that_cannot_start_is_an_error_of_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    async def use() -> None:
        pool = ReaderPool(size=1, seconds=SECONDS)
        with pytest.raises(RuntimeError, match="ended with 1"):
            await pool.begin(begin(served_model(), ServerConfig(model="none"), tokenizer=HOSTILE))
        await pool.close()

    asyncio.run(asyncio.wait_for(use(), 30))
    assert "there is none" in capfd.readouterr().err
