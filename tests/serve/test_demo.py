"""What the demo chooses and says; tests/serve/test_end_to_end.py runs its load against a server."""

from __future__ import annotations

from itertools import islice

import pytest

from model.tiny.lessons import prompt, tokenizer
from model.tiny.tasks import Fork, Task
from scheduler.program import MULTIVERSE, TagProgram
from scheduler.request import Request, Slo, Stopping
from serve.client.answer import Delta
from serve.demo import Demo, Measured, Run, _knee, gain, mixed_load, parts, questions, watched_question
from serve.engine.runner import Runner
from tests.serve.lab import run


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


def test_its_branches_take_less_than_half_of_the_steps(default_runner: Runner) -> None:
    codec = tokenizer()
    program = TagProgram(
        grammar=MULTIVERSE,
        stopping=Stopping(max_tokens=448, eos_ids=frozenset(codec.eos_ids)),
        branch_max_tokens=300,
    )
    asked = tuple(codec.encode(prompt(watched_question(Demo().seed).question)))
    request = Request(id="r", prompt=asked, program=program, slo=Slo(tpot=1.0, ttft=60.0))
    steps = {
        policy: len(run(default_runner, [request], codec=codec, policy=policy).steps)
        for policy in ("off", "eager")
    }
    assert steps["off"] > 2.1 * steps["eager"]


def test_every_second_question_of_a_load_forks_and_a_seed_always_draws_the_same() -> None:
    load, again = (mixed_load(Demo(requests=8), spacing=0.5) for _ in range(2))
    assert [bool(parts(job.task)) for job in load] == [False, True] * 4
    assert load == again
    assert load[0].at == 0.0
    assert [job.at for job in load] == sorted(job.at for job in load)


@pytest.mark.parametrize(("seconds", "said"), [(0.1, "No knee"), (0.3, "1 serial answers missed")])
def test_the_demo_says_whether_branches_cost_others_their_target(seconds: float, said: str) -> None:
    measured = Measured(task("abc"))
    for elapsed in (1.0, 1.0 + seconds):
        delta = Delta(branch=0, text="a", token_ids=(1,), logprobs=(), completion_tokens=1)
        measured.add(delta, elapsed)
    eager = Run(measured=[measured], seconds=1.0, steps=2, tpot=0.2, ttft=5.0)
    assert said in _knee(eager)
