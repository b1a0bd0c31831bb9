"""uvicorn around the application: sockets, limits on connections, the end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from fastpage.engine.async_engine import AsyncEngine
from fastpage.errors import FastpageError
from fastpage.serving.metrics.exposition import Expose
from fastpage.serving.openai.app import build_app
from fastpage.serving.openai.connection import Connection
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.state import ServerState
from fastpage.serving.security import BearerTokens, TlsFiles

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than the minute of most load balancers


@dataclass(frozen=True)
class HttpOptions:
    """Raises ValueError for what can be no address."""

    host: str = "127.0.0.1"
    port: int = 0  # the system's choice
    uds: str | None = None  # path of a Unix socket, instead of host and port
    tls: TlsFiles | None = None
    tokens: BearerTokens | None = None
    cors_origins: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    trace_context: bool = False  # heed the traceparent header
    reuse_port: bool = False  # other processes of this server listen there, too

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} is not between 0 and 65535")
        if self.uds == "":
            raise ValueError("--uds is empty: give the path of a Unix socket")


class HttpServer:
    """A lifecycle.Frontend. Its /health says ready while the engine is, from set_engine() to
    drain()."""

    def __init__(self, options: HttpOptions | None = None, expose: Expose | None = None) -> None:
        self._options = options or HttpOptions()
        self._state = ServerState(self._options.limits, expose)
        self._server: _Server
        self._serving: asyncio.Task[None]

    async def start(self) -> str:
        options = self._options
        # What clients do wrong is theirs to know.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        app = build_app(self._state, options.tokens, options.cors_origins)
        if options.trace_context:
            from fastpage.serving.tracing import TraceContextMiddleware

            app = TraceContextMiddleware(app)
        config = uvicorn.Config(
            app,
            http=functools.partial(Connection, options.limits),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        config.load()
        if options.tls is not None:
            config.ssl = options.tls.server_context()
        listener, url = _listen(options)
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.001)
        return url

    async def set_engine(self, engine: AsyncEngine) -> None:
        self._state.set_engine(engine)

    async def drain(self) -> None:
        self._state.draining = True

    async def stop(self, grace_seconds: float) -> None:
        self._state.draining = True
        self._server.config.timeout_graceful_shutdown = grace_seconds  # type: ignore[assignment]
        self._server.should_exit = True
        await self._serving
        if self._options.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._options.uds)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the command's


def _listen(options: HttpOptions) -> tuple[socket.socket, str]:
    scheme = "http" if options.tls is None else "https"
    try:
        if options.uds is not None:
            return _listen_at_path(options.uds), f"unix:{options.uds}"
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.create_server(
            address[:2], family=family, backlog=_BACKLOG, reuse_port=options.reuse_port
        )
    except OSError as error:
        where = options.uds or f"{options.host}:{options.port}"
        raise FastpageError(
            f"cannot listen on {where}: {(error.strerror or str(error)).lower()}"
        ) from None
    host, port = listener.getsockname()[:2]
    return listener, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _listen_at_path(path: str) -> socket.socket:
    if _is_left_behind(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_left_behind(path: str) -> bool:
    """Whether it is the socket of a server that was killed. (Of a file that is not a socket,
    connect() says the same.)"""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
