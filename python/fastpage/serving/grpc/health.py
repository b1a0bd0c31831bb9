"""grpc.health.v1, as the engine is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastpage.engine.async_engine import AsyncEngine
from fastpage.engine.core import EngineDied
from fastpage.engine.observer import EngineObserver

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer, EngineObserver):
    """Of all services at once. Not grpc's own servicer: there a client that does not read what its
    Watch has to say keeps the status from changing, for everybody and for good."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._status = _Response.NOT_SERVING
        self._changed = asyncio.Event()  # from this status to another one
        self._draining = False
        self._watches: set[asyncio.Task[None]] = set()
        self._ending = False

    # ---- the server

    def drain(self) -> None:
        """NOT_SERVING for good."""
        self._draining = True
        self._set(_Response.NOT_SERVING)

    def end_watches(self) -> None:
        """A stopping server would wait for them as long as it may."""
        self._ending = True
        for task in self._watches:
            task.cancel()

    # ---- EngineObserver

    def engine_started(self, engine: AsyncEngine) -> None:
        self._set(_Response.SERVING)

    def engine_died(self, error: EngineDied) -> None:
        self._set(_Response.NOT_SERVING)

    def _set(self, status: int) -> None:
        if self._draining:
            status = _Response.NOT_SERVING
        if status != self._status:
            self._status = status
            self._changed.set()
            self._changed = asyncio.Event()

    # ---- calls

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service has that name")
        return _Response(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._ending:
            self._watches.add(task)
            try:
                await self._tell_changes(request.service, context)
            except asyncio.CancelledError:
                if not self._ending:
                    raise
            finally:
                self._watches.discard(task)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    async def _tell_changes(self, service: str, context: grpc.aio.ServicerContext) -> None:
        if service not in self._services:
            await context.write(_Response(status=_Response.SERVICE_UNKNOWN))
            await asyncio.Event().wait()  # it never will be
        told = None
        while True:
            # Both of one moment: what changes while the client is told comes next.
            status, changed = self._status, self._changed
            if status != told:
                await context.write(_Response(status=status))
                told = status
            await changed.wait()
