"""What a request's context reads is what its events say, for every family of tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.events import BranchInfo, Event, StageFinished, StageStarted, TokenEmitted
from scheduler.program import ParallelStage, Plan, SerialStage
from scheduler.step import Sample
from scheduler.stopping import FinishReason
from serve.reading.requests import read_request
from serve.server.responses import ResponseWriter
from serve.text.reader import Speller
from taper_client import generate_request, parallel, serial
from taper_client.v1 import inference_service_pb2 as pb
from tests.families import FAMILIES, family
from tests.serve.fakes import served_model
from tests.serve.text import strategies


def stage(*branches: tuple[int, Sequence[int], Sequence[int]], final: bool) -> list[Event]:
    """A stage of branches, each with what is forced and what is sampled."""
    infos = tuple(BranchInfo(branch, 0, "", tuple(forced)) for branch, forced, _ in branches)
    events: list[Event] = [StageStarted("r", 0, infos)]
    for branch, _, sampled in branches:
        events += [TokenEmitted("r", branch, Sample(token), 1) for token in sampled]
        events.append(StageFinished("r", 0, branch, FinishReason.MAX_TOKENS, None, len(sampled), final))
    return events


def shown(message: pb.GenerateResponse) -> dict[int, str]:
    """The text of each branch, forced and sampled."""
    texts: dict[int, str] = {}
    for event in message.events:
        for branch in event.stage_started.branches:
            texts[branch.branch_id] = texts.get(branch.branch_id, "") + branch.prefix
        if event.HasField("delta"):
            texts[event.delta.branch_id] += event.delta.text
    return texts


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30)
@given(
    forced=st.lists(
        st.sampled_from(["the cat", " the end", "\n1.", "日本", "🙂 a", "END"]), min_size=4, max_size=4
    ),
    said=st.lists(strategies.texts, min_size=3, max_size=3),
)
def test_forced_and_sampled_text_read_together_as_the_context_does(name, forced, said):
    tokenizer = family(name)
    model = served_model(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_context=4096)
    plan = [serial(forced[0]), parallel(forced[1:3]), serial(forced[3])]
    request = read_request(generate_request("a prompt", plan=plan), model)
    assert isinstance(request.program, Plan)
    first, fork, last = request.program.stages
    assert isinstance(first, SerialStage)
    assert isinstance(fork, ParallelStage)
    assert isinstance(last, SerialStage)
    ids = [tokenizer.encode_continuation(text) for text in said]
    events = [
        *stage((0, first.prefix, ids[0]), final=False),
        *stage(*((n, fork.branches[n - 1].prefix, ids[n]) for n in (1, 2)), final=True),
        *stage((0, last.prefix, ()), final=True),
    ]
    writer = ResponseWriter(
        request, pb.OutputOptions(), Speller(tokenizer.spelling, skip_special_tokens=True)
    )
    texts = shown(writer.write(events))
    trunk = [*request.prompt, *first.prefix, *ids[0]]
    branches = [[*fork.branches[n].prefix, *ids[n + 1]] for n in (0, 1)]

    def read(context: Sequence[int], more: Sequence[int]) -> str:
        """By the library, all at once."""
        return tokenizer.decode([*context, *more], True).removeprefix(tokenizer.decode(context, True))

    assert [texts[1], texts[2]] == [read(trunk, branch) for branch in branches]
    assert texts[0] == read(request.prompt, trunk[len(request.prompt) :]) + read(
        [*trunk, *branches[0], *branches[1]], last.prefix
    )
    assert texts[0].endswith(forced[3]), "no space that nobody wrote"
    assert [texts[n].startswith(forced[n]) for n in (1, 2)] == [True, True]
