"""One client of several servers: its calls are spread, and end well if some of the servers do not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scheduler import events
from scheduler.request import Request
from serve.config import ServerConfig
from serve.door import Refused
from serve.server.tls import Certificates
from taper_client import AsyncClient, Client, Completion, OverloadedError, Stream, Tls, UnavailableError
from taper_client.command import main
from taper_client.errors import ServiceError
from taper_client.events import Event, Started
from taper_client.replicas import addresses_of, is_balanced, target_of
from tests.serve.authorities import Authority, without_authorities
from tests.serve.cable import Cable, cable
from tests.serve.fakes import FakeEngine, begin, fork_and_join, listening, say
from tests.serve.waiting import until

SECRET = "a-secret-of-some-length"
TOKENS = f'[[token]]\ntenant = "search"\nroles = ["generate"]\ntoken = "{SECRET}"\n'
NOWHERE = "127.0.0.1:1"


class Pair(NamedTuple):
    """Two servers, and what each of them was asked."""

    engines: tuple[FakeEngine, FakeEngine]
    addresses: tuple[str, str]

    @property
    def counts(self) -> list[int]:
        return [len(engine.requests) for engine in self.engines]


@contextlib.contextmanager
def pair(*behaves: Callable[[FakeEngine, Request], None], **options: Any) -> Iterator[Pair]:
    engines = FakeEngine(behaves[0]), FakeEngine(behaves[-1])
    with listening(engines[0], **options) as first, listening(engines[1], **options) as second:
        yield Pair(engines, (first, second))


@contextlib.contextmanager
def asking(
    addresses: str | Sequence[str], *, of: int = 2, **options: Any
) -> Iterator[Callable[[int], list[Completion]]]:
    """Asks so many times, in turn by a blocking client and one that is not, once `of` servers have answered
    each of them. Raises what a call raises."""
    loop = asyncio.new_event_loop()

    async def made() -> AsyncClient:
        return AsyncClient(addresses, timeout=20, **options)

    waiting = loop.run_until_complete(made())
    with Client(addresses, timeout=20, **options) as blocking:
        ways = (lambda: blocking.complete("go"), lambda: loop.run_until_complete(waiting.complete("go")))

        def ask(times: int) -> list[Completion]:
            return [way() for way, _ in zip(itertools.cycle(ways), range(times), strict=False)]

        until_answered_by(of, ask)
        yield ask
        loop.run_until_complete(waiting.close())
    loop.close()


def until_answered_by(servers: int, ask: Callable[[int], list[Completion]]) -> None:
    """A server is asked once it has said that it serves."""

    def is_so() -> bool:
        answers = ask(4 * servers)
        return all(len({each.server for each in answers[n::2]}) == servers for n in (0, 1))

    until(is_so)


# --- who answers -------------------------------------------------------------------------------------------


def test_calls_are_spread_and_an_answer_tells_whose_it_is():
    with pair(fork_and_join) as both, asking(both.addresses) as ask:
        before = both.counts
        answers = ask(20)
        assert Counter(each.server for each in answers) == dict.fromkeys(both.addresses, 10)
        assert [after - was for after, was in zip(both.counts, before, strict=True)] == [10, 10]
        assert answers[0].as_dict()["server"] == answers[0].server


def test_a_stream_tells_it_from_its_first_event_on():
    async def use() -> None:
        async with AsyncClient(address) as client, client.generate("go") as stream:
            assert stream.server == ""
            async for _ in stream:
                assert stream.server == address

    with listening(FakeEngine(fork_and_join)) as address:
        with Client(address) as client, client.generate("go") as stream:
            assert stream.server == ""
            for _ in stream:
                assert stream.server == address
        asyncio.run(use())


def test_a_server_that_listens_everywhere_calls_itself_by_its_machines_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "machine-7")
    with listening(FakeEngine(fork_and_join), config=ServerConfig(host="0.0.0.0", port=0)) as address:
        port = address.rpartition(":")[2]
        with Client(f"127.0.0.1:{port}") as client:
            assert client.complete("go").server == f"machine-7:{port}"


def test_a_stranger_is_not_told(tmp_path: Path):
    (tmp_path / "tokens.toml").write_text(TOKENS)
    with listening(FakeEngine(fork_and_join), tokens=str(tmp_path / "tokens.toml")) as address:
        with Client(address) as client, pytest.raises(ServiceError) as caught:
            client.complete("go")
        assert caught.value.server == ""
        with Client(address, token=SECRET) as client, pytest.raises(ServiceError) as refused:
            client.load()
        assert refused.value.server == "", "it has no right to be there"
        with Client(address, token=SECRET) as client, pytest.raises(ServiceError) as wrong:
            client.complete("go", temperature=1000)
        assert wrong.value.server == address


def test_the_command_takes_several_addresses(capsys: pytest.CaptureFixture[str]):
    with pair(fork_and_join) as both:
        main(["go", "--address", ",".join(both.addresses), "--json"])
    assert json.loads(capsys.readouterr().out)["server"] in both.addresses


# --- servers that leave ------------------------------------------------------------------------------------


def test_a_server_that_drains_is_not_asked_and_none_of_its_refusals_is_seen():
    with pair(fork_and_join) as both, asking(both.addresses) as ask:
        leaving = both.engines[0]
        leaving.state = "DRAINING"
        began, before = time.monotonic(), both.counts
        assert {each.server for each in ask(20)} == {both.addresses[1]}
        assert time.monotonic() - began < 4, "it is not waited for"
        assert both.counts[0] == before[0]
        leaving.state = "SERVING"
        until_answered_by(2, ask)


def test_nobody_is_asked_where_nobody_serves():
    with pair(fork_and_join) as both, Client(both.addresses, timeout=20) as client:
        for engine in both.engines:
            engine.state = "DRAINING"

        def is_so() -> bool:
            with pytest.raises(UnavailableError) as caught:
                client.complete("go")
            return not caught.value.server

        until(is_so)


def test_a_server_that_is_not_there_is_left_out():
    with listening(FakeEngine(fork_and_join)) as address, asking((NOWHERE, address), of=1) as ask:
        assert {each.server for each in ask(6)} == {address}
    with Client((NOWHERE, NOWHERE)) as client, pytest.raises(UnavailableError) as caught:
        client.complete("go")
    assert caught.value.server == ""


def silent(engine: FakeEngine, request: Request) -> None:
    """Has it, and says nothing."""


def begun(engine: FakeEngine, request: Request) -> None:
    """Has brought a token."""
    name = request.id
    engine.tell(name, events.Started(name, 3, 2), begin(name, 0), *say(name, 0, "Hi"))


@contextlib.contextmanager
def held(
    behave: Callable[[FakeEngine, Request], None],
) -> Iterator[tuple[tuple[FakeEngine, Cable], FakeEngine, tuple[str, str]]]:
    """An engine that behaves so behind a cable, one that answers, and the addresses of both."""
    holding, answering = FakeEngine(behave), FakeEngine(fork_and_join)
    with listening(holding) as first, listening(answering) as second, cable(first) as wire:
        yield (holding, wire), answering, (wire.address, second)


def keep_asking(client: Client, threads: ThreadPoolExecutor, engine: FakeEngine) -> list[Future[Completion]]:
    """Until the engine has a request."""
    asked: list[Future[Completion]] = []

    def has_one() -> bool:
        asked.append(threads.submit(client.complete, "go"))
        wait(asked, timeout=0.01)
        return bool(engine.requests)

    until(has_one)
    return asked


def test_what_a_killed_server_had_not_begun_to_answer_is_answered_by_another():
    with (
        held(silent) as ((holding, wire), answering, addresses),
        Client(addresses, timeout=20) as client,
        ThreadPoolExecutor() as threads,
    ):
        asked = keep_asking(client, threads, holding)
        wire.cut()
        assert {each.result().server for each in asked} == {addresses[1]}
        assert len(answering.requests) == len(asked), "each of them once"


def test_the_same_without_blocking():
    async def use(holding: FakeEngine, wire: Cable, addresses: Sequence[str]) -> list[Completion]:
        async with AsyncClient(addresses, timeout=20) as client:
            asked = []
            while not holding.requests:
                asked.append(asyncio.ensure_future(client.complete("go")))
                await asyncio.wait(asked, timeout=0.01)
            wire.cut()
            return await asyncio.gather(*asked)

    with held(silent) as ((holding, wire), answering, addresses):
        answers = asyncio.run(use(holding, wire, addresses))
        assert {each.server for each in answers} == {addresses[1]}
        assert len(answering.requests) == len(answers)


def test_what_it_had_begun_to_answer_fails_and_is_not_begun_again():
    with held(begun) as ((holding, wire), answering, addresses), Client(addresses, timeout=20) as client:
        streams: list[tuple[Stream, Iterator[Event]]] = []

        def begins() -> bool:
            stream = client.generate("go")
            streams.append((stream, iter(stream)))
            return isinstance(next(streams[-1][1]), Started) and bool(holding.requests)

        until(begins)
        before = len(answering.requests)
        wire.cut()
        with pytest.raises(UnavailableError) as caught:
            [*streams[-1][1]]
        assert caught.value.server == streams[-1][0].server not in ("", addresses[1])
        assert len(answering.requests) == before


# --- what is not tried again -------------------------------------------------------------------------------


def test_a_server_that_is_full_says_so_and_the_next_call_is_anothers():
    with pair(fork_and_join) as both, asking(both.addresses) as ask:
        both.engines[0].refusal = Refused("QUEUE_FULL", "it is full")
        outcomes = Counter[tuple[str, float | None]]()
        for _ in range(20):
            try:
                outcomes[ask(1)[0].server, None] += 1
            except OverloadedError as error:
                outcomes[error.server, error.retry_after] += 1
        full, other = both.addresses
        assert outcomes == {(full, 1.0): 10, (other, None): 10}


def test_an_id_that_runs_may_be_the_callers_own_first_attempt():
    """It is UNAVAILABLE then: tried again until the server has seen that its client is gone."""
    with pair(silent) as both, Client(both.addresses, timeout=20) as client:
        has, leaves = both.engines
        leaves.refusal = Refused("DRAINING", "it leaves, and its health has not said so yet")
        with Client(both.addresses[0]) as other, other.generate("go", request_id="mine") as first:
            threading.Thread(target=lambda: [*_quietly(first)], daemon=True).start()
            has.wait_for(lambda engine: "mine" in engine.requests)
            codes = set[str]()

            def is_seen() -> bool:
                with pytest.raises(ServiceError) as caught:
                    client.complete("go", request_id="mine")
                codes.add(caught.value.code.name)
                return len(codes) == 2

            until(is_seen)
            assert codes == {"ALREADY_EXISTS", "UNAVAILABLE"}, "by the server that was asked first"


def _quietly(stream: Stream) -> Iterator[Any]:
    with contextlib.suppress(ServiceError):
        yield from stream


def test_what_is_about_one_server_is_not_asked_of_whichever_comes():
    async def use() -> None:
        async with AsyncClient((NOWHERE, NOWHERE)) as client:
            for call in (client.load, client.server_info, lambda: client.abort("a")):
                with pytest.raises(ValueError, match="about one server"):
                    await call()

    with Client((NOWHERE, NOWHERE)) as client:
        for call in (
            client.load,
            client.server_info,
            lambda: client.abort("a"),
            lambda: client.set_policy("off"),
        ):
            with pytest.raises(ValueError, match="about one server"):
                call()
    asyncio.run(use())


# --- TLS and tokens ----------------------------------------------------------------------------------------


def test_tokens_and_certificates_are_for_all_of_them(tmp_path: Path):
    (tmp_path / "tokens.toml").write_text(TOKENS)
    authority = Authority(tmp_path)
    own = Certificates(without_authorities(authority.issue("taper.example")))
    secured = Tls(ca_cert_path=authority.path, server_name="taper.example")
    with pair(fork_and_join, certificates=own, tokens=str(tmp_path / "tokens.toml")) as both:
        with asking(both.addresses, tls=secured, token=SECRET) as ask:
            assert {each.server for each in ask(8)} == {*both.addresses}
        with Client(both.addresses) as client, pytest.raises(UnavailableError, match="may ask for TLS"):
            client.complete("go")
    with pytest.raises(ValueError, match=r"server_name of Tls \(--tls-server-name\)"):
        Client(both.addresses, tls=True)
    with pytest.raises(ValueError, match=r"on the way to 127\.0\.0\.1:1, 192\.0\.2\.1:1 could read"):
        Client((NOWHERE, "192.0.2.1:1"), token=SECRET)


# --- addresses ---------------------------------------------------------------------------------------------

ADDRESSES = [
    ("127.0.0.1:1", "127.0.0.1:1", False),
    (["127.0.0.1:1"], "127.0.0.1:1", False),
    ("[::1]:1", "[::1]:1", False),
    ("unix:/run/a,b", "unix:/run/a,b", False),
    ("ipv4:10.0.0.1:1", "ipv4:10.0.0.1:1", False),
    ("xds:///taper", "xds:///taper", False),
    ("dns:///10.0.0.1:1", "dns:///10.0.0.1:1", False),
    ("localhost:1", "localhost:1", True),
    ("taper.example:1", "taper.example:1", True),
    ("dns:///taper:1", "dns:///taper:1", True),
    ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
    ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
    (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2", True),
    (("[::1]:1", "[::2]:2"), "ipv6:[::1]:1,[::2]:2", True),
    (("10.0.0.1:1", "[::2]:2"), "ipv6:[::ffff:10.0.0.1]:1,[::2]:2", True),
]
NO_ADDRESSES = [
    (("10.0.0.1:1", "taper-2:1"), "address[1] is 'taper-2:1': several addresses must be numeric"),
    ("taper-1:1,taper-2:1", "address[0] is 'taper-1:1': several addresses must be numeric"),
    (("unix:/a", "unix:/b"), "address[0] is 'unix:/a': several addresses must be numeric"),
    (("10.0.0.1:1", "dns:///taper:1"), "address[1] is 'dns:///taper:1': several addresses must be numeric"),
    ("10.0.0.1:1,", "address[1] is '': host:port is needed"),
    ("10.0.0.1:1, 10.0.0.2:1", "address[1] is ' 10.0.0.2:1': host:port is needed"),
    (["10.0.0.1"], "address[0] is '10.0.0.1': host:port is needed"),
    ([], "address is []: at least one address is needed"),
]


@pytest.mark.parametrize(("given", "target", "several"), ADDRESSES)
def test_addresses_are_one_target_and_a_name_may_lead_to_several_servers(given, target, several):
    addresses = addresses_of("address", given)
    assert (target_of(addresses), is_balanced(addresses)) == (target, several)


@pytest.mark.parametrize(("given", "said"), NO_ADDRESSES)
def test_several_addresses_are_numeric(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Client(given)


def test_a_list_holds_text():
    with pytest.raises(TypeError, match=r"address\[1\] is 50051 \(int\): a str is needed"):
        Client(["127.0.0.1:1", 50051])  # pyright: ignore[reportArgumentType]
