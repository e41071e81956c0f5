"""Drafts of steps on a small pool, without a scheduler."""

from __future__ import annotations

import itertools

from scheduler.draft import StepDraft
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan, Stage
from scheduler.request import Request
from scheduler.step import Sample
from tests.scheduler.alphabet import Alphabet


class Bench:
    """A pool of 20 pages of 4, and drafts of steps on it."""

    def __init__(self, num_pages: int = 20, latency: StepLatencyModel | None = None) -> None:
        self.pool = PagePool(num_pages, 4)
        self.latency = latency or StepLatencyModel({4: 0.010, 16: 0.020}, 1e-4)
        self.slots = [*range(64)]
        self.steps = itertools.count()
        self.asked: list[int] = []

    def live(self, *stages: Stage, prompt: int = 6, name: str = "r") -> LiveRequest:
        live = LiveRequest(
            Request(id=name, prompt=tuple(range(prompt)), program=Plan(stages=stages)),
            now=0.0,
            pool=self.pool,
            codec=Alphabet(),
            free_slots=self.slots,
            max_context=100,
        )
        live.resume(0.0)
        return live

    def draft(self) -> StepDraft:
        def refuse(draft: StepDraft, live: LiveRequest, pages: int) -> bool:
            self.asked.append(pages)
            return False

        return StepDraft(
            next(self.steps),
            0.0,
            self.pool,
            self.latency,
            make_room=refuse,
            take_slot=self.slots.pop,
        )

    def accept(self, live: LiveRequest, draft: StepDraft, token: int = 9) -> None:
        for entry in draft.entries:
            if entry.samples and entry.request_id == live.request.id:
                live.accept(entry, Sample(token), 1.0)
