"""What the demo chooses and says; tests/serve/test_end_to_end.py has it ask a server."""

from __future__ import annotations

import io
from itertools import islice

import pytest
from rich.console import Console

from bench import server
from bench.demo import Answered, Demo, gain, mixed, parts, questions, serving, watched_question
from bench.load.driver import Reply
from model.tiny.tasks import Fork, Task, transcript
from taper_client.errors import ServiceError
from taper_client.v1 import inference_service_pb2 as pb


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


def test_every_second_question_forks_and_a_seed_always_draws_the_same() -> None:
    drawn, again = (mixed(Demo(requests=8)) for _ in range(2))
    assert [bool(parts(each)) for each in drawn] == [False, True] * 4
    assert drawn == again


STARTS = """
import sys
print("2026-01-01 [info     ] compiled                       program='1 of 2' rows=8", file=sys.stderr)
{end}
"""
READY = "print('taper-serve ready on 127.0.0.1:4242', flush=True)"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_start_of_the_server_is_told_as_it_goes_on(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "PROGRAM", STARTS.format(end=READY))
    screen = io.StringIO()
    with serving([], Console(file=screen, force_terminal=terminal)) as address:
        assert address == "127.0.0.1:4242"
    assert "Starting taper-serve" in screen.getvalue()
    assert "compiled 1 of 2 programs" in screen.getvalue()
    assert capfd.readouterr().err == "", "the log itself is not shown"


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PROGRAM", STARTS.format(end="raise SystemExit('no such model')"))
    quiet = Console(file=io.StringIO())
    with pytest.raises(ChildProcessError, match=r"did not start(.|\n)*no such model"), serving([], quiet):
        pass


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


def test_a_question_that_fails_ends_the_demo() -> None:
    with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
        Answered.of(task("abc"), Reply(0.0, error="RESOURCE_EXHAUSTED: full"))
