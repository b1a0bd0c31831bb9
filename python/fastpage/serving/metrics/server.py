"""Metrics on a port of their own, beside a gRPC server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from fastpage.serving.metrics.calls import CallCounts
from fastpage.serving.metrics.exposition import Expose, Exposition, serve_metrics
from fastpage.serving.metrics.grpc_calls import grpc_calls
from fastpage.serving.metrics.recorder import EngineMetrics

if TYPE_CHECKING:
    from fastpage.engine.async_engine import AsyncEngine


class MetricsFrontend(Protocol):
    """A lifecycle.Frontend."""

    calls: CallCounts

    async def start(self) -> str: ...

    async def set_engine(self, engine: AsyncEngine) -> None: ...

    async def drain(self) -> None: ...

    async def stop(self, grace_seconds: float) -> None: ...


class MetricsServer:
    """A lifecycle.Frontend. Raises MissingExtra if prometheus_client is not there."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._metrics = EngineMetrics()
        self.calls = grpc_calls()
        self._exposition = Exposition(self._metrics, self.calls)

    async def start(self) -> str:
        return serve_metrics(self._exposition, self._host, self._port)

    async def set_engine(self, engine: AsyncEngine) -> None:
        engine.add_observer(self._metrics)

    async def drain(self) -> None:
        """The last requests are counted, too."""

    async def stop(self, grace_seconds: float) -> None:
        await asyncio.to_thread(self._exposition.stop_server)


class MetricsOfFrontEnd:
    """A lifecycle.Frontend without an address: its metrics are shown elsewhere."""

    def __init__(self, expose: Expose) -> None:
        self._metrics = EngineMetrics()
        self.calls = grpc_calls()
        expose(self._metrics, self.calls)

    async def start(self) -> str:
        return ""

    async def set_engine(self, engine: AsyncEngine) -> None:
        engine.add_observer(self._metrics)

    async def drain(self) -> None:
        pass

    async def stop(self, grace_seconds: float) -> None:
        pass
