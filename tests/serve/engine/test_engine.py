"""The engine's requests: refusals say why, cancels take effect at once, and ids are taken until their end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from scheduler.events import Finished, TokenEmitted
from scheduler.step import Entry, Step
from serve.door import Failed, News, Refused
from serve.engine.engine import InProcessEngine
from serve.engine.runner import Runner
from tests.serve.engine.instant import SLO, Device, answer_at_once, request, scheduler
from tests.serve.lab import NUM_PAGES, answer, run
from tests.serve.loads import load, parallel, serial
from tests.serve.waiting import Listener


def test_refusals_say_why() -> None:
    engine = InProcessEngine(scheduler(num_pages=8), Device())
    assert answer_at_once(engine, request("early", serial(1))) == Refused(
        "STARTING", "the server is starting"
    )
    engine.start()
    refused = answer_at_once(engine, request("large", serial(400)))
    assert isinstance(refused, Refused)
    assert refused.reason == "KV_FULL"
    failed = answer_at_once(engine, request("odd", parallel("kv", 2, 2), serial(2)))
    assert isinstance(failed, Failed)
    assert "after a kv join needs a prefix" in failed.error
    engine.stop(drain=True, timeout=5)


def test_the_policy_switches_while_requests_run() -> None:
    engine = InProcessEngine(scheduler(policy="off"), Device())
    engine.set_policy("cap:3")
    assert engine.policy == "cap:3"
    with pytest.raises(ValueError, match="unknown policy"):
        engine.set_policy("fastest")


VICTIM = request("victim", serial(6), parallel("kv", 2, 14, 14), serial(6, (35, 36)), prompt=40)

PHASES: dict[str, Callable[[list[Entry], int], bool]] = {
    "queued": lambda mine, step: step == 4 and not mine,
    "mid-prompt": lambda mine, step: any(not e.samples and e.ordinal > 0 for e in mine),
    "serial decode": lambda mine, step: any(e.tokens is None and not e.path for e in mine),
    "inside a fork": lambda mine, step: any(e.path for e in mine),
    "between fork and join": lambda mine, step: any(e.path and e.ordinal > 8 for e in mine),
    "after the join": lambda mine, step: any(not e.path and len(e.context) > 1 for e in mine),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancel_frees_everything_before_the_next_plan(exact_runner: Runner, phase: str) -> None:
    mates = [r for r in load(SLO) if r.id.endswith("-0")][:4]
    alone = {r.id: run(exact_runner, [r], policy="off").answers()[r.id] for r in mates}
    steps: list[Step] = []

    class Cancelling:
        def launch(self, step: Step) -> object:
            assert submitted.wait(10)
            steps.append(step)
            mine = [entry for entry in step.entries if entry.request_id == "victim"]
            if "victim" not in cancelled_at and PHASES[phase](mine, len(steps)):
                cancelled_at["victim"] = len(steps)
                with engine._wake:  # the engine goes on meanwhile
                    live = sched.load()
                    engine.cancel("victim")
                    engine.cancel("victim")  # finds nothing
                    sched.check()
                    freed = live.kv_used_tokens - sched.load().kv_used_tokens
                assert freed > 0 if phase != "queued" else live.queued_requests > 0
            return exact_runner.launch(step)

    cancelled_at: dict[str, int] = {}
    submitted = threading.Event()
    # Pages for the mates and, unless it is to stay queued, for the victim too.
    sched = scheduler(23 if phase == "queued" else NUM_PAGES, max_chunk=7)
    engine = InProcessEngine(sched, Cancelling())  # type: ignore[arg-type]
    listeners = {r.id: Listener() for r in mates}
    heard: list[News] = []
    engine.start()
    for mate in mates:
        engine.submit(mate, listeners[mate.id])
    engine.submit(VICTIM, heard.extend)
    submitted.set()
    answers = {name: answer(listener.wait(60)) for name, listener in listeners.items()}  # type: ignore[arg-type]
    engine.stop(drain=True, timeout=10)
    assert cancelled_at, "the phase never came"
    assert answers == alone
    after = steps[cancelled_at["victim"] + 1 :]  # one more plan may have been made already
    assert not [e for step in after for e in step.entries if e.request_id == "victim"]
    assert not any(isinstance(event, Finished) for event in heard)
    sched.check()
    assert sched.load().kv_used_tokens == 0


def test_who_is_cancelled_before_a_step_is_told_hears_nothing_of_it() -> None:
    """Not even if another has taken the id."""
    looks, gone, listener = 0, Listener(), Listener()

    def look() -> None:
        nonlocal looks, heard
        looks += 1
        if looks == 5:  # step 2 has ended
            engine.cancel("r")
            heard = len(gone.news)
            engine.submit(request("r", serial(2)), listener)

    heard = -1
    engine = InProcessEngine(scheduler(), Device(), before_plan=look)
    engine.start()
    engine.submit(request("r", serial(20)), gone)
    events = listener.wait()
    engine.stop(drain=True, timeout=5)
    assert len(gone.news) == heard > 0
    assert [event.completion_tokens for event in gone.news if isinstance(event, TokenEmitted)] == [1, 2]
    assert [event.completion_tokens for event in events if isinstance(event, TokenEmitted)] == [1, 2]


def test_an_engine_whose_last_request_is_cancelled_before_the_plan_goes_on_waiting() -> None:
    def look() -> None:
        if cancelling:
            engine.cancel(cancelling.pop())

    cancelling = ["gone"]
    engine = InProcessEngine(scheduler(), Device(), before_plan=look)
    engine.start()
    engine.submit(request("gone", serial(5)), Listener())
    while cancelling:
        pass
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    assert isinstance(listener.wait()[-1], Finished)
    engine.stop(drain=True, timeout=5)


def test_an_id_is_taken_until_its_end_is_told() -> None:
    engine, proceed = (
        InProcessEngine(scheduler(), Device(lambda step: proceed.wait(10) and None)),
        threading.Event(),
    )
    engine.start()
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    refused = answer_at_once(engine, request("r", serial(2)))
    assert isinstance(refused, Refused)
    assert refused.reason == "DUPLICATE"
    proceed.set()
    listener.wait()
    engine.stop(drain=True, timeout=5)


def test_whoever_takes_the_id_of_a_cancelled_request_is_told_of_their_own_tokens_alone() -> None:
    cancelled, reached = threading.Event(), threading.Event()

    def hook(step: Step) -> None:
        if step.step_id == 5:
            reached.set()
            cancelled.wait(10)

    engine = InProcessEngine(scheduler(), Device(hook))
    engine.start()
    engine.submit(request("r", serial(20)), Listener())
    assert reached.wait(10)
    engine.cancel("r")
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    cancelled.set()
    events = listener.wait()
    engine.stop(drain=True, timeout=5)
    assert [event.completion_tokens for event in events if isinstance(event, TokenEmitted)] == [1, 2]
