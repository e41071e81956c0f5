"""grpc.health.v1, answered from the engine's own state.

The stock servicer keeps a copy of the state, and one stalled watcher blocks whoever changes it; here there
is no copy. One look is taken for all watchers, however many there are, and none where there are none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import grpc
from grpc_health.v1 import health_pb2

from serve.server.calls import Call
from taper_client.errors import ServiceError

_Status = health_pb2.HealthCheckResponse


class Health:
    """Serving is `is_serving()`, for the server as a whole ("") and each of `services`."""

    LOOK = 0.1  # seconds between two looks for the watchers

    def __init__(self, services: Collection[str], is_serving: Callable[[], bool]) -> None:
        self._services = {"", *services}
        self._is_serving = is_serving
        self._watchers: set[asyncio.Event] = set()
        self._looking: asyncio.Task[None] | None = None
        self._joined = False

    async def check(self, call: Call) -> health_pb2.HealthCheckResponse:
        request = await call.read(health_pb2.HealthCheckRequest)
        if request.service not in self._services:
            error = ServiceError(f"no service {request.service[:100]!r}")
            error.code = grpc.StatusCode.NOT_FOUND
            raise error
        return _Status(status=self._status(request.service))

    async def watch(self, call: Call) -> None:
        """Until one of the two leaves."""
        request = await call.read(health_pb2.HealthCheckRequest)
        told, changed = None, asyncio.Event()
        self._watchers.add(changed)
        self._joined = True
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    await call.write(_Status(status=status).SerializeToString())
                    told = status
                await changed.wait()
        finally:
            self._watchers.discard(changed)
            if not self._watchers and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        before = self._is_serving()
        while True:
            await asyncio.sleep(self.LOOK)
            now = self._is_serving()
            if now != before or self._joined:  # who has joined may have seen another state in between
                before, self._joined = now, False
                self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._is_serving() else _Status.NOT_SERVING
