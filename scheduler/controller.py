"""The controller: what a step takes beyond what it must, and when the prompts are read.

    decoding, reading = turns(running)         who could advance
    add_baseline, add_floor                    what is forced: every policy has the same
    budget                                     the seconds that the step may take (scheduler.slack)
    read_prompts                               prompts, up to the pace of their targets
    admitted                                   extra branches, by the policy, within the budget
    read_prompts                               prompts again, in what is left

Each of these is a method of its own, which an experiment may override. The controller holds no pages and no
slots: it adds to a `StepDraft`, which does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from scheduler.branch import Branch
from scheduler.draft import StepDraft
from scheduler.flight import Flight
from scheduler.live_request import LiveRequest
from scheduler.policy import AdmissionPolicy, Baseline, Extra, policy
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.slack import prompt_deadline, prompt_pace, slack
from scheduler.step import Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """What a step may take. The same numbers hold for every policy.

    rho           share of the slack that extra work may spend; None: all of it, less a margin for what steps
                  have lately taken longer than predicted
    fill          let ready branches use the padding of the baseline's bucket
    repay         tokens within which a request that is behind its pace catches up; 0: it never does
    max_chunk     prompt tokens of one request in a step
    prompt_floor  prompt tokens that a step reads whatever the slack
    """

    rho: float | None = 1.0
    fill: bool = True
    repay: float = 8.0
    max_chunk: int = 512
    prompt_floor: int = 32


class Turn(NamedTuple):
    """A running request and its branches that could advance, the least recently advanced first."""

    live: LiveRequest
    ready: Sequence[Branch]

    @property
    def branch(self) -> Branch:
        """The branch whose turn it is."""
        return self.ready[0]


Candidate = tuple[LiveRequest, Branch]


class Controller:
    """Fills the drafts of steps, and learns from what they took. Has no clock."""

    START_MARGIN = 0.95  # share of the tightest TPOT target that a step may take with one request more
    LATE_TURN = 8  # one prompt floor (and one start) in so many goes to those that missed the TTFT target
    FILL_SHARE = 0.01  # share of the TPOT target by which filling the bucket may lengthen a step

    def __init__(
        self,
        latency: StepLatencyModel,
        policy_name: str = "taper",
        config: ControllerConfig = ControllerConfig(),
    ) -> None:
        """Raises ValueError for a policy that there is none of."""
        self.latency = latency
        self.policy: AdmissionPolicy = policy(policy_name)
        self.config = config
        self._forced = StepLoad(0)  # what decoding requests forced the last step to hold...
        self._forcing: Set[LiveRequest] = frozenset()  # ...and which they were

    def set_policy(self, name: str) -> None:
        """Switch the admission policy from the next step on. Raises ValueError."""
        self.policy = policy(name)

    @property
    def floor(self) -> int:
        """Prompt tokens that a step reads whatever the slack: at most half of the largest bucket."""
        return max(1, min(self.config.prompt_floor, self.latency.buckets.largest // 2))

    # --- a step ----------------------------------------------------------------------------------------

    def fill(self, draft: StepDraft, running: Sequence[LiveRequest], flights: Sequence[Flight]) -> list[Turn]:
        """Add to an empty draft what its step should take; it stays empty if nothing can advance.

        Returns the requests that could have advanced. `running`: oldest first; `flights`: the steps that are
        under way.
        """
        decoding, reading = self.turns(running)
        self.add_baseline(draft, decoding, reserved=bool(reading))
        self._forced, self._forcing = draft.load, {*draft.advanced}
        self.add_floor(draft, reading, self.longest_step(turn.live for turn in decoding) if reading else 0.0)
        if draft.rows:
            draft.baseline = draft.seconds()
            extras, candidates = self.extras(draft, decoding)
            draft.budget = self.budget(draft, decoding, reading, extras, flights)
            self.read_prompts(draft, reading, at_pace=True)
            for extra in self.admitted(draft, extras):
                if draft.room >= extra.rows:
                    draft.add(*candidates[extra.candidate], extra.rows)
            self.read_prompts(draft, reading, at_pace=False)
        return [*decoding, *reading]

    def learn(self, forecast: Forecast, seconds: float) -> None:
        """A step has taken `seconds`."""
        self.latency.observe(forecast.load, seconds)

    def may_start(self, live: LiveRequest, running: Sequence[LiveRequest]) -> bool:
        """Whether a step with `live` as well stays within everybody's TPOT target, of those that can be kept.

        The step is the last one's baseline, a row for each request that was not in it, since its prompt was
        not read yet, and the prompt tokens that it would read in any case.
        """
        load = self._forced
        for other in (*running, live):
            if other not in self._forcing:
                load = load.plus(StepLoad(1, private_kv=len(other.request.prompt), items=1))
        longest = self.longest_step((*running, live))
        reading = self.floor_rows(load, longest)
        return self._seconds_with(load, reading) <= longest

    def tightest_target(self, requests: Iterable[LiveRequest]) -> float:
        """The tightest TPOT target that can be kept; infinite if there is none.

        One that the request could not have even if it ran alone, over its prompt, is kept by letting nobody
        in as little as by letting everybody in; and one that does not bind is nobody's business.
        """
        one_row, position = self.latency.predict(StepLoad(1, items=1)), self.latency.row_line(0)[1]
        targets = (
            live.request.slo.tpot
            for live in requests
            if live.request.slo.binding
            and live.request.slo.tpot >= one_row + position * len(live.request.prompt)
        )
        return min(targets, default=math.inf)

    def longest_step(self, requests: Iterable[LiveRequest]) -> float:
        """Seconds that a step of all of them may take, with what each must do in it.

        A margin under the tightest target; but where that leaves no room over a step of a single row, half of
        the room that there is: a server whose steps lie near a target still serves what costs it nothing.
        """
        tightest = self.tightest_target(requests)
        return max(self.START_MARGIN * tightest, (tightest + self.latency.predict(StepLoad(1))) / 2)

    def floor_rows(self, load: StepLoad, longest: float) -> int:
        """Prompt tokens to read whatever the slack, beside what decoding requests force on a step.

        `floor` of them, or those with which the step stays within `longest` seconds; at the least, what the
        bucket holds that one of them takes. Where the step is too long without them, holding prompts back
        saves nobody.
        """
        buckets, floor = self.latency.buckets, self.floor
        if load.rows >= buckets.largest or self._seconds_with(load, 0) > longest:
            return floor
        rows = 0
        for bucket in buckets:
            room = bucket - load.rows
            if room > 0 and (not rows or self._seconds_with(load, min(room, floor)) <= longest):
                rows = min(room, floor)
            if rows == floor:
                break
        return rows

    def _seconds_with(self, load: StepLoad, prompt: int) -> float:
        """Predicted seconds of a step with `prompt` tokens of a prompt, of as many rows as there can be."""
        load = load.plus(StepLoad(prompt, private_kv=prompt))
        return self.latency.predict(load._replace(rows=min(load.rows, self.latency.buckets.largest)))

    # --- what is forced --------------------------------------------------------------------------------

    def turns(self, running: Sequence[LiveRequest]) -> tuple[list[Turn], list[Turn]]:
        """The requests that can advance: those that decode, oldest first, and those that read.

        A request reads while each of its branches has more to compute than a decode step should carry: a
        prompt, a joined text, a replay. It is paced, while a decoding request has a deadline. The prompt that
        is due first comes first.
        """
        decoding: list[Turn] = []
        reading: list[Turn] = []
        floor = self.floor
        for live in running:
            ready = live.runnable()
            if not ready:
                continue
            decodes = live.prompt_read and (
                ready[0].backlog <= floor or any(branch.backlog <= floor for branch in ready)
            )
            (decoding if decodes else reading).append(Turn(live, ready))
        reading.sort(key=lambda turn: turn.live.pace.reading_deadline)
        return decoding, reading

    def add_baseline(self, draft: StepDraft, decoding: Sequence[Turn], *, reserved: bool) -> None:
        """Every decoding request advances one branch; oldest first, since the oldest may preempt the others.

        There is a row for each of them, and, if `reserved`, one for a request that reads.
        """
        floor, waiting = self.floor, len(decoding) + reserved
        for turn in decoding:
            waiting -= 1
            if turn.live.resident:  # no older request has preempted it meanwhile
                draft.add(turn.live, turn.branch, min(floor, draft.room - waiting), must=True)

    def add_floor(self, draft: StepDraft, reading: Sequence[Turn], longest: float) -> None:
        """Prompts never starve: the one due first reads a little in every step (see `floor_rows`).

        Those that have missed their target come last, but for one step in LATE_TURN.
        """
        rows = self.floor_rows(draft.load, longest)
        if draft.step_id % self.LATE_TURN:
            reading = sorted(reading, key=lambda turn: turn.live.pace.reading_deadline <= draft.start)
        for turn in reading:
            if turn.live.resident and draft.add(turn.live, turn.branch, rows, must=True):
                return

    # --- what the step may take ------------------------------------------------------------------------

    def budget(
        self,
        draft: StepDraft,
        decoding: Sequence[Turn],
        reading: Sequence[Turn],
        extras: Sequence[Extra],
        flights: Sequence[Flight],
    ) -> float:
        """Seconds that the step may take (see scheduler.slack). Without decoding requests nobody is hurt."""
        protected = [
            turn.live for turn in decoding if turn.live in draft.advanced and turn.live.request.slo.binding
        ]
        if not protected:
            return math.inf
        rho = self.config.rho
        deadlines = self.deadlines(protected, flights)
        if any(deadline - draft.start >= draft.baseline for deadline in deadlines):
            deadlines += self.prompt_deadlines(draft, reading)
        margin = self.latency.accuracy.margin if rho is None else 0.0
        spare = slack(deadlines, draft.start, draft.baseline, margin)
        budget = draft.baseline + (1.0 if rho is None else rho) * spare
        tightest = self.tightest_target(protected)
        most = draft.baseline + self.FILL_SHARE * (tightest if math.isfinite(tightest) else 0.0)
        if self.config.fill and budget < most:
            budget = max(budget, min(self.filled(draft, extras), most))
        return budget

    def deadlines(self, decoding: Sequence[LiveRequest], flights: Sequence[Flight]) -> list[float]:
        """When the next token of each is due; what is in flight is expected when its step should end."""
        expected = {live: flight.end for flight in flights for live in flight.sampling}
        return [self.deadline(live, expected.get(live)) for live in decoding]

    def deadline(self, live: LiveRequest, emission: float | None) -> float:
        """When the token after the last one, or after the one expected at `emission`, is due."""
        return live.pace.next_token(self.config.repay, emission)

    def prompt_deadlines(self, draft: StepDraft, reading: Sequence[Turn]) -> list[float]:
        """When the next chunk of each prompt is due."""
        due = [
            prompt_deadline(
                turn.live.pace.reading_deadline,
                draft.start,
                max(1, draft.left(turn.branch)),
                self.config.max_chunk,
            )
            for turn in reading
            if turn.live.resident
        ]
        return [deadline for deadline in due if deadline is not None]

    def filled(self, draft: StepDraft, extras: Sequence[Extra]) -> float:
        """Predicted seconds with ready branches in the padding of the baseline's own bucket."""
        room = draft.bucket - draft.rows
        if room == 0:
            return draft.baseline
        seconds = 0.0
        for extra in sorted(extras, key=attrgetter("seconds")):
            if extra.rows > room:
                break
            room -= extra.rows
            seconds += extra.seconds
        return draft.baseline + seconds

    # --- what the step takes beyond --------------------------------------------------------------------

    def extras(self, draft: StepDraft, decoding: Sequence[Turn]) -> tuple[list[Extra], list[Candidate]]:
        """Ready branches beyond the baseline, the oldest request's first, least recently advanced first.

        Where several of them would read what the step does not read yet, each is priced as if it came alone.
        """
        extras: list[Extra] = []
        candidates: list[Candidate] = []
        floor = self.floor
        for group, (live, ready) in enumerate(decoding):
            if len(ready) == 1 or live not in draft.advanced:
                continue
            others, priority = ready[1:], live.request.priority
            for branch, (rows, seconds) in zip(others, draft.prices(others), strict=True):
                if rows <= floor:
                    extras.append(Extra(len(extras), group, rows, seconds, priority))
                    candidates.append((live, branch))
        return extras, candidates

    def admitted(self, draft: StepDraft, extras: Sequence[Extra]) -> Sequence[Extra]:
        """Those of the extras that the policy lets join the step."""
        step = Baseline(draft.rows, self.latency.reading_seconds(draft.load), draft.budget)
        return self.policy.admit(extras, step, self.latency)

    def read_prompts(self, draft: StepDraft, reading: Sequence[Turn], *, at_pace: bool) -> None:
        """Read prompts within the budget: up to the pace of their TTFT target, or all that fits."""
        for turn in reading:
            left = draft.left(turn.branch)
            if not left or not turn.live.resident:
                continue
            wanted = self.config.max_chunk
            if at_pace:
                seconds = draft.budget if math.isfinite(draft.budget) else draft.seconds()
                due = prompt_pace(turn.live.pace.reading_deadline, draft.start, left, seconds)
                wanted = min(wanted, due)
            rows = draft.affordable(turn.branch, min(wanted - draft.rows_of(turn.live), left))
            if rows:
                draft.add(turn.live, turn.branch, rows)
