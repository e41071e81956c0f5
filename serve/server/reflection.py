"""grpc.reflection.v1alpha, whose calls are bounded like all others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

from serve.server.calls import Call


class Reflection:
    """Describes `services`, and itself."""

    def __init__(self, services: Collection[str]) -> None:
        self._stock = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME))

    async def info(self, call: Call) -> None:
        asked = call.each(reflection_pb2.ServerReflectionRequest)
        answers: Any = self._stock.ServerReflectionInfo(asked, None)
        async for answer in answers:
            await call.write(answer.SerializeToString())
