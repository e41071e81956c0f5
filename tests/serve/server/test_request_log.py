"""A line for each request; of refusals that come in floods, their number."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from structlog.testing import capture_logs

from serve.server import request_log
from serve.server.callers import Caller
from serve.server.calls import Call
from serve.server.request_log import RequestLog


class Context:
    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


def call(tenant: str | None = None) -> Call:
    made = Call(Context(), 0)  # type: ignore[arg-type]
    made.caller = Caller("ipv4:127.0.0.1:1", tenant)
    return made


def test_no_request_is_lost_in_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "FLOOD_SECONDS", 0.02)
    said = Counter[tuple[str, str]]()

    async def use() -> None:
        log = RequestLog()
        for number in range(300):
            tenant = f"t{number % 2}"
            code, reason = [("UNAUTHENTICATED", "NO_TOKEN"), ("OK", ""), ("CANCELLED", "ABORTED")][number % 3]
            log.ended(call(tenant), code, reason)
            said[code, tenant] += 1
            if number % 100 == 99:
                await asyncio.sleep(0.05)
        log.ended(call("t0"), "UNAUTHENTICATED", "NO_TOKEN")
        log.ended(call("t0"), "UNAUTHENTICATED", "NO_TOKEN")
        said["UNAUTHENTICATED", "t0"] += 2
        log.flush()
        await asyncio.sleep(0.05)

    with capture_logs() as lines:
        asyncio.run(use())
    counted = Counter[tuple[str, str]]()
    for line in lines:
        counted[line["code"], line.get("tenant") or line["client"]] += line.get("count", 1)
    assert counted == said
    assert len(lines) < 300 * 2 / 3 + 20, "refusals share lines"
