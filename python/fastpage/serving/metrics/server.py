"""Metrics on a port of their own, beside a gRPC server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastpage.serving.metrics.exposition import Exposition
from fastpage.serving.metrics.grpc_calls import grpc_calls
from fastpage.serving.metrics.recorder import EngineMetrics

if TYPE_CHECKING:
    from fastpage.engine.async_engine import AsyncEngine


class MetricsServer:
    """A lifecycle.Frontend. Raises MissingExtra if prometheus_client is not there."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._metrics = EngineMetrics()
        self.calls = grpc_calls()
        self._exposition = Exposition(self._metrics, self.calls)

    async def start(self) -> str:
        port = self._exposition.start_server(self._host, self._port)
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}/metrics"

    async def set_engine(self, engine: AsyncEngine) -> None:
        engine.add_observer(self._metrics)

    async def drain(self) -> None:
        """The last requests are counted, too."""

    async def stop(self, grace_seconds: float) -> None:
        await asyncio.to_thread(self._exposition.stop_server)
