"""The commands, as they are typed."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from serve import commands
from serve.client.answer import BranchFinished, Completion, Delta, StageBranch, StageStarted
from tests.serve.fakes import FakeEngine, fork_and_join, listening


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(FakeEngine(fork_and_join)) as address:
        yield address


def run_client(*args: str) -> None:
    commands.client([*args])


def test_an_answer_is_printed_branch_by_branch_and_whole(address, capsys):
    run_client(
        "Drinks?", "--branch", "Tea: ", "--branch", "Coffee: ", "--conclude", " So: ", "--address", address
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "[1 tea] Tea: good",
        "[3 ] , or x",
        "[4 ] , and y",
        "[joined 3, 4]",
        "[2 ] Coffee: bad",
        "[joined 1, 2]",
        "Hi. Tea: goodCoffee: bad, or x, and y So: tea.",
    ]
    assert printed.err.startswith("17 tokens, 17 on the longest path, up to 2 at once; first after 500 ms")


def test_what_is_wrong_is_said_in_a_line(address):
    with pytest.raises(SystemExit) as caught:
        run_client("Drinks?", "--max-tokens", "0", "--address", address)
    assert str(caught.value) == "taper-client: INVALID_ARGUMENT: stopping.max_tokens: must be at least 1"


def test_branches_that_begin_alike_can_be_asked_for(address, capsys):
    run_client("Drinks?", "--branch", "A ", "--branch", "A ", "--address", address)
    assert "Hi. " in capsys.readouterr().out


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
        console.print(commands.Answer(completion))
        screen = console.file.getvalue()
    lines = screen.splitlines()
    assert lines[0].strip() == "0: [i]hi", "text is not taken for markup"
    assert any("[b]1" in line and "[b]2" in line for line in lines)
    assert any("1: tea" in line and "2: mud" in line for line in lines)
    assert any("3 tokens" in line for line in lines)


@pytest.mark.parametrize("command", [commands.serve, commands.client])
def test_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--load-format", "telepathy"), ("--policy", "fast"), ("--page-size", "0")]
)
def test_an_option_that_cannot_work_is_refused_before_anything_is_loaded(option, capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve([*option])
    assert caught.value.code == 2
    assert option[1] in capsys.readouterr().err
