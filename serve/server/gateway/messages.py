"""A request's events as `vllm.grpc.engine` tells them: token ids, by answer, and how each answer ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from scheduler.events import Event, StageFinished, StageStarted, Started, TokenEmitted
from scheduler.search import Match
from scheduler.stopping import FinishReason
from serve.server.gateway.linear import LinearView, Piece

_LENGTH = (FinishReason.MAX_TOKENS, FinishReason.CONTEXT)
TRUNK = 0


class _Answer:
    """One of a request's answers: what it has come to so far."""

    def __init__(self, index: int, root: int) -> None:
        self.index, self.root = index, root
        self.view = LinearView(root)
        self.end: StageFinished | None = None  # of its root
        self.completion_tokens = 0
        self.kept: list[Piece] = []  # of an answer that is told at once

    def read(self) -> list[Piece]:
        pieces = [*self.view.read()]
        self.completion_tokens += sum(piece.sample is not None for piece in pieces)
        return pieces


class AnswerWriter:
    """Writes the messages of one request. `answering.Writer` says what is public.

    answers       how many the request asked for: branches that nothing joins, if there are several
    streams       tell tokens as they come; else each answer is one message
    has_logprobs  tell their log-probabilities
    """

    def __init__(self, *, answers: int, streams: bool, has_logprobs: bool) -> None:
        self._streams, self._has_logprobs = streams, has_logprobs
        self._prompt_tokens = self._cached_tokens = 0
        self._several = answers > 1
        # By root. Those of several come with the stage that begins them.
        self._answers = {} if self._several else {TRUNK: _Answer(0, TRUNK)}
        self.branches, self.finish = 0, ""

    def messages(self, events: Sequence[Event]) -> Iterator[bytes]:
        for event in events:
            self._add(event)
        for answer in [*self._answers.values()]:
            yield from (message.SerializeToString() for message in self._told(answer))

    def _add(self, event: Event) -> None:
        match event:
            case Started(prompt_tokens=prompt, cached_tokens=cached):
                self._prompt_tokens, self._cached_tokens = prompt, cached
            case StageStarted(branches=infos):
                self.branches = max(self.branches, *(info.branch for info in infos))
                if self._several:
                    self._answers |= {info.branch: _Answer(at, info.branch) for at, info in enumerate(infos)}
                else:
                    self._answers[TRUNK].view.add(event)
            case TokenEmitted(branch=branch):
                self._answer_of(branch).view.add(event)
            case StageFinished(branch=branch):
                self._ended(event)
            case _:
                pass

    def _answer_of(self, branch: int) -> _Answer:
        return self._answers[branch if self._several else TRUNK]

    def _ended(self, event: StageFinished) -> None:
        if event.final:
            self.finish = event.reason.value
        if self._several and event.branch == TRUNK:
            return  # it has only forked
        answer = self._answer_of(event.branch)
        answer.view.add(event)
        if event.final and event.branch == answer.root:
            answer.end = event

    def _told(self, answer: _Answer) -> Iterator[vllm.GenerateResponse]:
        pieces = answer.read()
        if not self._streams:
            answer.kept += pieces
        elif pieces:
            yield self._chunk(answer, pieces)
        if answer.end is not None and answer.view.is_over:
            yield self._complete(answer, answer.end)
            del self._answers[answer.root]

    def _chunk(self, answer: _Answer, pieces: Sequence[Piece]) -> vllm.GenerateResponse:
        chunk = vllm.GenerateStreamChunk(
            token_ids=[piece.token for piece in pieces],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=self._cached_tokens,
            output_logprobs=self._logprobs(pieces),
            index=answer.index,
        )
        return vllm.GenerateResponse(chunk=chunk)

    def _complete(self, answer: _Answer, end: StageFinished) -> vllm.GenerateResponse:
        complete = vllm.GenerateComplete(
            output_ids=[piece.token for piece in answer.kept],
            finish_reason="length" if end.reason in _LENGTH else "stop",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=self._cached_tokens,
            output_logprobs=self._logprobs(answer.kept),
            index=answer.index,
        )
        if isinstance(end.stop, Match):
            complete.matched_stop_str = end.stop.string
        elif end.stop is not None:
            complete.matched_token_id = end.stop
        return vllm.GenerateResponse(complete=complete)

    def _logprobs(self, pieces: Sequence[Piece]) -> vllm.OutputLogProbs | None:
        """A token that was forced was certain."""
        if not (self._has_logprobs and pieces):
            return None
        samples = [piece.sample for piece in pieces]
        return vllm.OutputLogProbs(
            token_logprobs=[sample.logprob or 0.0 if sample else 0.0 for sample in samples],
            token_ids=[piece.token for piece in pieces],
            top_logprobs=[
                vllm.TopLogProbs(
                    token_ids=[token for token, _ in sample.top] if sample else [],
                    values=[value for _, value in sample.top] if sample else [],
                )
                for sample in samples
            ],
        )
