"""What the demo chooses and says; tests/serve/test_end_to_end.py runs its load against a server."""

from __future__ import annotations

from itertools import islice

import pytest

from bench.demo import Demo, gain, knee, mixed_load, parts, questions, watched_question
from bench.load.measures import Run
from bench.load.workload import Item
from model.tiny.tasks import Fork, Task
from scheduler.request import Slo
from tests.bench.load.test_measures import seen


def task(*answer: str | Fork) -> Task:
    return Task("", "", answer)


def test_without_branches_there_is_nothing_to_win() -> None:
    assert gain(task("abc")) == pytest.approx(1.0)
    assert gain(task("abc", Fork({"1": ("a" * 20,)}), "abc")) == pytest.approx(1.0)


def test_branches_of_one_length_win_most() -> None:
    even = gain(task("abc", Fork({"1": ("a" * 20,), "2": ("b" * 20,)}), "abc"))
    uneven = gain(task("abc", Fork({"1": ("a" * 35,), "2": ("b" * 5,)}), "abc"))
    assert 1.0 < uneven < even < 2.0


def test_the_watched_question_has_six_parts_and_most_to_win() -> None:
    watched = watched_question(Demo().seed)
    six = islice((each for each in questions(Demo().seed) if parts(each) == 6), 200)
    assert parts(watched) == 6
    assert gain(watched) == max(map(gain, six))


def test_every_second_question_of_a_load_forks_and_a_seed_always_draws_the_same() -> None:
    load, again = (mixed_load(Demo(requests=8), spacing=0.5) for _ in range(2))
    assert [bool(parts(job.task)) for job in load] == [False, True] * 4
    assert load == again
    assert load[0].at == 0.0
    assert [job.at for job in load] == sorted(job.at for job in load)


@pytest.mark.parametrize(("seconds", "said"), [(0.1, "No knee"), (0.3, "1 serial answers missed")])
def test_the_demo_says_whether_branches_cost_others_their_target(seconds: float, said: str) -> None:
    eager = Run(
        policy="eager",
        slo=Slo(tpot=0.2, ttft=5.0),
        seconds=1.0,
        records=[seen(Item(0.0, 1, ((2,),)), 1.0, seconds), seen(Item(0.0, 1, ((1, 1),)), 1.0, 9.0)],
        tokens=4,
        turns=4,
    )
    assert said in knee(eager), "an answer with branches is not a serial one"
