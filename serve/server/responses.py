"""Scheduler events in, GenerateResponse messages out: one message for each batch of events.

Tokens become text here. Within a message, all tokens that a branch sampled in one stage are one delta, so a
reader that fell behind gets fewer and larger messages, never more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from google.protobuf.duration_pb2 import Duration

from scheduler.events import (
    BranchInfo,
    Event,
    Finished,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    TokenEmitted,
    WidthChanged,
)
from scheduler.program import BranchSpec, Plan, Stage
from scheduler.request import Request
from scheduler.search import Match
from scheduler.step import Sample
from scheduler.stopping import FinishReason, Stopping
from serve.server.wire import Delta
from serve.text.detokenizer import Detokenizer
from serve.text.reader import Speller, TextReader
from taper_client.v1 import inference_service_pb2 as pb

_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT: pb.FINISH_REASON_CONTEXT,
    FinishReason.BRANCH_CLOSED: pb.FINISH_REASON_BRANCH_CLOSED,
    FinishReason.FORKED: pb.FINISH_REASON_FORKED,
    FinishReason.OUTRUN: pb.FINISH_REASON_OUTRUN,
}


def _are_tokens(events: Sequence[Event]) -> TypeGuard[Sequence[TokenEmitted]]:
    return {*map(type, events)} == {TokenEmitted}


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def stop_strings(request: Request) -> tuple[str, ...]:
    """Every string that may end a sequence of the request: text that could be one of them is held back."""
    program = request.program
    stoppings = list(_stoppings(program.stages)) if isinstance(program, Plan) else [program.stopping]
    return tuple(dict.fromkeys(text for stopping in stoppings for text in stopping.stop_strings))


def _stoppings(stages: Sequence[Stage]) -> list[Stopping]:
    found: list[Stopping] = []
    for stage in stages:
        for part in stage.parts:
            found.append(part.stopping)
            if isinstance(part, BranchSpec):
                found += _stoppings(part.stages)
    return found


class ResponseWriter:
    """Writes the messages of one request. Not thread-safe: it belongs to the request's call.

    branches  how many it has had, beside the trunk
    finish    why the last of its branches, or its trunk, ended
    """

    def __init__(
        self, request: Request, options: pb.OutputOptions, speller: Speller, *, server: str = ""
    ) -> None:
        """`server`: which one this is."""
        self._request, self._server = request, server
        self._options = options
        self._has_ids, self._has_logprobs = options.token_ids, options.logprobs
        self._speller = speller
        self._stops = stop_strings(request)
        self._texts: dict[int, Detokenizer] = {}  # by branch, while it lasts
        self._counts: dict[int, int] = {}  # tokens of branches between two stages
        self._deltas: dict[int, pb.BranchDelta] = {}  # by branch, in the message being written
        self._response = pb.GenerateResponse()
        self.branches, self.finish = 0, ""

    def messages(self, events: Sequence[Event]) -> tuple[bytes]:
        """`write`, as `answering.Writer` has it."""
        return (self.write(events).SerializeToString(),)

    def write(self, events: Sequence[Event]) -> pb.GenerateResponse:
        """The message that tells `events`, in their order."""
        if not self._has_logprobs and _are_tokens(events):
            return self._tokens(events)
        return self.build(events)

    def build(self, events: Sequence[Event]) -> pb.GenerateResponse:
        """As `write`, object by object, whatever the events are."""
        self._response = pb.GenerateResponse()
        self._deltas.clear()
        for event in events:
            self._add(event)
        return self._response

    def _tokens(self, events: Sequence[TokenEmitted]) -> pb.GenerateResponse:
        """What nearly all messages are: each delta's bytes are put together by hand."""
        texts, has_ids = self._texts, self._has_ids
        deltas: dict[int, Delta] = {}
        for _, branch, sample, count in events:
            delta = deltas.get(branch)
            if delta is None:
                delta = deltas[branch] = Delta(branch)
            delta.text += texts[branch].push(sample.token)
            delta.count = count
            if has_ids:
                delta.ids.append(sample.token)
        return pb.GenerateResponse.FromString(b"".join([delta.event() for delta in deltas.values()]))

    def _add(self, event: Event) -> None:
        match event:
            case TokenEmitted():
                self._token(event)
            case WidthChanged(width=width, wanted=wanted):
                self._response.events.add(width_changed=pb.WidthChanged(width=width, wanted=wanted))
            case StageStarted():
                self._stage_started(event)
            case StageFinished():
                self._stage_finished(event)
            case Joined(stage=stage, branches=branches):
                self._response.events.add(joined=pb.Joined(stage=stage, branch_ids=branches))
            case Started():
                self._started(event)
            case Finished():
                self._finished(event)

    def _started(self, event: Started) -> None:
        echoed = self._request.prompt if self._options.prompt_token_ids else ()
        started = pb.Started(
            request_id=self._request.id,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            prompt_token_ids=echoed,
            server=self._server,
        )
        self._response.events.add(started=started)

    def _stage_started(self, event: StageStarted) -> None:
        first = event.branches[0]
        before = first.branch if first.branch in self._texts else first.parent
        if any(info.prefix for info in event.branches):
            self._end_character(before)
        branches = [self._branch(info) for info in event.branches]
        if before != first.branch and before in self._texts:
            self._texts[before].finish()  # its last character went on in the branches
        self._response.events.add(stage_started=pb.StageStarted(stage=event.stage, branches=branches))

    def _end_character(self, branch: int) -> None:
        """A character that a stage left unfinished is shown as unreadable before forced text follows."""
        rest = self._texts[branch].finish() if branch in self._texts else ""
        if rest:
            delta = self._delta(branch)
            delta.text += rest
            delta.completion_tokens = self._counts[branch]

    def _branch(self, info: BranchInfo) -> pb.Branch:
        self.branches = max(self.branches, info.branch)
        if info.branch not in self._texts:
            parent = self._texts.get(info.parent)
            self._texts[info.branch] = parent.fork() if parent else self._trunk()
        self._deltas.pop(info.branch, None)
        return pb.Branch(
            branch_id=info.branch,
            parent_branch_id=info.parent,
            label=info.label,
            prefix=self._texts[info.branch].force(info.prefix),
        )

    def _trunk(self) -> Detokenizer:
        return Detokenizer(TextReader(self._speller, reversed(self._request.prompt)), self._stops)

    def _token(self, event: TokenEmitted) -> None:
        delta = self._delta(event.branch)
        delta.text += self._texts[event.branch].push(event.sample.token)
        delta.completion_tokens = event.completion_tokens
        if self._options.token_ids:
            delta.token_ids.append(event.sample.token)
        if self._options.logprobs:
            delta.logprobs.append(_logprob(event.sample))

    def _stage_finished(self, event: StageFinished) -> None:
        rest = self._rest(event)
        if rest:
            delta = self._delta(event.branch)
            delta.text += rest
            delta.completion_tokens = event.completion_tokens
        self._counts[event.branch] = event.completion_tokens
        if event.final:
            self.finish = event.reason.value
            self._texts.pop(event.branch, None)
            del self._counts[event.branch]
            finished = pb.BranchFinished(
                branch_id=event.branch,
                finish_reason=_REASONS[event.reason],
                completion_tokens=event.completion_tokens,
            )
            if isinstance(event.stop, Match):
                finished.stop_string = event.stop.string
            elif event.stop is not None:
                finished.stop_token_id = event.stop
            self._response.events.add(branch_finished=finished)

    def _rest(self, event: StageFinished) -> str:
        text = self._texts.get(event.branch)
        if text is None:
            return ""  # a trunk that has only forked
        if isinstance(event.stop, Match):
            kept = len(event.stop.string) if self._options.include_stop else 0
            return text.stop(event.stop.cut, kept)
        return text.finish() if event.final else text.pause()

    def _delta(self, branch: int) -> pb.BranchDelta:
        if branch not in self._deltas:
            self._deltas[branch] = self._response.events.add(delta=pb.BranchDelta(branch_id=branch)).delta
        return self._deltas[branch]

    def _finished(self, event: Finished) -> None:
        usage, timing = event.usage, event.timing
        finished = pb.Finished(
            usage=pb.Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                critical_path_tokens=usage.critical_path_tokens,
                preemptions=usage.preemptions,
            ),
            timing=pb.Timing(
                queue_time=duration(timing.queue),
                time_to_first_token=duration(timing.ttft),
                time_per_output_token=duration(timing.tpot),
                total_time=duration(timing.total),
                tpot_slo_met=timing.tpot_slo_met,
                ttft_slo_met=timing.ttft_slo_met,
            ),
        )
        self._response.events.add(finished=finished)


def _logprob(sample: Sample) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=sample.token,
        logprob=sample.logprob or 0.0,
        top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in sample.top],
    )
