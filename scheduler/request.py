"""What is being served: a request, its targets, and what ends its tokens.

All of it is frozen: the scheduler's own state about a request lives in `scheduler.live_request`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.sampling import SamplingParams

if TYPE_CHECKING:
    from scheduler.program import Plan, TagProgram


class FinishReason(enum.Enum):
    """Why a branch ended. Failures of a whole request are errors, not finish reasons."""

    EOS = "eos"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT = "context"
    BRANCH_CLOSED = "branch_closed"  # the model closed it with its tag
    FORKED = "forked"  # it ended in its branches: nothing follows their stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """What ends one stage of one branch.

    `stop_ids` are dropped from the output and from the context; text that matched one of `stop_strings`
    stays in the context (a token cannot be cut), and the server cuts it from the text that it shows.
    """

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets in seconds. The TPOT target bounds the gap between two emissions of the request."""

    tpot: float = 0.05
    ttft: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and one program: the unit that has an SLO, a deadline and a priority.

    A higher priority is more urgent; the policy `taper:priority` alone looks at it.
    """

    id: str
    prompt: tuple[int, ...]
    program: Plan | TagProgram
    sampling: SamplingParams = field(default_factory=SamplingParams)
    slo: Slo = field(default_factory=Slo)
    cache_salt: str = ""
    priority: int = 0
