"""What is being served: a request, its targets, and how its tokens are chosen and ended.

All of it is frozen: the scheduler's own state about a request lives in `scheduler.live_request`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
class SamplingParams:
    """How the next token is drawn; the defaults are greedy. Ranges are checked where requests enter."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


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
