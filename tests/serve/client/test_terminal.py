"""What a terminal shows of an answer."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console

from serve.client.answer import BranchFinished, Completion, Delta, StageBranch, StageStarted
from serve.client.terminal import Answer


def growing() -> Iterator[Completion]:
    """An answer, after each of its events."""

    def stage(number: int, *branches: int) -> StageStarted:
        infos = (StageBranch(branch=b, parent=0, label=f"[b]{b}", prefix=f"{b}: ") for b in branches)
        return StageStarted(stage=number, branches=tuple(infos))

    def say(branch: int, text: str) -> Delta:
        return Delta(branch=branch, text=text, token_ids=(), logprobs=(), completion_tokens=len(text))

    completion = Completion()
    yield completion
    done = BranchFinished(branch=1, reason="eos", stop=None, completion_tokens=3)
    for event in (
        stage(0, 0),
        say(0, "[i]hi"),
        stage(1, 1, 2),
        say(1, "tea"),
        say(2, "mud"),
        done,
        stage(2, 0),
    ):
        completion.add(event)
        yield completion


def test_branches_are_drawn_side_by_side():
    screen = ""
    for completion in growing():
        console = Console(file=io.StringIO(), width=80, force_terminal=False)
        console.print(Answer(completion))
        screen = console.file.getvalue()
    lines = screen.splitlines()
    assert lines[0].strip() == "0: [i]hi", "text is not taken for markup"
    assert any("[b]1" in line and "[b]2" in line for line in lines)
    assert any("1: tea" in line and "2: mud" in line for line in lines)
    assert any("3 tokens" in line for line in lines)
