"""A grpc.aio server around some services: port, health, reflection, limits, end."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Protocol

# grpc's core writes its own lines about a port in use, and the like, beside the errors raised here.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fastpage.engine.async_engine import AsyncEngine
from fastpage.errors import FastpageError
from fastpage.serving.grpc.decoding import RefuseUndecodable

# A million tokens or so. Tokenizing takes some 150 bytes of memory for each byte of text, and
# several requests may be at it.
_MAX_REQUEST_BYTES = 4 << 20

_OPTIONS = (
    # Two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # Clients may ping as often as every 10 seconds, calls in progress or not.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Find clients that are gone without a word.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class GrpcService(Protocol):
    """A service of a GrpcServer, or several that belong together."""

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds its handlers, which answer UNAVAILABLE until set_engine(). Returns the full names
        of its services, for health and reflection."""
        ...

    def set_engine(self, engine: AsyncEngine) -> None:
        """The model is loaded."""
        ...

    def drain(self) -> None:
        """The server is about to stop. The engine refuses new requests; a stream that would not
        end with the requests in progress is to be ended now."""
        ...


class GrpcServer:
    """Listens as soon as it is started; healthy (SERVING) from set_engine() to drain()."""

    def __init__(self, services: Sequence[GrpcService]) -> None:
        self._server = grpc.aio.server(interceptors=[RefuseUndecodable()], options=_OPTIONS)
        self._services = services
        self._health = health.aio.HealthServicer()
        self._engine: AsyncEngine | None = None
        self._names = [name for service in services for name in service.register(self._server)]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Returns the port, which is the system's choice if 0 was asked for. Raises FastpageError
        if it cannot be had."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise FastpageError(f"cannot listen on {address}: {_why_not(host, port)}")
        await self._server.start()
        return bound

    async def set_engine(self, engine: AsyncEngine) -> None:
        self._engine = engine
        for service in self._services:
            service.set_engine(engine)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_seconds: float = 1.0) -> None:
        """Calls in progress end with UNAVAILABLE."""
        await self._health.enter_graceful_shutdown()
        for service in self._services:
            service.drain()
        if self._engine is not None:
            await self._engine.shutdown()
        await self._server.stop(grace_seconds)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)


def _why_not(host: str, port: int) -> str:
    """What the system says when asked for the port directly; grpc does not pass it on."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "the address is not usable"
