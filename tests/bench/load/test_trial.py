from __future__ import annotations

import asyncio
import gc
import json

import pytest

from bench.load.driver import Driver, Reply
from bench.load.measures import Window
from bench.load.trial import Setting, Trial, unloaded_tpot
from bench.load.workload import ALONE, Item, Workload
from scheduler.request import Slo
from taper_client.errors import ServiceError
from taper_client.v1 import inference_service_pb2 as pb
from tests.bench.load.replies import END, delta, reply, stage, width


def played(*arrivals: float) -> Trial:
    """Requests for three tokens, answered 1 s and 2 s after they were due; the clock starts at 100 s."""
    items = tuple(Item(at, 4, ((2, 1),)) for at in arrivals)
    setting = Setting(
        workload=Workload("hand-made", "poisson", 0, items),
        slo=Slo(tpot=0.6, ttft=5.0),
        window=Window(1.0, 11.0, drain=1.0),
        vocab_size=10,
    )
    trial = Trial(setting, "off", start=100.0, cpu_share=0.1)
    for at in arrivals:
        answered = reply(
            [stage(0, (1, 0), (2, 0)), delta(1, 1)],
            [width(2), delta(1, 2), delta(2, 1), END],
        )
        answered.due, answered.sent = 100.0 + at, 100.25 + at
        answered.messages = [(100.0 + at + after, raw) for after, raw in answered.messages]
        trial.replies.append(answered)
    return trial


def test_a_row_is_of_what_arrived_in_the_window() -> None:
    row = played(0.0, 1.0, 5.0, 10.9, 11.0).row()
    assert (row["arrived"], row["finished"], row["errors"]) == (3, 3, {})
    assert (row["attainment_mean"], row["goodput_mean"]) == (1.0, 9 / 10)
    assert row["good_requests_s_mean"] == pytest.approx(0.3)
    assert (row["attainment_critical"], row["good_requests_s_critical"]) == (0.0, 0.0), "1 s for a token"
    assert (row["serial_attainment"], row["parallel_attainment"]) == (None, 1.0)
    assert row["gap_p99_ms"] == pytest.approx(1000)
    assert row["send_lag_p99_ms"] == pytest.approx(250)
    assert row["e2e_p50_s"] == pytest.approx(2)


def test_tokens_and_width_are_of_what_came_in_the_window_whoever_asked() -> None:
    """The first brings three tokens in the window, in two steps; the last but one, none: it came too late."""
    row = played(0.0, 10.9, 11.0).row()
    assert row["raw_tokens_s"] == pytest.approx(3 / 10)
    assert row["good_tokens_s"] == pytest.approx(3 / 10)
    assert row["mean_width"] == pytest.approx(3 / 2)


def test_tokens_of_an_answer_that_was_late_are_not_good() -> None:
    trial = played(2.0, 3.0)
    trial.replies[0].due -= 10.0
    row = trial.row()
    assert (row["raw_tokens_s"], row["good_tokens_s"]) == (pytest.approx(6 / 10), pytest.approx(3 / 10))


def test_what_was_not_answered_counts_against_the_policy() -> None:
    trial = played(2.0, 3.0, 11.0)
    trial.replies[2].error = "UNAVAILABLE: after the window"
    trial.replies[1].messages.pop()
    trial.replies[1].error = "RESOURCE_EXHAUSTED: full"
    row = trial.row()
    assert (row["arrived"], row["finished"]) == (2, 1)
    assert row["attainment_mean"] == row["ttft_attainment"] == 0.5
    assert row["errors"] == {"RESOURCE_EXHAUSTED: full": 1}
    assert (row["refused"], row["accepted_attainment"]) == (0.5, 1.0)


def test_nothing_in_the_window_is_null_and_not_a_number() -> None:
    row = played(0.0).row()
    assert (row["arrived"], row["attainment_stage"], row["gap_p99_ms"]) == (0, None, None)
    json.dumps({**row, "mean_width": row["mean_width"]}, allow_nan=False)


def test_the_slowest_gap_counts() -> None:
    trial = played(2.0, 3.0, 4.0)
    begin, end = trial.replies[1].messages
    trial.replies[1].messages = [begin, (end[0] + 10.0, end[1])]
    assert trial.row()["gap_p99_ms"] == pytest.approx(1e3 * (1 + 0.98 * 10))


class Answering(Driver):
    """Answers with ALONE's tokens; each call takes so many seconds for each."""

    def __init__(self, *tpots: float, tokens: int = ALONE.tokens) -> None:
        self.tpots, self.tokens = iter(tpots), tokens

    async def ask(self, request: bytes, reply: Reply) -> None:
        events = [stage(0, (0, 0)), delta(0, 1)], [delta(0, self.tokens), END]
        first, last = (pb.GenerateResponse(events=each).SerializeToString() for each in events)
        reply.messages = [(5.0, first), (5.0 + (self.tokens - 1) * next(self.tpots), last)]


def test_targets_follow_from_a_request_on_a_warm_server() -> None:
    assert asyncio.run(unloaded_tpot(Answering(0.5, 0.01), 100)) == pytest.approx(0.01)
    with pytest.raises(ServiceError, match="800 \\+ 400 tokens failed"):
        asyncio.run(unloaded_tpot(Answering(0.5, 0.01, tokens=399), 100))


class Asked(Driver):
    """Notes what it is asked, and whether garbage is collected meanwhile; may never answer."""

    def __init__(self, *, answers: bool = True) -> None:
        self.answers = answers
        self.requests: list[pb.GenerateRequest] = []
        self.collecting: list[bool] = []

    async def ask(self, request: bytes, reply: Reply) -> None:
        self.requests.append(pb.GenerateRequest.FromString(request))
        self.collecting.append(gc.isenabled())
        if not self.answers:
            await asyncio.Event().wait()


def play(driver: Asked) -> Trial:
    """Two requests, one after the other, in a window that is over at once."""
    items = tuple(Item(at, 4, ((2,),)) for at in (0.0, 1e-4))
    setting = Setting(
        workload=Workload("hand-made", "poisson", 0, items),
        slo=Slo(tpot=0.6, ttft=5.0),
        window=Window(0.0, 1e-3, drain=1e-3),
        vocab_size=1000,
    )
    trial = Trial(setting, "off")
    asyncio.run(asyncio.wait_for(trial.play(driver, None), 10.0))
    return trial


def test_requests_are_the_same_in_every_trial_but_for_whose_prompts_they_find() -> None:
    first, second = Asked(), Asked()
    for driver in (first, second):
        assert len(play(driver).measured) == 2
        assert [request.sampling.seed for request in driver.requests] == [0, 1]
    salts = [{request.cache_salt for request in driver.requests} for driver in (first, second)]
    assert [len(salt) for salt in salts] == [1, 1]
    assert "" not in salts[0] | salts[1]
    assert salts[0] != salts[1]
    prompts = [[[*each.prompt.token_ids.ids] for each in driver.requests] for driver in (first, second)]
    assert prompts[0] == prompts[1]
    assert prompts[0][0] != prompts[0][1]


def test_no_garbage_is_collected_while_requests_run() -> None:
    driver = Asked()
    play(driver)
    assert driver.collecting == [False, False]
    assert gc.isenabled()


def test_who_is_not_answered_in_the_drain_is_given_up() -> None:
    assert len(play(Asked(answers=False)).replies) == 2
