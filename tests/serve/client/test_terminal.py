"""What a terminal shows of an answer."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console

from taper_client.answer import (
    BranchFinished,
    Completion,
    Delta,
    Event,
    Finished,
    StageBranch,
    StageStarted,
    Timing,
    Usage,
    WidthChanged,
)
from taper_client.terminal import Answer, show_live, summary

END = Finished(
    usage=Usage(
        prompt_tokens=1, cached_tokens=2, completion_tokens=30, critical_path_tokens=20, preemptions=5
    ),
    timing=Timing(queue=1.0, ttft=0.25, tpot=0.0125, total=4.5, tpot_slo_met=True, ttft_slo_met=True),
)


def growing() -> Iterator[Event]:
    """The events of an answer that is not complete yet."""

    def stage(number: int, *branches: int) -> StageStarted:
        infos = (StageBranch(branch=b, parent=0, label=f"[b]{b}", prefix=f"{b}: ") for b in branches)
        return StageStarted(stage=number, branches=tuple(infos))

    def say(branch: int, text: str) -> Delta:
        return Delta(branch=branch, text=text, token_ids=(), logprobs=(), completion_tokens=len(text))

    done = BranchFinished(branch=1, reason="eos", stop=None, completion_tokens=3)
    yield from (stage(0, 0), say(0, "[i]hi"), stage(1, 1, 2), say(1, "tea"), say(2, "mud"), done)
    yield stage(2, 0)


def test_branches_are_drawn_side_by_side():
    completion, file = Completion(), io.StringIO()
    for event in growing():
        Console(file=io.StringIO(), width=80, force_terminal=False).print(Answer(completion))
        completion.add(event)
    Console(file=file, width=80, force_terminal=False).print(Answer(completion))
    lines = file.getvalue().splitlines()
    assert lines[0].strip() == "0: [i]hi", "text is not taken for markup"
    assert any("[b]1" in line and "[b]2" in line for line in lines)
    assert any("1: tea" in line and "2: mud" in line for line in lines)
    assert any("3 tokens" in line for line in lines)


def test_a_terminal_shows_all_of_an_answer_and_what_it_took():
    file = io.StringIO()
    show_live([*growing(), END], Console(file=file, width=80, force_terminal=True, color_system=None))
    screen = file.getvalue()
    for text in (
        "[i]hi",
        "[b]1",
        "[b]2",
        "1: tea",
        "2: mud",
        "3 tokens",
        "30 tokens, 20 on the longest path",
    ):
        assert text in screen


def test_an_answer_is_summed_up_in_a_line():
    completion = Completion()
    for event in (WidthChanged(width=2, wanted=4), WidthChanged(width=3, wanted=4), END):
        completion.add(event)
    assert summary(completion) == (
        "30 tokens, 20 on the longest path, up to 3 at once; "
        "first after 250 ms, then 12.5 ms each; 4.50 s in all"
    )


def test_a_branch_that_was_outrun_is_drawn_dim():
    def drawn(reason: str) -> str:
        completion, file = Completion(), io.StringIO()
        for event in (*growing(), BranchFinished(branch=2, reason=reason, stop=None, completion_tokens=3)):
            completion.add(event)
        Console(file=file, width=80, force_terminal=True, color_system="standard").print(Answer(completion))
        return file.getvalue()

    dim = "\x1b[2m"
    assert dim in drawn("outrun")
    assert dim not in drawn("eos")


def test_an_answer_that_never_branched_had_one_sequence_at_once():
    completion = Completion()
    completion.add(END)
    assert "up to 1 at once" in summary(completion)


def test_a_branch_without_a_label_goes_by_its_number_and_fits_a_narrow_terminal():
    completion, file = Completion(), io.StringIO()
    begun = StageBranch(branch=7, parent=0, label="", prefix="a long line " * 5)
    completion.add(StageStarted(stage=0, branches=(begun,)))
    Console(file=file, width=20, force_terminal=False).print(Answer(completion))
    lines = file.getvalue().splitlines()
    assert "branch 7" in lines[0]
    assert lines[0].rstrip().endswith("╮"), "the right edge is drawn"
    assert max(map(len, lines)) <= 20
