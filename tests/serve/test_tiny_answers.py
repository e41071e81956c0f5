"""The default model, served: right answers, and the same tokens however they are scheduled.

Its own definition (model/tiny: whole sequences, masks, no pages) says what each answer must be; nothing of
it runs in the server.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import pytest

from bench.demo import Demo, watched_question
from model.hf_config import read_folder
from model.tiny.layout import Rows, Tokens, lay_out, pack
from model.tiny.lessons import FOLDER, prompt, tokenizer
from model.tiny.measure import held_out, load, wrong_choices
from model.tiny.tasks import Answer as Written
from model.tiny.tasks import Fork, Task, transcript
from scheduler.events import Event, StageFinished, StageStarted, TokenEmitted
from scheduler.grammars import MULTIVERSE
from scheduler.program import TagProgram
from scheduler.request import Request, Slo
from scheduler.stopping import FinishReason, Stopping
from serve.engine.runner import Runner
from serve.text.codec import TextCodec
from tests.serve.lab import Answer, Run, run

# Every run asks the default model a question or two over the wire: tests/serve/test_end_to_end.py.
pytestmark = pytest.mark.full


def request(index: int, task: Task) -> Request:
    codec = tokenizer()
    stopping = Stopping(max_tokens=448, eos_ids=frozenset(codec.eos_ids))
    program = TagProgram(grammar=MULTIVERSE, stopping=stopping, branch_max_tokens=300)
    ids = tuple(codec.encode(prompt(task.question)))
    return Request(id=str(index), prompt=ids, program=program, slo=Slo(tpot=0.05, ttft=60.0))


def serve(runner: Runner, tasks: Sequence[Task], **settings: object) -> Run:
    requests = [request(index, task) for index, task in enumerate(tasks)]
    return run(runner, requests, codec=TextCodec(tokenizer()), **settings)


def texts(answer: Answer) -> dict[tuple[str, ...], str]:
    """What each branch said, by its labels from the trunk."""
    return {name[::2]: tokenizer().decode(ids) for name, ids in answer.tokens.items()}


@pytest.fixture(scope="module")
def tasks(request: pytest.FixtureRequest) -> list[Task]:
    return held_out(request.config.getoption("--questions"))


@pytest.fixture(scope="module")
def served(default_runner: Runner, tasks: list[Task]) -> Run:
    return serve(default_runner, tasks, policy="taper")


def test_answers_to_held_out_questions_are_right(served: Run, tasks: list[Task]) -> None:
    answers = served.answers()
    right = [texts(answers[str(index)]) == transcript(task.answer) for index, task in enumerate(tasks)]
    print(f"{sum(right)} of {len(tasks)} answers are right")
    assert sum(right) >= 0.95 * len(tasks)


def test_branches_close_with_their_tag_and_the_answer_with_the_end_of_the_turn(served: Run) -> None:
    for answer in served.answers().values():
        for name, reasons in answer.reasons.items():
            assert reasons[-1] is (FinishReason.BRANCH_CLOSED if name else FinishReason.EOS)


@pytest.mark.parametrize("policy", ["off", "cap:2", "eager"])
def test_every_policy_gives_the_same_tokens(
    default_runner: Runner, served: Run, tasks: list[Task], policy: str
) -> None:
    assert serve(default_runner, tasks, policy=policy).answers() == served.answers()


def test_preemption_and_a_limit_of_sixteen_rows_change_no_token(
    default_runner: Runner, served: Run, tasks: list[Task]
) -> None:
    record = serve(default_runner, tasks, policy="eager", num_pages=208, buckets=(16,))
    assert record.preemptions() > 0
    assert max(sum(entry.rows for entry in step.entries) for step in record.steps) <= 16
    assert record.answers() == served.answers()


def as_written(events: Sequence[Event], branch: int = 0) -> Written:
    """A served answer as the tree that it came from, whatever it says."""
    parts: list[str | Fork] = []
    known = {branch}
    for event in events:
        if isinstance(event, TokenEmitted) and event.branch == branch:
            parts.append(tokenizer().decode([event.sample.token]))
        elif isinstance(event, StageStarted):
            born = [info for info in event.branches if info.parent == branch and info.branch not in known]
            known.update(info.branch for info in born)
            if born:
                parts.append(Fork({info.label: as_written(events, info.branch) for info in born}))
    return tuple(parts)


def dense_sequence(task: Task, events: Sequence[Event]) -> Tokens:
    """A served answer for one dense pass, which must say all that was sampled."""
    sequence = lay_out(prompt(task.question), as_written(events), tokenizer().encode)
    ended = [event.reason for event in events if isinstance(event, StageFinished)][-1]
    sequence.learned[-1] = ended is FinishReason.EOS
    sampled = sum(isinstance(event, TokenEmitted) for event in events)
    assert sum(sequence.learned) == sampled + sequence.learned[-1], "a sampled token is not in it"
    return sequence


def test_served_tokens_are_the_first_choices_of_one_dense_pass(served: Run, tasks: list[Task]) -> None:
    """Whatever was served: a wrong answer must be the one that the dense pass would give, too."""
    sequences = [dense_sequence(tasks[int(index)], events) for index, events in served.events.items()]
    weights, config = load(FOLDER), read_folder(FOLDER)
    length = max(1024, *(len(sequence.tokens) for sequence in sequences))
    for row in zip(*pack(sequences, length), strict=True):
        rows = Rows(*(array[None] for array in row))
        assert not wrong_choices(weights, config, rows, jnp.float32).any()


def test_the_branches_of_the_demos_question_take_less_than_half_of_the_steps(default_runner: Runner) -> None:
    watched = watched_question(Demo().seed)
    steps = {name: len(serve(default_runner, [watched], policy=name).steps) for name in ("off", "eager")}
    assert steps["off"] > 2.1 * steps["eager"]
