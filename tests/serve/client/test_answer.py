"""Events build an answer, which reads in order, prints, and is JSON."""

from __future__ import annotations

import json

import pytest

from taper_client.answer import Completion
from taper_client.events import BranchFinished, Delta, Event, Joined, Logprob, StageBranch, StageStarted
from tests.serve.client.ends import FINISHED, STARTED


def test_what_comes_in_several_messages_is_put_together() -> None:
    """A count is of all tokens so far; everything else is new."""
    completion = Completion()
    for count, (text, token) in enumerate((("a", 97), ("b", 98), ("c", 99)), 1):
        logprob = Logprob(token=token, logprob=-float(count))
        completion.add(
            Delta(branch=0, text=text, token_ids=(token,), logprobs=(logprob,), completion_tokens=count)
        )
    trunk = completion.trunk
    assert (trunk.text, trunk.token_ids, trunk.completion_tokens) == ("abc", [97, 98, 99], 3)
    assert [each.logprob for each in trunk.logprobs] == [-1.0, -2.0, -3.0]


def test_a_branch_that_was_outrun_is_kept_and_is_not_in_the_text() -> None:
    completion = Completion()
    racers = tuple(StageBranch(branch=b, parent=0, label="", prefix=f"{b}:") for b in (1, 2))
    nested = StageBranch(branch=3, parent=1, label="", prefix="3:")
    for event in (
        StageStarted(stage=0, branches=racers),
        Delta(branch=1, text="long", token_ids=(), logprobs=(), completion_tokens=4),
        Delta(branch=2, text="no", token_ids=(), logprobs=(), completion_tokens=2),
        StageStarted(stage=1, branches=(nested,)),
    ):
        completion.add(event)
    assert completion.text == "1:long3:2:no"
    completion.add(BranchFinished(branch=3, reason="outrun", stop=None, completion_tokens=0))
    completion.add(BranchFinished(branch=1, reason="outrun", stop=None, completion_tokens=4))
    completion.add(BranchFinished(branch=2, reason="eos", stop=None, completion_tokens=2))
    assert completion.text == "2:no"
    assert [branch.outrun for branch in completion.branches] == [True, False, True]


# --- a whole answer ----------------------------------------------------------------------------------------


def stage(number: int, *branches: tuple[int, int, str]) -> StageStarted:
    """A stage of branches, each as (id, parent, prefix)."""
    begun = (
        StageBranch(branch=id, parent=parent, label="", prefix=prefix) for id, parent, prefix in branches
    )
    return StageStarted(stage=number, branches=tuple(begun))


def say(branch: int, text: str) -> Delta:
    return Delta(branch=branch, text=text, token_ids=(), logprobs=(), completion_tokens=len(text))


def end(branch: int, reason: str = "eos", tokens: int = 2) -> BranchFinished:
    return BranchFinished(branch=branch, reason=reason, stop=None, completion_tokens=tokens)


def collected(*events: Event) -> Completion:
    completion = Completion()
    for event in events:
        completion.add(event)
    return completion


FORKED = (STARTED, stage(0, (1, 0, ""), (2, 0, "")), say(1, "ab"), say(2, "cd"), end(1), end(2, "stop"))
SEVERAL = (*FORKED, end(0, "forked", 0), FINISHED)


def test_an_answer_prints_as_its_text():
    answer = collected(STARTED, stage(0, (0, 0, "")), say(0, "Hello."), end(0), FINISHED)
    assert str(answer) == f"{answer}" == answer.text == "Hello."
    assert answer.choices == ("Hello.",)
    assert answer.finish_reason == "eos"
    assert answer.prompt_token_ids == (5, 6, 7)


def test_several_answers_are_choices_that_print_as_paragraphs():
    answer = collected(*SEVERAL)
    assert answer.choices == ("ab", "cd")
    assert str(answer) == "ab\n\ncd"
    assert answer.finish_reason == "forked"


def test_branches_that_were_joined_are_parts_of_one_answer():
    answer = collected(*FORKED, Joined(stage=0, branches=(1, 2)), end(0, "forked", 0), FINISHED)
    assert answer.choices == ("abcd",)


