"""A request from its submission to its end, told in messages as some service has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler.events import Event, Finished
from scheduler.request import Request
from serve.server.calls import Call
from serve.server.request_log import facts
from serve.server.service import Service


class Writer(Protocol):
    """Puts a request's events into messages.

    branches  how many it has had, beside the trunk
    finish    why the last of its branches, or its trunk, ended
    """

    branches: int
    finish: str

    def messages(self, events: Sequence[Event]) -> Iterable[bytes]:
        """What tells of `events`, at least one."""
        ...


async def answer(
    service: Service, call: Call, request: Request, writer: Writer, *, interval: float = 0.0
) -> None:
    """Until the request has ended, or its call. `interval`: the least seconds between two messages.

    Raises ServiceError where the request does not run to its end.
    """
    stream = service.open(request, call.caller, interval=interval)
    finished = False
    try:
        with service.status.following(request.id, call.caller.tenant) as progress:
            while not finished:
                events = await stream.take()
                progress.see(events)
                last = events[-1]
                if isinstance(last, Finished):
                    finished = True
                    service.metrics.observe_finished(last, call.caller.tenant or "")
                    call.facts = facts(last)
                for message in writer.messages(events):
                    await call.write(message)
        call.facts = {"branches": writer.branches, "finish": writer.finish, **call.facts}
    finally:
        service.close(request.id, call.caller, finished=finished)
