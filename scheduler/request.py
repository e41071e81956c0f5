"""What is being served: a request, with its prompt, its program and its targets.

All of it is frozen: the scheduler's own state about a request lives in `scheduler.live_request`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.program import Plan, TagProgram
from scheduler.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets in seconds. The TPOT target bounds the gap between two emissions of the request.

    binding  whether branches are held back and others kept waiting for the TPOT target; if not, it is only
             measured by it
    reject   refuse the request if its TTFT target would be missed, instead of letting it wait
    """

    tpot: float = 0.05
    ttft: float = 5.0
    binding: bool = True
    reject: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and one program: the unit that has an SLO, a deadline and a priority.

    A higher priority is more urgent; the policy `taper:priority` alone looks at it. Requests of one `client`
    take turns with those of others to start.
    """

    id: str
    prompt: tuple[int, ...]
    program: Plan | TagProgram
    sampling: SamplingParams = field(default_factory=SamplingParams)
    slo: Slo = field(default_factory=Slo)
    cache_salt: str = ""
    priority: int = 0
    client: str = ""
