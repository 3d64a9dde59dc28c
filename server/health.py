"""`grpc.health.v1.Health` for this server: SERVING while it is ready, NOT_SERVING before that and once it stops.

The package's own servicer keeps a stop waiting for its watchers, and may keep it waiting for ever for one that does
not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from thoraxrt.engine.errors import ServerError

__all__ = ["Health"]

if TYPE_CHECKING:  # generic in the stubs only
    _Context = grpc.aio.ServicerContext[Any, Any]

_LOOK_S: Final = 0.5
"""How often a watcher's status is looked at."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """The health of the named services and, under the empty name, of the server; all are `ready` at once."""

    def __init__(self, services: Collection[str], ready: Callable[[], bool]) -> None:
        self._services = {health.OVERALL_HEALTH, *services}
        self._ready = ready
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """From now on NOT_SERVING; those who watch are told so, and their calls end."""
        self._stopping.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """See grpc.health.v1."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        """See grpc.health.v1."""
        told = None
        while True:
            stopping, status = self._stopping.is_set(), self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if stopping:
                raise ServerError("the server is stopping; watch another one")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_S)

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return (
            health_pb2.HealthCheckResponse.NOT_SERVING
            if self._stopping.is_set() or not self._ready()
            else health_pb2.HealthCheckResponse.SERVING
        )
