"""The client: requests as their users write them, answers as they read them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest

from scheduler.request import Request
from taper_client import AsyncClient, Client, Completion, branch, generate_request, parallel, serial
from taper_client import client as client_module
from taper_client.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
)
from taper_client.events import BranchFinished, Delta, Finished, Joined, Logprob, Started, WidthChanged
from tests.serve.fakes import FakeEngine, finished, listening

PLAN = [
    serial(max_tokens=4),
    parallel([branch("Tea: ", label="tea"), branch("Coffee: ", then=[parallel([", or ", ", and "])])]),
    serial(" So: "),
]


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


# --- answers -----------------------------------------------------------------------------------------------


def check_answer(answer: Completion) -> None:
    assert answer.text == "Hi. Tea: goodCoffee: bad, or x, and y So: tea."
    assert answer.trunk.text == "Hi. tea."
    assert [(b.id, b.parent, b.label, b.prefix, b.text) for b in answer.branches] == [
        (1, 0, "tea", "Tea: ", "good"),
        (2, 0, "", "Coffee: ", "bad"),
        (3, 2, "", ", or ", "x"),
        (4, 2, "", ", and ", "y"),
    ]
    assert [b.finish_reason for b in answer.branches] == ["stop", "forked", "max_tokens", "eos"]
    assert [b.stop for b in answer.branches] == ["\n", None, None, 256]
    assert (answer.usage.completion_tokens, answer.usage.cached_tokens) == (17, 1)
    assert (answer.timing.ttft, answer.timing.tpot_slo_met, answer.timing.ttft_slo_met) == (0.5, True, False)
    assert answer.widths == [(2, 2)]


def test_an_answer_is_collected_with_its_branches(client):
    check_answer(client.complete("go", plan=PLAN))


def test_the_same_without_blocking(address):
    async def use() -> Completion:
        async with AsyncClient(address) as client:
            return await client.complete("go", plan=PLAN)

    check_answer(asyncio.run(use()))


def test_a_stream_tells_its_events_by_type(client, address):
    got = list(client.generate("go", plan=PLAN, request_id="mine"))
    assert got[0] == Started(request_id="mine", prompt_tokens=3, cached_tokens=2, server=address)
    assert isinstance(got[-1], Finished)
    assert WidthChanged(width=2, wanted=2) in got
    assert Joined(stage=1, branches=(1, 2)) in got
    assert BranchFinished(branch=1, reason="stop", stop="\n", completion_tokens=4) in got
    text = "".join(event.text for event in got if isinstance(event, Delta) and event.branch == 2)
    assert text == "bad"


def test_ids_and_logprobs_are_collected_when_asked_for(client):
    answer = client.complete("go", plan=PLAN, token_ids=True, logprobs=True, top_logprobs=1)
    assert bytes(answer.trunk.token_ids) == b"Hi. tea."
    assert answer.branches[0].logprobs[0] == Logprob(token=ord("g"), logprob=-0.5, top=((7, -1.0),))


def test_an_answer_that_is_not_whole_has_no_usage():
    with pytest.raises(ValueError, match="not complete"):
        Completion().usage  # noqa: B018


def test_leaving_a_stream_ends_its_request(client, engine):
    with client.generate("go", request_id="held-1") as stream:
        assert isinstance(next(iter(stream)), Started)
    engine.wait_for(lambda e: "held-1" in e.cancelled)


def test_breaking_out_of_a_stream_ends_its_request(client, engine):
    for _ in client.generate("go", request_id="held-2"):
        break
    engine.wait_for(lambda e: "held-2" in e.cancelled)


def test_breaking_out_without_blocking_ends_the_request_too(address, engine):
    async def use() -> None:
        async with AsyncClient(address) as client:
            async with client.generate("go", request_id="held-3") as stream:
                async for _ in stream:
                    break
            await asyncio.to_thread(engine.wait_for, lambda e: "held-3" in e.cancelled)

    asyncio.run(use())


def test_a_loop_that_is_closed_early_ends_the_request_without_leaving_the_block(address, engine):
    async def use() -> None:
        async with AsyncClient(address) as client:
            events = aiter(client.generate("go", request_id="held-4"))
            assert isinstance(await anext(events), Started)
            await events.aclose()
            await asyncio.to_thread(engine.wait_for, lambda e: "held-4" in e.cancelled)

    asyncio.run(use())


def test_a_stream_can_be_cancelled(client):
    stream = client.generate("go", request_id="held-4")
    events = iter(stream)
    next(events)
    stream.cancel()
    with pytest.raises(CancelledError):
        list(events)


def test_who_only_waits_for_the_end_asks_for_few_messages(client, address, monkeypatch):
    intervals = []

    def recorded(prompt, **options):
        message = generate_request(prompt, **options)
        intervals.append(message.output.interval_ms)
        return message

    async def use() -> None:
        async with AsyncClient(address) as client:
            await client.complete("go")

    monkeypatch.setattr(client_module, "generate_request", recorded)
    client.complete("go")
    asyncio.run(use())
    client.complete("go", interval_ms=0.0)
    list(client.generate("go"))
    assert intervals == [200, 200, 0, 0]


# --- errors ------------------------------------------------------------------------------------------------


def test_what_is_wrong_comes_back_by_field(client):
    with pytest.raises(InvalidRequestError) as caught:
        client.complete("go", plan=[serial(temperature=101), parallel(["a", branch(top_p=2)])])
    assert [violation.field for violation in caught.value.violations] == [
        "plan.stages[0].serial.sampling.temperature",
        "plan.stages[1].parallel.branches[1].sampling.top_p",
    ]
    assert isinstance(caught.value, ValueError), "like what the client itself finds"


def test_methods_that_answer_once_raise_the_same_errors(client):
    with pytest.raises(InvalidRequestError, match="policy"):
        client.set_policy("fast")


def test_a_server_that_is_not_there_is_unavailable():
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.complete("go")


def test_the_other_methods_answer(client):
    assert client.tokenize("a") == [257, 97]
    assert client.detokenize([97]) == "a"
    assert client.abort("unknown") == ()
    assert client.model_info().model == "tiny"
    assert client.server_info().api_versions == ["taper.v1"]
    assert client.load().kv_capacity_tokens == 1000
    assert client.set_policy("taper") == "taper"


def test_a_deadline_ends_a_call_that_has_no_answer():
    def answer_if_nobody_leaves(engine: FakeEngine, request: Request) -> None:
        with contextlib.suppress(AssertionError):
            engine.wait_for(lambda e: request.id in e.cancelled, timeout=5.0)
        engine.tell(request.id, finished(request.id))

    async def use() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(DeadlineExceededError):
                await client.complete("go", timeout=0.2)
            with pytest.raises(DeadlineExceededError):
                async for _ in client.generate("go", timeout=0.2):
                    pass

    with listening(FakeEngine(answer_if_nobody_leaves)) as address:
        with Client(address) as client:
            for call in (client.generate, client.complete):
                with pytest.raises(DeadlineExceededError):
                    list(call("go", timeout=0.2))
        asyncio.run(use())


def test_a_client_can_have_a_deadline_for_all_of_its_calls():
    def never(engine: FakeEngine, request: Request) -> None:
        with contextlib.suppress(AssertionError):
            engine.wait_for(lambda e: request.id in e.cancelled, timeout=5.0)
        engine.tell(request.id, finished(request.id))

    async def use(address: str) -> None:
        async with AsyncClient(address, timeout=0.2) as client:
            with pytest.raises(DeadlineExceededError):
                await client.complete("go")

    with listening(FakeEngine(never)) as address:
        with Client(address, timeout=0.2) as client, pytest.raises(DeadlineExceededError):
            client.complete("go")
        with Client(address, timeout=60) as client, pytest.raises(DeadlineExceededError):
            client.complete("go", timeout=0.2)
        asyncio.run(use(address))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout=0.2) as client, pytest.raises(DeadlineExceededError):
            client.model_info()


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    def faces(kind: type) -> dict[str, dict[str, object]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: {each.name: each.default for each in inspect.signature(method).parameters.values()}
            for name, method in methods
            if not name.startswith("_") or name == "__init__"
        }

    assert faces(Client) == faces(AsyncClient)
    assert len(faces(Client)) > 10


# --- wrong use ---------------------------------------------------------------------------------------------

SECONDS = [
    (0, ValueError, "timeout is 0: more than 0 seconds are needed; None waits as long as it takes"),
    (-1.5, ValueError, "timeout is -1.5: more than 0 seconds"),
    (float("nan"), ValueError, "timeout is nan: a finite number is needed"),
    (float("inf"), ValueError, "timeout is inf: a finite number is needed"),
    ("5", TypeError, "timeout is '5' (str): a number is needed; write 5"),
    (timedelta(minutes=1), TypeError, "seconds are needed; write 60"),
]


@pytest.mark.parametrize(("timeout", "kind", "said"), SECONDS, ids=[str(each[0]) for each in SECONDS])
def test_a_timeout_is_seconds(address, timeout, kind, said):
    async def use() -> None:
        with pytest.raises(kind, match=re.escape(said)):
            AsyncClient(address, timeout=timeout)
        async with AsyncClient(address) as client:
            with pytest.raises(kind, match=re.escape(said)):
                await client.complete("go", timeout=timeout)

    with pytest.raises(kind, match=re.escape(said)):
        Client(address, timeout=timeout)
    with Client(address) as client, pytest.raises(kind, match=re.escape(said)):
        client.generate("go", timeout=timeout)
    asyncio.run(use())


def test_nothing_is_sent_of_a_request_with_a_wrong_argument(client, address, engine):
    async def use() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(TypeError, match="did you mean temperature"):
                await client.complete("go", temprature=1)

    before = len(engine.requests)
    with pytest.raises(TypeError, match="did you mean temperature"):
        client.complete("go", temprature=1)
    with pytest.raises(ValueError, match=r"stop\[1\] is ''"):
        client.generate("go", stop=["a", ""])
    asyncio.run(use())
    assert len(engine.requests) == before


def test_methods_that_answer_once_look_at_their_arguments_too(client):
    for wrong in (
        lambda: client.tokenize(b"a"),
        lambda: client.detokenize("a"),
        lambda: client.detokenize(None),
        lambda: client.detokenize([1], keep_special_tokens="no"),
        lambda: client.abort(["a"]),
        lambda: client.set_policy(None),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match=r"ids\[1\] is -1"):
        client.detokenize([1, -1])


def test_a_closed_client_says_so(address):
    async def use() -> None:
        client = AsyncClient(address)
        await client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            await client.model_info()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.generate("go")

    with Client(address) as client:
        stream = client.generate("go", request_id="held-5")
        next(events := iter(stream))
    with pytest.raises(CancelledError):
        list(events)
    for call in (client.load, lambda: client.complete("go"), lambda: client.tokenize("a")):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    asyncio.run(use())


ADDRESSES = [
    "127.0.0.1:50051",
    "localhost:1",
    "[::1]:65535",
    "a-b.example.org:443",
    "unix:/run/taper.sock",
    "dns:///taper:50051",
    "ipv4:10.0.0.1:50051,10.0.0.2:50051",
]
NO_ADDRESSES = [
    ("localhost", "host:port is needed, as in '127.0.0.1:50051'"),
    ("http://localhost:50051", "host:port is needed"),
    ("localhost:50051/", "host:port is needed"),
    ("local host:50051", "host:port is needed"),
    ("::1:50051", "or '[::1]:50051'"),
    (":50051", "host:port is needed"),
    ("", "host:port is needed"),
    ("localhost:0", "a port is 1 to 65535"),
    ("localhost:65536", "a port is 1 to 65535"),
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_a_host_and_a_port_or_a_target_of_grpc(address):
    Client(address).close()


@pytest.mark.parametrize(("address", "said"), NO_ADDRESSES)
def test_what_could_lead_nowhere_is_not_an_address(address, said):
    async def use() -> None:
        AsyncClient(address)

    for make in (lambda: Client(address), lambda: asyncio.run(use())):
        with pytest.raises(ValueError, match=re.escape(f"address is {address!r}: ")) as caught:
            make()
        assert said in str(caught.value)


def test_an_address_is_text():
    with pytest.raises(TypeError, match=r"address is 50051 \(int\): a str is needed"):
        Client(50051)  # pyright: ignore[reportArgumentType]
