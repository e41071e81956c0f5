"""What a terminal shows of an answer."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from scheduler.grammars import GRAMMARS
from scheduler.outline import Numbered
from taper_client.answer import Completion
from taper_client.events import (
    BranchFinished,
    Delta,
    Event,
    Finished,
    StageBranch,
    StageStarted,
    Timing,
    Usage,
    WidthChanged,
)
from taper_client.terminal import TAGS, Answer, show_live, summary

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


# --- a model that forks by itself --------------------------------------------------------------------------


def forking(*parts: str) -> Iterator[Event]:
    """The events of an answer that forks by tags, in pieces that are shorter than these."""

    def say(branch: int, text: str) -> Iterator[Delta]:
        for begin in range(0, len(text), 6):
            piece = text[begin : begin + 6]
            yield Delta(branch=branch, text=piece, token_ids=(), logprobs=(), completion_tokens=begin)

    yield StageStarted(stage=0, branches=(StageBranch(branch=0, parent=0, label="", prefix=""),))
    outlines = "".join(f"<Outline>{number}: {part}</Outline>" for number, part in enumerate(parts, 1))
    yield from say(0, f"<Parallel>\n<Goal>\n{outlines}</Goal>")
    numbers = range(1, len(parts) + 1)
    yield StageStarted(
        stage=1,
        branches=tuple(
            StageBranch(branch=n, parent=0, label=f"{n}", prefix=f"\n<Path>\n{n}:") for n in numbers
        ),
    )
    for number, part in enumerate(parts, 1):
        yield from say(number, f" {part} = " + "word " * 5 * number + "</Path>")
        yield BranchFinished(branch=number, reason="branch_closed", stop=None, completion_tokens=9)
    conclusion = StageBranch(branch=0, parent=0, label="", prefix="\n<Conclusion>\n")
    yield StageStarted(stage=2, branches=(conclusion,))
    yield from say(0, "1 < 2</Conclusion>\n</Parallel>")
    yield BranchFinished(branch=0, reason="eos", stop=None, completion_tokens=9)


def screens(width: int, *parts: str) -> Iterator[list[str]]:
    """What is drawn after each event."""
    completion = Completion()
    for event in forking(*parts):
        completion.add(event)
        file = io.StringIO()
        Console(file=file, width=width, force_terminal=False).print(Answer(completion, tags=False))
        yield file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "parts"), [(40, 1), (80, 3), (110, 2), (140, 5)])
def test_a_fork_is_read_without_tags_and_its_panels_grow_together(width: int, parts: int) -> None:
    height, lines = 0, list[str]()
    for lines in screens(width, *("tea", "mud", "sea", "oak", "ice")[:parts]):
        assert all(line.strip() for line in lines), "no line is empty"
        assert not any(tag in line for line in lines for tag in ("</", "<P", "<G", "<O", "<C"))
        edges = [line for line in lines if line[0] in "╭╰"]
        assert all(line.count(line[0]) == parts for line in edges), "a row begins and ends as one"
        if edges:
            assert len(lines) >= height, "what has grown stays"
            height = len(lines)
    assert "1: tea" in lines[0], "the plan names the panels"
    assert lines[1].startswith("│ tea = word")
    assert lines[-1].strip() == "1 < 2", "what is no tag stays"


def test_a_row_of_panels_wraps_into_rows_of_like_lengths() -> None:
    *_, lines = screens(80, "tea", "mud", "sea", "oak")
    assert [line.count("╭") for line in lines if line[0] == "╭"] == [2, 2]
    assert {len(line) for line in lines if line[0] == "╭"} == {80}


def test_a_plan_that_does_not_fit_the_titles_stays_a_text() -> None:
    *_, lines = screens(80, "tea", "a line of a plan that is longer than a panel is wide", "sea")
    assert [line.strip() for line in lines[:1]] == ["1: tea"]
    assert "─ 2 ─" in lines[3]


def test_the_tags_that_are_left_out_are_those_of_every_set_that_has_a_name() -> None:
    for grammar in GRAMMARS.values():
        opens = (grammar.plan_open, grammar.branch_open.replace("{label}:", ""), grammar.join_open)
        outline = grammar.outline
        assert isinstance(outline, Numbered)
        for tag in (*opens, grammar.plan_close, grammar.branch_close, outline.opens, "</Parallel>"):
            assert not TAGS.sub("", tag).strip(), tag


def test_of_an_answer_that_is_higher_than_the_terminal_the_end_is_shown_while_it_grows() -> None:
    def long() -> Iterator[Event]:
        yield StageStarted(stage=0, branches=(StageBranch(branch=0, parent=0, label="", prefix=""),))
        text = "\n".join(f"line {number}" for number in range(50))
        yield Delta(branch=0, text=text, token_ids=(), logprobs=(), completion_tokens=50)
        console.print("", end="")  # which draws what is live anew
        drawn.append(file.getvalue())
        yield END

    file, drawn = io.StringIO(), list[str]()
    console = Console(file=file, width=80, height=10, force_terminal=True, color_system=None)
    show_live(long(), console)
    assert "line 49" in drawn[0]
    assert "line 5\n" not in drawn[0].replace("\r", "")
    assert "line 5" in file.getvalue()[len(drawn[0]) :], "and in the end all of it"
