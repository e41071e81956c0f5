"""A crash is told to everybody, in a line that says why, and ends the engine."""

from __future__ import annotations

from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from scheduler.events import TokenEmitted
from scheduler.step import Sample, Step
from serve.door import Failed, Refused
from serve.engine.engine import InProcessEngine
from serve.engine.runner import GarbageError
from tests.serve.engine.instant import Device, answer_at_once, request, scheduler
from tests.serve.loads import serial
from tests.serve.waiting import Listener


def test_a_crash_is_told_to_every_request() -> None:
    def crash(step: Step) -> None:
        if step.step_id == 3:
            raise RuntimeError("the device is gone")

    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    last = listener.wait()[-1]
    assert isinstance(last, Failed)
    assert "the device is gone" in last.error
    assert isinstance(answer_at_once(engine, request("late", serial(1))), Refused)
    assert engine.state == "FAILED"
    engine.stop(drain=True, timeout=5)
    assert engine.state == "FAILED", "who asks later learns of it too"


OOM = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 123456 bytes.")


@pytest.mark.parametrize("when", ["launch", "is_ready", "samples"])
@pytest.mark.parametrize(
    ("crash", "said"),
    [
        (OOM, "a step found no memory: start again with fewer --num-pages or smaller --buckets (RESOURCE_EX"),
        (SystemExit(3), "a step failed: SystemExit: 3"),
        (RuntimeError("a bug\nwith lines"), "a step failed: RuntimeError: a bug with lines"),
        (GarbageError(-7), "a step failed: GarbageError: the device came to token -7"),
    ],
    ids=["out of memory", "exit", "bug", "garbage"],
)
def test_whatever_a_step_raises_ends_the_engine_which_says_why_in_a_line(
    when: str, crash: BaseException, said: str
) -> None:
    class Flown(Device.Flown):
        def is_ready(self) -> bool:
            return raised_at("is_ready", super().is_ready())

        def samples(self) -> tuple[Sample, ...]:
            return raised_at("samples", super().samples())

    class Crashing:
        steps = 0

        def launch(self, step: Step) -> Flown:
            self.steps = step.step_id
            return raised_at("launch", Flown(step))

    def raised_at(here: str, result: Any) -> Any:
        if here == when and device.steps >= 3:
            raise crash
        return result

    device, listener = Crashing(), Listener()
    engine = InProcessEngine(scheduler(), device)  # type: ignore[arg-type]
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    assert isinstance(listener.wait()[-1], Failed)
    engine.wait()
    assert engine.state == "FAILED"
    assert engine.failure.startswith(said)
    assert "\n" not in engine.failure


def test_a_failure_counts_even_where_it_cannot_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        def exception(self, text: str) -> None:
            states.append(engine.state)

    def crash(step: Step) -> None:
        raise RuntimeError("the device is gone")

    states: list[str] = []
    monkeypatch.setattr("serve.engine.engine.log", Log())
    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    assert isinstance(listener.wait()[-1], Failed)
    assert states == ["FAILED"], "it is known before it is said: to say it may fail"


def test_what_came_before_a_crash_is_told_before_it() -> None:
    def crash(step: Step) -> None:
        if step.step_id == 6:
            raise RuntimeError("the device is gone")

    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    *told, last = listener.wait()
    engine.stop(drain=False, timeout=5)
    assert isinstance(last, Failed)
    counts = [event.completion_tokens for event in told if isinstance(event, TokenEmitted)]
    assert counts == [1, 2, 3, 4, 5, 6], "step 5 was under way, and has ended"