def test_branches_that_go_on_from_an_answers_beginning_are_parts_of_it():
    first = (STARTED, stage(0, (0, 0, "")), say(0, "So: "))
    answer = collected(*first, stage(1, (1, 0, ""), (2, 0, "")), say(1, "ab"), say(2, "cd"), end(0, "forked"))
    assert answer.choices == ("So: abcd",)


def test_a_choice_has_its_prefix_and_its_own_branches():
    nested = (stage(0, (1, 0, "A: "), (2, 0, "B: ")), say(1, "x"), stage(1, (3, 1, "!")), say(2, "y"))
    assert collected(STARTED, *nested, end(0, "forked")).choices == ("A: x!", "B: y")


def test_a_branch_that_was_outrun_is_no_choice():
    assert collected(*FORKED, end(1, "outrun"), end(0, "forked", 0), FINISHED).choices == ("cd",)


def test_an_answer_is_shown_in_short():
    assert repr(collected(*SEVERAL)) == "<Completion 'abcd': forked, 4 tokens, 2 branches>"
    assert repr(Completion()) == "<Completion '': not finished, 0 tokens, 0 branches>"
    long = collected(STARTED, stage(0, (0, 0, "")), say(0, "word " * 1000))
    assert repr(long).startswith("<Completion 'word word ")
    assert "…': not finished, 5000 tokens, 0 branches>" in repr(long)
    assert len(repr(long)) < 120
    sixty, more = (repr(collected(STARTED, stage(0, (0, 0, "")), say(0, "x" * n))) for n in (60, 61))
    assert sixty.startswith(f"<Completion {'x' * 60!r}:")
    assert more.startswith(f"<Completion {'x' * 59 + '…'!r}:")


def test_a_branch_is_shown_without_its_lists():
    delta = Delta(branch=0, text="a", token_ids=(7,) * 99, logprobs=(), completion_tokens=99)
    shown = repr(collected(STARTED, delta).trunk)
    assert "text='a'" in shown
    assert "7, 7" not in shown


def test_an_answer_as_json_has_all_of_it_under_names_that_stay():
    branch = {"parent": 0, "label": "", "prefix": "", "stop": None, "completion_tokens": 2}
    told = collected(*SEVERAL).as_dict()
    assert json.loads(json.dumps(told)) == told
    assert told == {
        "request_id": "mine",
        "server": "",
        "text": "abcd",
        "choices": ["ab", "cd"],
        "finish_reason": "forked",
        "trunk": {**branch, "id": 0, "text": "", "finish_reason": "forked", "completion_tokens": 0},
        "branches": [
            {**branch, "id": 1, "text": "ab", "finish_reason": "eos"},
            {**branch, "id": 2, "text": "cd", "finish_reason": "stop"},
        ],
        "usage": {
            "prompt_tokens": 3,
            "cached_tokens": 0,
            "completion_tokens": 4,
            "critical_path_tokens": 2,
            "preemptions": 0,
        },
        "timing": {
            "queue": 0.5,
            "ttft": 1.0,
            "tpot": 0.25,
            "total": 2.0,
            "tpot_slo_met": True,
            "ttft_slo_met": False,
        },
    }


def test_ids_and_logprobs_are_in_the_json_if_they_were_asked_for():
    likely = Logprob(token=7, logprob=-0.5, top=((7, -0.5), (8, -1.0)))
    delta = Delta(branch=0, text="a", token_ids=(7,), logprobs=(likely,), completion_tokens=1)
    answer = collected(STARTED, stage(0, (0, 0, "")), delta, end(0), FINISHED)
    trunk = answer.as_dict()["trunk"]
    assert trunk["token_ids"] == [7]
    trunk["token_ids"].append(8)
    assert answer.trunk.token_ids == [7], "what is done to it is not done to the answer"
    assert json.loads(json.dumps(trunk["logprobs"])) == [
        {"token": 7, "logprob": -0.5, "top": [[7, -0.5], [8, -1.0]]}
    ]


def test_an_answer_that_is_not_whole_has_no_json():
    with pytest.raises(ValueError, match="not complete"):
        collected(STARTED).as_dict()
