"""Events become the chunks and the ends of answers that a gateway reads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from scheduler.events import BranchInfo, Event, Joined, StageFinished, StageStarted, Started
from scheduler.search import Match
from scheduler.stopping import FinishReason
from serve.server.gateway.messages import AnswerWriter
from tests.serve.fakes import begin, finished, say

A, B, X, Y = b"abxy"


def told(writer: AnswerWriter, *batches: Sequence[Event]) -> list[vllm.GenerateResponse]:
    return [vllm.GenerateResponse.FromString(data) for batch in batches for data in writer.messages([*batch])]


def end(branch: int, reason=FinishReason.EOS, stop: int | Match | None = None, count: int = 1):
    return StageFinished("r", 0, branch, reason, stop, count, True)


STARTED = Started("r", 9, 4)
FORKED = [
    StageFinished("r", 0, 0, FinishReason.FORKED, None, 1, False),
    begin("r", 1, (1, 0, "1", "X"), (2, 0, "2", "Y")),
]


def test_tokens_are_told_as_they_come_and_the_end_last() -> None:
    writer = AnswerWriter(answers=1, streams=True, has_logprobs=False)
    first, second, last = told(
        writer,
        [STARTED, begin("r", 0), *say("r", 0, "a")],
        say("r", 0, "b", 2),
        [end(0, FinishReason.MAX_TOKENS, None, 2), finished("r", 2)],
    )
    assert [*first.chunk.token_ids] == [A]
    assert (first.chunk.prompt_tokens, first.chunk.cached_tokens, first.chunk.completion_tokens) == (9, 4, 1)
    assert ([*second.chunk.token_ids], second.chunk.completion_tokens) == ([B], 2)
    complete = last.complete
    assert (complete.finish_reason, complete.completion_tokens, [*complete.output_ids]) == ("length", 2, [])
    assert complete.WhichOneof("matched_stop") is None
    assert (writer.branches, writer.finish) == (0, "max_tokens")


@pytest.mark.parametrize("reason", FinishReason)
def test_an_answer_that_was_cut_says_so(reason: FinishReason) -> None:
    writer = AnswerWriter(answers=1, streams=True, has_logprobs=False)
    *_, last = told(writer, [STARTED, begin("r", 0), end(0, reason)])
    cut = {FinishReason.MAX_TOKENS, FinishReason.CONTEXT}
    assert last.complete.finish_reason == ("length" if reason in cut else "stop")


def test_where_nothing_is_streamed_the_answer_is_one_message() -> None:
    writer = AnswerWriter(answers=1, streams=False, has_logprobs=True)
    [only] = told(
        writer,
        [STARTED, begin("r", 0), *say("r", 0, "a")],
        [*say("r", 0, "b", 2), end(0, count=2), finished("r", 2)],
    )
    complete = only.complete
    assert ([*complete.output_ids], complete.finish_reason) == ([A, B], "stop")
    assert (complete.prompt_tokens, complete.cached_tokens, complete.completion_tokens) == (9, 4, 2)
    logprobs = only.complete.output_logprobs
    assert ([*logprobs.token_ids], [*logprobs.token_logprobs]) == ([A, B], [-0.5, -0.5])
    assert [[*top.token_ids] for top in logprobs.top_logprobs] == [[7], [7]]


@pytest.mark.parametrize("streams", [True, False])
def test_branches_are_one_text_and_what_was_forced_counts_for_nobody(streams: bool) -> None:
    writer = AnswerWriter(answers=1, streams=streams, has_logprobs=True)
    messages = told(
        writer,
        [STARTED, begin("r", 0), *say("r", 0, "a")],
        [*FORKED, *say("r", 2, "y"), *say("r", 1, "x")],
        [end(1), end(2), Joined("r", 1, (1, 2)), begin("r", 2, (0, 0, "", "Z"))],
        [*say("r", 0, "b", 2), end(0, count=2), finished("r", 4)],
    )
    if streams:
        logprobs = [message.chunk.output_logprobs.token_logprobs for message in messages[:-1]]
        assert [value for some in logprobs for value in some] == [-0.5, 0, -0.5, 0, -0.5, 0, -0.5]
    parts = [message.chunk.token_ids for message in messages if message.HasField("chunk")]
    complete = messages[-1].complete
    ids = [*complete.output_ids] if not streams else [id for part in parts for id in part]
    assert bytes(ids) == b"aXxYyZb"
    assert (complete.completion_tokens, complete.index) == (4, 0)
    assert {message.chunk.index for message in messages} == {0}
    if not streams:
        assert [*complete.output_logprobs.token_logprobs] == [-0.5, 0, -0.5, 0, -0.5, 0, -0.5]
    assert writer.branches == 2


def test_several_answers_are_told_apart_and_each_ends_for_itself() -> None:
    writer = AnswerWriter(answers=2, streams=True, has_logprobs=False)
    both = StageStarted("r", 0, (BranchInfo(1, 0, ""), BranchInfo(2, 0, "")))
    messages = told(
        writer,
        [STARTED, both, *say("r", 1, "a"), *say("r", 2, "x")],
        [end(1, FinishReason.STOP, 33), *say("r", 2, "y", 2)],
        [end(2, FinishReason.STOP, Match("y", 1), 2), end(0, FinishReason.FORKED, None, 0), finished("r", 3)],
    )
    told_of = [
        (message.chunk.index, bytes(message.chunk.token_ids))
        if message.HasField("chunk")
        else (message.complete.index, message.complete.finish_reason)
        for message in messages
    ]
    assert told_of == [(0, b"a"), (1, b"x"), (0, "stop"), (1, b"y"), (1, "stop")]
    first, second = (message.complete for message in messages if message.HasField("complete"))
    assert (first.matched_token_id, first.completion_tokens) == (33, 1)
    assert (second.matched_stop_str, second.completion_tokens) == ("y", 2)
