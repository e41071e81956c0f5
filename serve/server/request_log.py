"""A line of the log for each request that has ended. Refusals of one kind that come in floods share lines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog

from scheduler.events import Finished
from serve.server.calls import Call

log = structlog.get_logger("taper")

_NEVER_A_FLOOD = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")
FLOOD_SECONDS = 1.0  # in which refusals of one client, for one reason, get one line of their own


class RequestLog:
    """Used in one event loop."""

    def __init__(self) -> None:
        self._floods: dict[tuple[str, str, str], int] = {}  # by client, code and reason: those without a line

    def ended(self, call: Call, code: str, reason: str) -> None:
        """A request's call has ended. What is not known of it is left out."""
        if code not in _NEVER_A_FLOOD:
            flood = (call.caller.client, code, reason)
            if flood in self._floods:
                self._floods[flood] += 1
                return
            self._floods[flood] = 0
            asyncio.get_running_loop().call_later(FLOOD_SECONDS, self._over, flood)
        how = {"code": code, **_if_any(reason=reason), **call.facts}
        log.info("request", **_who(call), **how, seconds=call.seconds)

    def flush(self) -> None:
        """Write what waits for the end of its second."""
        for flood in [*self._floods]:
            self._over(flood)

    def _over(self, flood: tuple[str, str, str]) -> None:
        client, code, reason = flood
        if more := self._floods.pop(flood, 0):
            log.info("more requests", client=client, code=code, reason=reason, count=more)


def facts(finished: Finished) -> Mapping[str, object]:
    """Of a request that has come to its end. Times in seconds."""
    usage, timing = finished.usage, finished.timing
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "preemptions": usage.preemptions,
        "queue_s": round(timing.queue, 6),
        "ttft_s": round(timing.ttft, 6),
        "tpot_s": round(timing.tpot, 6),
        "ttft_slo_met": timing.ttft_slo_met,
        "tpot_slo_met": timing.tpot_slo_met,
    }


def _who(call: Call) -> dict[str, Any]:
    return {"request_id": call.id, **_if_any(tenant=call.caller.tenant), "peer": call.caller.connection}


def _if_any(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
