"""The events of an answer, typed, and how they are read from messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from .v1 import inference_service_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request left the queue, and its prompt has been read.

    request_id        the client's own, or the one that the server made
    prompt_tokens     length of the prompt
    cached_tokens     how many of these were found in the prefix cache
    prompt_token_ids  only if they were asked for
    server            which server answers, by the name that it has for itself
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    prompt_token_ids: tuple[int, ...] = ()
    server: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBranch:
    """A branch as a stage begins.

    branch  its id; 0 is the trunk
    parent  the id of the branch that it forked from
    label   its name, from the client or from the model
    prefix  the text that the stage forces into its context
    """

    branch: int
    parent: int
    label: str
    prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage begins, with new branches or with one that goes on.

    stage     its number: stages are counted as they begin
    branches  those that it is decoded in
    """

    stage: int
    branches: tuple[StageBranch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely a token was.

    token    its id
    logprob  natural logarithm of its probability
    top      the best alternatives as (id, log-probability), if they were asked for
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of one branch.

    branch             its id
    text               may be empty while the rest of a character, or of what may be a stop string, is awaited
    token_ids          the new ids, if they were asked for
    logprobs           of the new tokens, if they were asked for
    completion_tokens  tokens of the branch so far
    """

    branch: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthChanged:
    """The scheduler changed how many branches advance in a step.

    width   so many do now
    wanted  so many were ready to
    """

    width: int
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchFinished:
    """A branch ended. Where the first k are joined, it comes when it is certain whether this is one of them.

    branch             its id
    reason             eos, stop, max_tokens, context, branch_closed, forked or outrun
    stop               the stop string, or the id, that ended it
    completion_tokens  tokens of the branch, over all its stages
    """

    branch: int
    reason: str
    stop: str | int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The stage's branches (all, or the first k) have ended, and their parent goes on.

    stage     its number
    branches  their ids, in the order in which they were joined
    """

    stage: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How many tokens there were.

    prompt_tokens         the prompt's
    cached_tokens         of these, found in the prefix cache
    completion_tokens     sampled, all branches together
    critical_path_tokens  the longest chain of sampled tokens: what a reader had to wait for
    preemptions           how often the request lost its KV pages to others and computed them again
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    critical_path_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long it took, in seconds, measured in the server.

    queue         from arrival until it left the queue
    ttft          from arrival to the first token
    tpot          from the first token to the last, divided by the tokens after the first, of all branches
    total         from arrival to the end
    tpot_slo_met  whether `tpot` was within its target
    ttft_slo_met  whether `ttft` was within its target
    """

    queue: float
    ttft: float
    tpot: float
    total: float
    tpot_slo_met: bool
    ttft_slo_met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of an answer that is complete.

    usage   how many tokens there were
    timing  how long it took
    """

    usage: Usage
    timing: Timing


Event = Started | StageStarted | Delta | WidthChanged | BranchFinished | Joined | Finished
"""What `Client.generate` yields: one thing that happened."""


def events_of(response: pb.GenerateResponse) -> Iterator[Event]:
    """The events of one message; kinds that this client does not know are left out."""
    for event in response.events:
        kind = event.WhichOneof("kind")
        if kind is not None:
            yield _READERS[kind](getattr(event, kind))


def _stage_started(stage: pb.StageStarted) -> StageStarted:
    branches = tuple(
        StageBranch(branch=b.branch_id, parent=b.parent_branch_id, label=b.label, prefix=b.prefix)
        for b in stage.branches
    )
    return StageStarted(stage=stage.stage, branches=branches)


def _delta(delta: pb.BranchDelta) -> Delta:
    logprobs = tuple(
        Logprob(
            token=each.token_id,
            logprob=each.logprob,
            top=tuple((top.token_id, top.logprob) for top in each.top),
        )
        for each in delta.logprobs
    )
    return Delta(
        branch=delta.branch_id,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=logprobs,
        completion_tokens=delta.completion_tokens,
    )


def _branch_finished(event: pb.BranchFinished) -> BranchFinished:
    matched = event.WhichOneof("matched_stop")
    return BranchFinished(
        branch=event.branch_id,
        reason=pb.FinishReason.Name(event.finish_reason).removeprefix("FINISH_REASON_").lower(),
        stop=getattr(event, matched) if matched else None,
        completion_tokens=event.completion_tokens,
    )


def _finished(event: pb.Finished) -> Finished:
    usage, timing = event.usage, event.timing
    return Finished(
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            critical_path_tokens=usage.critical_path_tokens,
            preemptions=usage.preemptions,
        ),
        timing=Timing(
            queue=_seconds(timing.queue_time),
            ttft=_seconds(timing.time_to_first_token),
            tpot=_seconds(timing.time_per_output_token),
            total=_seconds(timing.total_time),
            tpot_slo_met=timing.tpot_slo_met,
            ttft_slo_met=timing.ttft_slo_met,
        ),
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


_READERS: dict[str, Any] = {
    "started": lambda e: Started(
        request_id=e.request_id,
        prompt_tokens=e.prompt_tokens,
        cached_tokens=e.cached_tokens,
        prompt_token_ids=tuple(e.prompt_token_ids),
        server=e.server,
    ),
    "stage_started": _stage_started,
    "delta": _delta,
    "width_changed": lambda e: WidthChanged(width=e.width, wanted=e.wanted),
    "branch_finished": _branch_finished,
    "joined": lambda e: Joined(stage=e.stage, branches=tuple(e.branch_ids)),
    "finished": _finished,
}
