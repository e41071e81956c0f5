"""The page that shows the tapering as it happens, and what it asks for: `/` and `/status.json`.

The page is one file without outside assets, and holds nothing of the server: a browser asks for the state
twice a second, with the operator's token where there are tokens.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scheduler.events import Event, StageStarted, Started, TokenEmitted, WidthChanged
from serve.door import StepRecord
from serve.served import Served
from serve.server.scraping import Asked, Page

STEPS = 150  # that are shown
REQUESTS = 100  # that are shown, those that began first
_HTML = Path(__file__).with_name("status.html")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Progress:
    """A request that is being answered: how far it has come, as its events say.

    width     its branches that advance in a step; 0 while it waits to start
    wanted    those that could
    branches  that it has had, beside the trunk
    """

    __slots__ = ("began", "branches", "name", "tenant", "tokens", "wanted", "width")

    def __init__(self, name: str, tenant: str | None) -> None:
        self.name, self.tenant, self.began = name, tenant or "", time.monotonic()
        self.tokens, self.branches = 0, 0
        self.width, self.wanted = 0, 0

    def see(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TokenEmitted):
                self.tokens += 1
            elif isinstance(event, WidthChanged):
                self.width, self.wanted = event.width, event.wanted
            elif isinstance(event, Started):
                self.width = self.wanted = 1
            elif isinstance(event, StageStarted):
                self.branches = max(self.branches, *(info.branch for info in event.branches))

    def told(self, moment: float) -> dict[str, Any]:
        """In figures, at a moment of the monotonic clock."""
        return {
            "id": self.name,
            "tenant": self.tenant,
            "seconds": round(moment - self.began, 1),
            "tokens": self.tokens,
            "branches": self.branches,
            "width": self.width,
            "wanted": self.wanted,
        }


class Status:
    """The last steps, and the requests that are being answered.

    Steps are seen by the engine's thread, requests by the event loop's, and the page asks from others: each
    of these reads a copy that takes no lock.
    """

    def __init__(self) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=STEPS)
        self._seen = 0
        self._requests: dict[Progress, None] = {}  # in the order in which they began

    def observe_step(self, step: StepRecord) -> None:
        self._steps.append(step)
        self._seen += 1

    @contextmanager
    def following(self, name: str, tenant: str | None) -> Iterator[Progress]:
        """Show a request while it is being answered."""
        progress = Progress(name, tenant)
        self._requests[progress] = None
        try:
            yield progress
        finally:
            del self._requests[progress]

    def told(self, state: str, served: Served | None) -> dict[str, Any]:
        """What the page shows. Times of steps in milliseconds."""
        moment = time.monotonic()
        requests = [each.told(moment) for each in [*self._requests][:REQUESTS]]
        found = {"state": state, "steps": self._told_steps(), "requests": requests}
        return found if served is None else {**found, **_load(served)}

    def _told_steps(self) -> dict[str, Any]:
        """Column by column, the oldest first."""
        steps = self._steps.copy()
        return {
            "last": self._seen,
            "measured": [_ms(step.seconds) for step in steps],
            "predicted": [_ms(step.predicted) for step in steps],
            "baseline": [_ms(step.baseline) for step in steps],
            "budget": [None if step.budget is None else _ms(step.budget) for step in steps],
            "branches": [step.branches for step in steps],
            "deferred": [step.deferred for step in steps],
        }


def page(_: Asked) -> Page:
    """What a browser shows."""
    headers = (("Content-Security-Policy", _POLICY), ("X-Content-Type-Options", "nosniff"))
    return Page("text/html; charset=utf-8", _HTML.read_bytes(), headers)


def state_page(told: Mapping[str, Any]) -> Page:
    """What the page asks for."""
    return Page("application/json", json.dumps(told).encode(), (("Cache-Control", "no-store"),))


def _load(served: Served) -> dict[str, Any]:
    """What is served, and how busy it is."""
    load, platform = served.engine.load(), served.platform
    now = load.scheduler
    return {
        "model": served.model.name,
        "policy": served.engine.policy,
        "device": platform.device if platform.devices == 1 else f"{platform.devices} x {platform.device}",
        "running": now.running_requests,
        "waiting": now.queued_requests,
        "kv_used": now.kv_used_tokens,
        "kv_capacity": now.kv_capacity_tokens,
        "tokens_per_second": round(load.output_tokens_per_second, 1),
        "target": _ms(served.model.default_slo.tpot),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
