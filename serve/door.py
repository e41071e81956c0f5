"""The engine's door: what the server and the engine know of each other, and all that they do.

Requests and cancels go in. What each step brought comes out: the events of every request to its sink, and one
`StepRecord` for whoever watches the steps. Nothing that passes here holds a device or a lock, so that the
engine may live in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from scheduler.events import Event, Finished
from scheduler.gate import Rejection
from scheduler.predictor import PredictionAccuracy, StepLoad
from scheduler.request import Request
from scheduler.scheduler import SchedulerLoad

State = Literal["STARTING", "SERVING", "DRAINING", "STOPPED", "FAILED"]
Reason = Literal[Rejection, "DRAINING", "STARTING"]


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine does not take the request, or has waited in vain to start it; nothing else is heard of it.

    `detail` is for the client, and so is `retry_after`: seconds, where it is known when it would be taken.
    """

    reason: Reason
    detail: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine gave the request up, and says why to the log; no more events follow."""

    error: str


News = Event | Refused | Failed
Sink = Callable[[Sequence[News]], None]
"""Gets what is new of one request: at least one piece, in order, and nothing after one that `is_last`."""


def is_last(news: News) -> bool:
    """Whether nothing follows it."""
    return isinstance(news, Finished | Refused | Failed)


class Programs(NamedTuple):
    """Programs that the engine's process has got: compiled, or cached, found in the folder that keeps them.

    late_...  since it serves, when each of them holds up every request; the others while it started
    """

    compiled: int = 0
    cached: int = 0
    late_compiled: int = 0
    late_cached: int = 0


NO_PROGRAMS = Programs()


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is, and how well it has lately predicted its steps, `steps` so far.

    unloaded_step  seconds of a step of one row, as it is predicted now
    start_gap      seconds between two starts while requests wait
    programs       that it has got so far
    """

    scheduler: SchedulerLoad
    accuracy: PredictionAccuracy
    output_tokens_per_second: float
    steps: int
    unloaded_step: float = 0.0
    start_gap: float = 0.0
    programs: Programs = NO_PROGRAMS

    @property
    def kv_used_ratio(self) -> float:
        """Share of the KV pages that running requests hold: 0 to 1."""
        capacity = self.scheduler.kv_capacity_tokens
        return self.scheduler.kv_used_tokens / capacity if capacity else 0.0


class StepRecord(NamedTuple):
    """A finished step in figures: seconds, and moments by the engine's monotonic clock.

    requests, branches    that it should give a token
    deferred              branches that could have advanced and did not
    predicted, baseline   seconds, by the predictor as it was when the step was planned
    budget                seconds that it was allowed; None where nothing limited it
    seconds               from the end of the step before it; from `launched` if it was planned after that
    planned               its plan was made
    launching, launched   the launch was called, and returned
    looked                the engine came to wait for its result
    ended                 the result was seen, and so the step's end
    published             its events had been handed out
    idle                  of `seconds`: the device had nothing to do, as the step was not launched yet
    ready                 whether the result was there already when the engine looked
    paused                of `seconds`: the engine could have run, and the machine did not run it
    widths                of each request that it should give a token: how many of its branches advanced
    """

    ended: float
    bucket: int
    load: StepLoad
    requests: int
    branches: int
    deferred: int
    predicted: float
    baseline: float
    budget: float | None
    seconds: float
    widths: tuple[int, ...] = ()
    planned: float = 0.0
    launching: float = 0.0
    launched: float = 0.0
    looked: float = 0.0
    published: float = 0.0
    idle: float = 0.0
    ready: bool = False
    paused: float = 0.0


Watcher = Callable[[StepRecord], None]
"""Is told of every finished step, from the engine's thread."""


class Engine(Protocol):
    """Serves requests; its methods may be called from any thread.

    state    SERVING until `stop` or a failure
    failure  what it failed of, in a line for the operator; empty before
    policy   the admission policy of extra branches
    """

    @property
    def state(self) -> State: ...
    @property
    def failure(self) -> str: ...
    @property
    def policy(self) -> str: ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; `sink` gets its events, at most once a step, from a thread of the engine's.

        So it learns, at once, of a refusal, and of a program that cannot run: as `Failed`. A request that
        would rather be refused than late may be refused while it waits, too.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request, if it is known: its pages are free before the next step is planned, and its id at
        once. Its sink hears no more."""
        ...

    def set_policy(self, policy: str) -> None:
        """Switch the admission policy from the next step on. Raises ValueError."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def stop(self, *, drain: bool, timeout: float) -> None:
        """Take no more requests; with `drain`, finish those that run, for up to `timeout` seconds.

        The sinks of those that are left get a `Failed`.
        """
        ...
