"""What the demo chooses and says; tests/serve/test_end_to_end.py runs its load against a server."""

from __future__ import annotations

from itertools import islice

import pytest

from bench.demo import Answered, Demo, Load, gain, knee, mixed_load, parts, questions, watched_question
from bench.load.driver import Reply
from bench.load.measures import Run
from bench.load.workload import Item
from model.tiny.tasks import Fork, Task, transcript
from scheduler.request import Slo
from taper_client.errors import ServiceError
from taper_client.v1 import inference_service_pb2 as pb
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
    slower = mixed_load(Demo(requests=8), spacing=1.0)
    assert [job.at for job in slower] == pytest.approx([2 * job.at for job in load])


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


def answered(asked: Task, *said: tuple[int, str, str]) -> Answered:
    """Branches as (number, label, text); a token for each letter. They all came at once after a second."""
    branches = [pb.Branch(branch_id=number, label=label) for number, label, _ in said]
    deltas = [
        pb.BranchDelta(branch_id=n, text=text, token_ids=list(text.encode()), completion_tokens=len(text))
        for n, _, text in said
    ]
    events = [
        pb.Event(stage_started=pb.StageStarted(stage=0, branches=branches[:1])),
        pb.Event(stage_started=pb.StageStarted(stage=1, branches=branches[1:])),
        *(pb.Event(delta=delta) for delta in deltas),
        pb.Event(finished=pb.Finished()),
    ]
    return Answered.of(
        asked, Reply(4.0, 4.1, messages=[(5.0, pb.GenerateResponse(events=events).SerializeToString())])
    )


def test_an_answer_is_right_to_the_letter_or_wrong() -> None:
    asked = task("abc", Fork({"1": ("de",), "2": ("fg",)}))
    right = transcript(asked.answer)
    said = (0, "", right[()]), (1, "1", right["1",]), (2, "2", right["2",])
    assert answered(asked, *said).right
    assert not answered(asked, *said[:2], (2, "2", right["2",] + ".")).right
    assert not answered(asked, said[0], (1, "2", right["1",]), (2, "1", right["2",])).right


def test_tokens_are_compared_by_label_whatever_the_order() -> None:
    asked = task("abc")
    one = answered(asked, (0, "", "x"), (1, "a", "left"), (2, "b", "right"))
    same = answered(asked, (0, "", "x"), (1, "b", "right"), (2, "a", "left"))
    other = answered(asked, (0, "", "x"), (1, "a", "lift"), (2, "b", "right"))
    assert one.tokens_by_label() == same.tokens_by_label() != other.tokens_by_label()


def test_a_load_is_measured_as_any_other() -> None:
    asked = task("abc")
    load = Load.of("off", [answered(asked, (0, "", "word"))] * 2, Slo(tpot=1.0, ttft=2.0), 4.0, steps=9)
    assert load.cells() == ["2", "100.0%", "0 of 2", "0.0 / 0.0", "1.00", "9", "4.0"]
    assert [record.latency for record in load.run.records] == [1.0, 1.0], "since it was due"
    late = Load.of("off", load.answered, Slo(tpot=1.0, ttft=0.5), 4.0, steps=9)
    assert late.cells()[:2] == ["0", "0.0%"]


def test_a_question_that_fails_ends_the_demo() -> None:
    with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
        Answered.of(task("abc"), Reply(0.0, error="RESOURCE_EXHAUSTED: full"))
