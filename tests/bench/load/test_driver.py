from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.load.driver import Answer, Driver, Emission, Reply, clock, connected, message, play
from bench.load.workload import FAMILIES, Item, closed_loop
from scheduler.request import Slo
from serve.reading.requests import read_request
from taper_client.v1 import inference_service_pb2 as pb
from tests.bench.load.replies import END, delta, reply, stage, width
from tests.bench.served import MAX_CONTEXT, Served, serving
from tests.serve.fakes import VOCAB, served_model

FORK = Item(0.0, 5, ((3,), (4, 2, 6), (5,)))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as it:
        yield it


def ask(address: str, *requests: bytes, **options: object) -> list[Reply]:
    async def talk() -> list[Reply]:
        async with connected(address) as driver:
            return await play(driver, requests, [0.0] * len(requests), **options)

    return asyncio.run(talk())


def test_clients_run_where_there_is_no_jax() -> None:
    program = """
import sys, bench.load.serve, bench.load.goodput
print({"jax", "flax", "matplotlib"} & sys.modules.keys())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


# --- what is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_message_asks_for_what_the_simulator_serves(family: str) -> None:
    model = served_model(max_context=100_000, max_branches=200)
    slo = Slo(tpot=0.03125, ttft=5.0, reject=family == "mixed")
    for seed, item in enumerate(closed_loop(family, 1, 8, seed=3).items):
        sent = message(item, "a", seed, VOCAB, slo=slo, salt="run")
        received = read_request(pb.GenerateRequest.FromString(sent), model)
        wanted = item.request("a", slo, seed, VOCAB)
        assert received.program == wanted.program
        assert (received.prompt, received.slo) == (wanted.prompt, wanted.slo)
        assert received.sampling.seed == wanted.sampling.seed
        assert received.cache_salt == "run"


def test_a_message_says_how_often_it_wants_messages_only_where_that_is_asked() -> None:
    for interval_ms in (None, 250.0):
        sent = pb.GenerateRequest.FromString(message(FORK, "a", 1, VOCAB, interval_ms=interval_ms))
        assert sent.output.interval_ms == (interval_ms or 0.0)


# --- what comes back ---------------------------------------------------------------------------------------


def test_stages_are_told_apart_by_what_the_trunk_does() -> None:
    """Branch 2 goes on with stages of its own, and forks: all that is one stage of the trunk."""
    nested = [
        [stage(0, (0, 0)), delta(0, 1)],
        [delta(0, 2), stage(1, (1, 0), (2, 0))],
        [delta(1, 1), delta(2, 1)],
        [delta(1, 2), stage(2, (2, 0)), delta(2, 2)],
        [stage(3, (3, 2), (4, 2)), delta(3, 1), delta(4, 1)],
        [stage(4, (0, 0)), delta(0, 5), END],
    ]
    answer = Answer.of(reply(*nested))
    assert answer.stages == ((2,), (2, 2, 1, 1), (3,))
    assert [emission.tokens for emission in answer.emissions] == [1, 1, 2, 2, 2, 3]
    assert answer.finished
    assert answer.gaps == [1.0] * 5


def test_two_parallel_stages_in_a_row_are_two() -> None:
    answer = Answer.of(
        reply([stage(0, (1, 0), (2, 0)), delta(1, 1), delta(2, 1)], [stage(1, (3, 0)), delta(3, 4), END])
    )
    assert answer.stages == ((1, 1), (4,))


def test_steps_are_counted_also_where_several_come_at_once() -> None:
    answer = Answer.of(
        reply(
            [stage(0, (1, 0), (2, 0)), delta(1, 1), delta(2, 1)],  # the width of the first is not told
            [width(1), delta(1, 2), delta(2, 2)],  # they took turns
            [width(2), delta(1, 5), delta(2, 5)],
            [width(2)],
        )
    )
    assert answer.emissions == [Emission(1, 2, 1), Emission(2, 2, 2.0), Emission(3, 6, 3.0)]
    assert not answer.finished


def test_an_answer_of_other_lengths_is_not_finished() -> None:
    answer = Answer.of(reply([stage(0, (0, 0)), delta(0, 3), END]))
    assert answer.record(Item(0.0, 1, ((3,),)), 0.0).finished
    assert not answer.record(Item(0.0, 1, ((4,),)), 0.0).finished


# --- over the wire -----------------------------------------------------------------------------------------


def test_a_server_answers_in_the_lengths_that_were_asked_for(served: Served) -> None:
    (got,) = ask(served.address, message(FORK, "fork", 1, VOCAB))
    answer = Answer.of(got)
    assert got.error == ""
    assert (answer.stages, answer.prompt_tokens) == (FORK.stages, FORK.prompt)
    usage = pb.GenerateResponse.FromString(got.messages[-1][1]).events[-1].finished.usage
    record = answer.record(FORK, got.due)
    assert record.finished
    assert record.tokens == usage.completion_tokens == FORK.tokens
    assert usage.critical_path_tokens == FORK.critical_path
    assert got.due <= got.sent < record.first <= record.last <= got.ended
    assert len(record.stage_ends) == 3


def test_what_the_server_refuses_is_an_error_of_that_reply_alone(served: Served) -> None:
    long = message(Item(0.0, MAX_CONTEXT + 1, ((1,),)), "long", 1, VOCAB)
    bad, good = ask(served.address, long, message(FORK, "good", 1, VOCAB))
    assert bad.error.startswith("INVALID_ARGUMENT: ")
    assert bad.refused is None, "it is nothing that another server would serve"
    assert not Answer.of(bad).record(FORK, 0.0).finished
    assert Answer.of(good).finished


def test_no_more_calls_are_open_than_was_said(served: Served) -> None:
    requests = [message(Item(0.0, 4, ((8,),)), f"one-{i}", i, VOCAB) for i in range(6)]
    done: list[Reply] = []
    replies = ask(served.address, *requests, max_concurrency=2, on_reply=done.append)
    assert sorted(map(id, done)) == sorted(map(id, replies))
    changes = sorted([(r.sent, 1) for r in replies] + [(r.ended, -1) for r in replies])
    calls = 0
    for _, change in changes:
        calls += change
        assert calls <= 2


def test_what_came_before_a_cancellation_is_kept(served: Served) -> None:
    async def talk() -> Reply:
        driver = Driver(served.address)
        got = Reply(clock())
        call = asyncio.create_task(driver.ask(message(Item(0.0, 4, ((1500,),)), "long", 0, VOCAB), got))
        while not got.messages:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await driver.close()
        return got

    got = asyncio.run(talk())
    assert got.error == "cancelled by the client"
    assert not Answer.of(got).finished
    assert 0 < sum(emission.tokens for emission in Answer.of(got).emissions) < 1500
