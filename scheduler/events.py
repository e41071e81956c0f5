"""What happened to a request, in order. The server turns these into messages; tests read them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.search import Match
from scheduler.step import Sample
from scheduler.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the request left the queue and produced its first token."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class BranchInfo:
    """A branch as its stage begins; `prefix` is what is forced into its context before the first token."""

    branch: int
    parent: int
    label: str
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins; it comes before any token of its branches. Stages are numbered as they begin."""

    request_id: str
    stage: int
    branches: tuple[BranchInfo, ...]


class TokenEmitted(NamedTuple):
    """One token of one branch. `completion_tokens` counts the branch's tokens, this one included.

    A named tuple, as `Sample`: there is one for each row of each step, and it is made thrice as fast.
    """

    request_id: str
    branch: int
    sample: Sample
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class WidthChanged:
    """The number of branches that advance in a step changed; `wanted` were ready."""

    request_id: str
    width: int
    wanted: int


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A branch's stage ended; `final` says whether the branch itself ended with it.

    `stop` is the stop token, or the match of a stop string, that ended it, if one did. The branches of a race
    end twice: not finally, since the others may outrun them; and finally, with the same reason, when they are
    joined. A branch that is outrun ends finally at once.
    """

    request_id: str
    stage: int
    branch: int
    reason: FinishReason
    stop: int | Match | None
    completion_tokens: int
    final: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """The branches of a parallel stage have ended and their parent goes on.

    `branches` are the ids of those that are joined, in join order.
    """

    request_id: str
    stage: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """critical_path_tokens: the longest chain of sampled tokens, i.e. what a serial reader waited for."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    critical_path_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds. tpot is the mean (last token - first token) / (tokens - 1) over the whole request."""

    queue: float
    ttft: float
    tpot: float
    total: float
    tpot_slo_met: bool
    ttft_slo_met: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a request that ran to its end."""

    request_id: str
    usage: Usage
    timing: Timing


Event = Started | StageStarted | TokenEmitted | WidthChanged | StageFinished | Joined | Finished
