"""A grpc.aio server around some services: port, health, reflection, limits, end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

# grpc's core writes its own lines about a port in use, and the like, beside the errors raised here.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fastpage.engine.async_engine import AsyncEngine
from fastpage.serving.grpc.guard import CallGuard
from fastpage.serving.grpc.health import Health
from fastpage.serving.grpc.listening import Address, listen
from fastpage.serving.grpc.tokens import RequireToken
from fastpage.serving.security import BearerTokens, TlsFiles

# A million tokens or so. Tokenizing takes some 150 bytes of memory for each byte of text, and
# several requests may be at it.
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20

_OPTIONS = (
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
        of its services, for health and reflection. Called once, on the event loop."""
        ...

    def set_engine(self, engine: AsyncEngine) -> None:
        """The model is loaded."""
        ...

    def drain(self) -> None:
        """The server is about to stop. The engine refuses new requests; a stream that would not
        end with the requests in progress is to be ended now."""
        ...


@dataclass(frozen=True)
class GrpcServerConfig:
    address: Address = field(default_factory=Address)
    tls: TlsFiles | None = None
    tokens: BearerTokens | None = None
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES  # of a request
    channelz: bool = False
    # Other processes of this server listen there, too. Two servers on one port would share its
    # connections silently.
    reuse_port: bool = False
    interceptors: Sequence[grpc.aio.ServerInterceptor] = ()  # of calls with a token


class GrpcServer:
    """A lifecycle.Frontend. Its health is SERVING while the engine is ready, from set_engine() to
    drain()."""

    def __init__(
        self, services: Sequence[GrpcService], config: GrpcServerConfig | None = None
    ) -> None:
        self._services = services
        self._config = config or GrpcServerConfig()
        self._health: Health
        self._server: grpc.aio.Server

    async def start(self) -> str:
        config = self._config
        self._server = self._make_server()
        names = [name for service in self._services for name in service.register(self._server)]
        self._health = Health(["", *names])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names.append(health.SERVICE_NAME)
        if config.channelz:
            names.append(_add_channelz(self._server))
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self._server)
        address = listen(self._server, config.address, config.tls)
        await self._server.start()
        return str(address)

    async def set_engine(self, engine: AsyncEngine) -> None:
        for service in self._services:
            service.set_engine(engine)
        engine.add_observer(self._health)

    async def drain(self) -> None:
        self._health.drain()
        for service in self._services:
            service.drain()

    async def stop(self, grace_seconds: float) -> None:
        self._health.end_watches()
        await self._server.stop(grace_seconds)

    def _make_server(self) -> grpc.aio.Server:
        config = self._config
        interceptors = [*config.interceptors, CallGuard()]
        if config.tokens is not None:
            interceptors.insert(0, RequireToken(config.tokens))
        options = (
            *_OPTIONS,
            ("grpc.so_reuseport", int(config.reuse_port)),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.enable_channelz", int(config.channelz)),
        )
        return grpc.aio.server(interceptors=interceptors, options=options)


def _add_channelz(server: grpc.aio.Server) -> str:
    from grpc_channelz.v1 import channelz, channelz_pb2

    channelz.add_channelz_servicer(server)
    name: str = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
    return name
