"""Malformed and cut-off forks through the real engine: docs/model-driven-forks.md, with the default model.

The model is right nearly always, so its limits are set where they cut an answer that is right. Every run has
a deadline and ends with no page owned (see tests/serve/lab.py).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from attention.xla import Xla
from model.tiny.lessons import prompt, tokenizer
from scheduler.grammars import MULTIVERSE
from scheduler.program import TagProgram
from scheduler.request import Request, Slo
from scheduler.step import Step
from scheduler.stopping import FinishReason, Stopping
from serve.engine.runner import Runner, RunnerConfig
from serve.text.codec import TextCodec
from tests.scheduler.alphabet import EOS, Alphabet, tokens
from tests.scheduler.scripted import Scripted, numbers, outlines
from tests.scheduler.symbolic import SymbolicDevice
from tests.serve.lab import Answer, run

BRANCH_CLOSED, ENDED, FORKED, MAX_TOKENS, STOPPED = (
    FinishReason.BRANCH_CLOSED,
    FinishReason.EOS,
    FinishReason.FORKED,
    FinishReason.MAX_TOKENS,
    FinishReason.STOP,
)
# That the scheduler takes them so is tested at every run, without a model: tests/scheduler/test_malformed.py.
pytestmark = pytest.mark.full

TOKENIZER = tokenizer()
PROGRAM = TagProgram(
    grammar=MULTIVERSE,
    stopping=Stopping(max_tokens=300, eos_ids=frozenset(TOKENIZER.eos_ids)),
    branch_max_tokens=200,
)
THREE = prompt("Reverse each word: cat, lemon, tree.")
PLAN = "<Parallel><Goal><Outline>1: cat</Outline><Outline>2: lemon</Outline><Outline>3: tree</Outline></Goal>"
LEMON = " lemon: l1 e2 m3 o4 n5 -> n5 o4 m3 e2 l1 = nomel</Path>"
NESTED = prompt("Group A: cat, tree. Group B: lemon, ox. Reverse each word.")


class Said:
    """An answer as text, by the labels of its branches."""

    def __init__(self, answer: Answer) -> None:
        self.text = {name[::2]: TOKENIZER.decode(ids) for name, ids in answer.tokens.items()}
        self.tokens = {name[::2]: len(ids) for name, ids in answer.tokens.items()}
        self.ends = {name[::2]: [*reasons] for name, reasons in answer.reasons.items()}


def ask(runner: Runner, text: str, **changes: object) -> Said:
    """The answer to `text` within changed limits, asked twice at once: the same at any width."""
    program = replace(PROGRAM, **changes)  # type: ignore[arg-type]
    slo = Slo(tpot=0.05, ttft=60.0)
    requests = [
        Request(id=id, prompt=tuple(TOKENIZER.encode(text)), program=program, slo=slo) for id in ("a", "b")
    ]
    answers = [
        answer
        for policy in ("off", "eager")
        for answer in run(runner, requests, codec=TextCodec(TOKENIZER), policy=policy).answers().values()
    ]
    assert all(answer == answers[0] for answer in answers)
    return Said(answers[0])


def stopping(**changes: object) -> Stopping:
    return replace(PROGRAM.stopping, **changes)  # type: ignore[arg-type]


def test_an_answer_that_nothing_cuts(default_runner: Runner) -> None:
    said = ask(default_runner, THREE)
    assert said.text[()].startswith(PLAN)
    assert said.text["2",] == LEMON
    assert said.ends == {(): [FORKED, ENDED], **{(label,): [BRANCH_CLOSED] for label in "123"}}


def test_a_branch_that_reaches_its_limit_is_joined_as_it_is(default_runner: Runner) -> None:
    said = ask(default_runner, THREE, branch_max_tokens=30)
    assert said.ends["2",] == [MAX_TOKENS]
    assert said.ends["1",] == [MAX_TOKENS]
    assert said.ends[()][0] is FORKED
    assert LEMON.startswith(said.text["2",])
    assert said.tokens["2",] == 30 - len(TOKENIZER.encode("\n<Path>\n2:"))


@pytest.mark.parametrize("more", [6, 20])
def test_max_tokens_in_the_middle_of_a_fork_ends_its_branches_and_the_request(
    default_runner: Runner, more: int
) -> None:
    said = ask(default_runner, THREE, stopping=stopping(max_tokens=len(TOKENIZER.encode(PLAN)) + more))
    assert said.ends == {(): [FORKED, MAX_TOKENS], **{(label,): [MAX_TOKENS] for label in "123"}}
    assert said.tokens["2",] == more - len(TOKENIZER.encode("\n<Path>\n2:"))


def test_max_tokens_right_after_the_plan_leaves_no_room_for_a_fork(default_runner: Runner) -> None:
    said = ask(default_runner, THREE, stopping=stopping(max_tokens=len(TOKENIZER.encode(PLAN)) + 1))
    assert said.ends == {(): [MAX_TOKENS]}


def test_as_many_outlines_as_allowed_open_and_one_more_is_text(default_runner: Runner) -> None:
    assert ask(default_runner, THREE, max_branches=3).ends[()] == [FORKED, ENDED]
    said = ask(default_runner, THREE, max_branches=2)
    assert said.ends.keys() == {()}
    assert said.text[()].startswith(PLAN)


def test_nesting_beyond_the_limit_is_text_in_its_branch(default_runner: Runner) -> None:
    whole, cut = ask(default_runner, NESTED), ask(default_runner, NESTED, max_depth=1)
    assert ("1", "1.1") in whole.text
    assert cut.text.keys() == {(), ("1",), ("2",)}
    assert "</Goal>" in cut.text["1",]


def test_the_end_of_the_turn_inside_a_branch_ends_the_branch(default_runner: Runner) -> None:
    (equals,) = TOKENIZER.encode("=")
    said = ask(default_runner, THREE, stopping=stopping(eos_ids=PROGRAM.stopping.eos_ids | {equals}))
    assert [said.ends[label,] for label in "123"] == [[ENDED]] * 3
    assert said.text["2",] == LEMON.partition("=")[0]
    assert said.ends[()][0] is FORKED


def test_a_stop_string_inside_a_branch_ends_the_branch(default_runner: Runner) -> None:
    said = ask(default_runner, THREE, stopping=stopping(stop_strings=("->",)))
    assert [said.ends[label,] for label in "123"] == [[STOPPED]] * 3
    assert said.text["2",] == LEMON.partition("->")[0] + "->"


def test_a_plan_that_the_prompt_has_begun_opens_nothing(default_runner: Runner) -> None:
    said = ask(default_runner, THREE + PLAN.removesuffix("</Goal>"))
    assert said.text[()].startswith("</Goal>")
    assert said.ends.keys() == {()}


def test_tags_in_a_question_open_and_close_nothing(default_runner: Runner) -> None:
    said = ask(default_runner, prompt(f"{PLAN}</Path>"), stopping=stopping(max_tokens=60))
    assert "</Goal>" not in said.text[()], "the model closes no plan of its own here"
    assert said.ends.keys() == {()}


# --- a scripted device ---------------------------------------------------------------------------------


class ScriptedRunner:
    """A symbolic device in the place of the real one."""

    def __init__(self, model: Scripted) -> None:
        self.config = RunnerConfig(num_pages=1000, page_size=4, buckets=(8, 32), num_slots=64, backend=Xla())
        self.buckets = self.config.buckets
        self.model_config = SimpleNamespace(max_context=900)
        self._device = SymbolicDevice(1000, 4, 64, model)

    def launch(self, step: Step) -> SimpleNamespace:
        samples = self._device.execute(step)
        return SimpleNamespace(is_ready=lambda: True, samples=lambda: samples)


@pytest.mark.parametrize(("allowed", "ends"), [(50, [FORKED, ENDED]), (49, [ENDED])])
def test_fifty_outlines_are_fifty_branches_or_text(allowed: int, ends: list[FinishReason]) -> None:
    texts = {(): [outlines(50) + "$" * (allowed < 50), "$"], **{((0, n),): ["a</Path>"] for n in range(50)}}
    limits = Stopping(max_tokens=600, eos_ids=frozenset({EOS}))
    program = replace(PROGRAM, stopping=limits, branch_max_tokens=20, max_branches=allowed)
    request = Request(id="r", prompt=tokens("a"), program=program)
    runner: Any = ScriptedRunner(Scripted(texts))
    answer = run(runner, [request], codec=Alphabet(), prefix_cache=False).answers()["r"]
    assert [*answer.reasons[()]] == ends
    opened = {name[-2] for name in answer.reasons if name}
    assert opened == (set(numbers(50)) if allowed == 50 else set())
