"""grpc.health.v1, answered from the engine's own state.

The stock servicer keeps a copy of the state, and one stalled watcher blocks whoever changes it; here there
is no copy, and every watcher looks for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Serving is `is_serving()`, for the server as a whole ("") and each of `services`."""

    LOOK = 0.1  # seconds between two looks of a watcher

    def __init__(self, services: Collection[str], is_serving: Callable[[], bool]) -> None:
        self._services = {"", *services}
        self._is_serving = is_serving

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return _Status(status=self._status(request.service))

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(_Status(status=status))
                told = status
            await asyncio.sleep(self.LOOK)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._is_serving() else _Status.NOT_SERVING
