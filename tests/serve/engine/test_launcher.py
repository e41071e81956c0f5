"""Steps are launched in a thread of its own: in their order, beside the engine, and none after a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from scheduler.step import Step
from serve.engine.launcher import Launch, Launcher

STEPS = [Step(number, (), slots=(), bucket=1) for number in range(20)]


class Runner:
    """Returns the step itself as its handle, after calling `hook`."""

    def __init__(self, hook: Callable[[Step], None] = lambda step: None) -> None:
        self.steps: list[Step] = []
        self.threads: set[int] = set()
        self._hook = hook

    def launch(self, step: Step) -> Step:
        self.steps.append(step)
        self.threads.add(threading.get_ident())
        self._hook(step)
        return step


def launch_all(runner: Runner, clock: Callable[[], float] = lambda: 0.0) -> list[Future[Launch]]:
    launcher = Launcher(runner, clock)  # type: ignore[arg-type]
    launches = [launcher.launch(step) for step in STEPS]
    launcher.close()
    return launches


def test_steps_are_launched_in_their_order_by_one_thread() -> None:
    runner = Runner()
    launches = launch_all(runner)
    assert runner.steps == STEPS == [launch.result(0).handle for launch in launches]
    assert len(runner.threads) == 1
    assert threading.get_ident() not in runner.threads


def test_a_launch_says_when_it_was_called_and_when_it_returned() -> None:
    now = 0.0

    def hook(step: Step) -> None:
        nonlocal now
        now += 0.25

    launches = launch_all(Runner(hook), clock=lambda: now)
    times = [(launch.result(0).launching, launch.result(0).launched) for launch in launches]
    assert times == [(0.25 * number, 0.25 * (number + 1)) for number in range(len(STEPS))]
    assert all(launch.result(0).paused >= 0.0 for launch in launches)


@pytest.mark.parametrize("failure", [RuntimeError("the device is gone"), SystemExit(3)])
def test_after_a_launch_that_failed_there_is_none(failure: BaseException) -> None:
    def hook(step: Step) -> None:
        if step.step_id == 4:
            raise failure

    runner = Runner(hook)
    launches = launch_all(runner)
    assert runner.steps == STEPS[:5]
    assert [launch.exception(0) for launch in launches] == [None] * 4 + [failure] * 16


def test_a_launch_that_does_not_end_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    proceed = threading.Event()
    monkeypatch.setattr(Launcher, "CLOSE_SECONDS", 0.01)
    launcher = Launcher(Runner(lambda step: proceed.wait(10)), lambda: 0.0)  # type: ignore[arg-type]
    launch = launcher.launch(STEPS[0])
    launcher.close()
    assert not launch.done()
    proceed.set()


def test_a_launch_does_not_wait_for_another_to_be_asked_for_and_close_waits_for_it() -> None:
    begun, proceed, closed = threading.Event(), threading.Event(), threading.Event()

    def hook(step: Step) -> None:
        begun.set()
        assert proceed.wait(10)

    launcher = Launcher(Runner(hook), lambda: 0.0)  # type: ignore[arg-type]
    launch = launcher.launch(STEPS[0])
    assert begun.wait(10)
    assert not launch.done()

    def close() -> None:
        launcher.close()
        closed.set()

    threading.Thread(target=close).start()
    assert not closed.is_set()
    proceed.set()
    assert closed.wait(10)
    assert launch.result(0).handle == STEPS[0]
