"""The same answers, put together by a client from requests without branches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from bench.load.client_forks import ForkingClient, sampled
from bench.load.driver import Answer, Driver, Reply, connected
from bench.load.workload import Item
from scheduler.request import Slo
from taper_client.v1 import inference_service_pb2 as pb
from tests.bench.served import Served, serving

LETTER_A = 65  # what the server always samples
FORK = Item(0.0, 5, ((3,), (4, 2, 6), (5,)))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as it:
        yield it


class Watched(Driver):
    """Keeps what it is asked to send."""

    def __init__(self, driver: Driver, fail_at: int | None = None) -> None:
        self.driver, self.fail_at = driver, fail_at
        self.sent: list[pb.GenerateRequest] = []

    async def ask(self, request: bytes, reply: Reply) -> None:
        self.sent.append(pb.GenerateRequest.FromString(request))
        if len(self.sent) == self.fail_at:
            reply.error = "UNAVAILABLE: gone"
            return
        await self.driver.ask(request, reply)


def ask(address: str, fail_at: int | None = None) -> tuple[Reply, list[pb.GenerateRequest]]:
    client = ForkingClient(item=FORK, id="x", seed=1, vocab_size=100, slo=Slo(tpot=0.5, ttft=2.0), salt="s")

    async def talk() -> tuple[Reply, list[pb.GenerateRequest]]:
        async with connected(address) as driver:
            watched, reply = Watched(driver, fail_at), Reply(0.0)
            await client.ask(watched, reply)
            return reply, watched.sent

    return asyncio.run(talk())


def test_a_branch_is_a_request_over_all_that_was_said_before(server: Served) -> None:
    reply, sent = ask(server.address)
    answer, record = Answer.of(reply), Answer.of(reply).record(FORK, 0.0)
    assert answer.stages == FORK.stages
    assert (record.finished, record.tokens, len(record.stage_ends)) == (True, FORK.tokens, 3)
    assert len(reply.calls) == 5

    whole = FORK.request("x", Slo(), 1, 100)
    _, second, last = whole.program.stages
    prompts = [tuple(each.prompt.token_ids.ids) for each in sent]
    assert prompts[0] == whole.prompt
    trunk = whole.prompt + (LETTER_A,) * 3
    assert prompts[1:4] == [trunk + branch.prefix for branch in second.branches]
    joined = trunk
    for branch, tokens in zip(second.branches, FORK.stages[1], strict=True):
        joined += branch.prefix + (LETTER_A,) * tokens
    assert prompts[4] == joined + last.prefix
    assert {(each.slo.tpot_ms, each.slo.ttft_ms) for each in sent} == {(500.0, 2000.0)}
    assert len({each.request_id for each in sent}) == 5
    assert {each.cache_salt for each in sent} == {"s"}


def test_an_answer_ends_with_the_first_request_that_fails(server: Served) -> None:
    reply, sent = ask(server.address, fail_at=3)
    assert reply.error == "UNAVAILABLE: gone"
    assert len(sent) == 4, "the branches beside it, and nothing after them"
    assert not Answer.of(reply).record(FORK, 0.0).finished
    assert sampled(reply.parts[1][0]) == (LETTER_A,) * 4
