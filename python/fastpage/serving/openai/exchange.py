"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from fastpage.serving.openai.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Message], Any]
Headers = Iterable[tuple[bytes, bytes]]

encode_json = msgspec.json.Encoder().encode

# Of a body that is too large so much is read, and dropped, that its sender gets to hear why.
_MOST_DROPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int = 4 << 20
    # Until a request is there, and as long as an answer may stand still.
    request_timeout_seconds: float = 30.0
    slow_client_timeout_seconds: float = 30.0


class ClientGone(Exception):
    """Nobody is there to answer."""


class Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limits = limits
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._started = False
        self.gone = False

    def header(self, name: bytes) -> str | None:
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def started(self) -> bool:
        """The status has been sent: what goes wrong now must be told in the body."""
        return self._started

    # ---- the request

    async def read_json_body(self) -> bytes:
        """Raises ApiError: 408, 413, 415; ClientGone."""
        self._check_headers()
        try:
            return await asyncio.wait_for(self._read(), self._limits.request_timeout_seconds)
        except asyncio.TimeoutError:
            seconds = self._limits.request_timeout_seconds
            message = f"the body did not come within {seconds:g} seconds"
            raise ApiError(408, message, code="request_timeout", close=True) from None

    def _check_headers(self) -> None:
        # A page on another site may have a browser send text/plain, but not JSON, unasked.
        kind = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"Content-Type is {kind or 'missing'}: it must be application/json",
                code="unsupported_media_type",
                close=True,
            )
        waits = (self.header(b"expect") or "").lower() == "100-continue"
        if waits and int(self.header(b"content-length") or 0) > self._limits.max_body_bytes:
            raise self._too_large()

    async def _read(self) -> bytes:
        limit = self._limits.max_body_bytes
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
            if not message.get("more_body") or size > _MOST_DROPPED_BYTES:
                break
        if size > limit:
            raise self._too_large()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limits.max_body_bytes} bytes"
        return ApiError(413, message, code="request_too_large", close=True)

    # ---- the client

    @contextmanager
    def watching(self, on_gone: Callable[[], None]) -> Iterator[None]:
        """Within it, `on_gone` is called once if the client goes away. After the body has been
        read."""
        watch = asyncio.ensure_future(self._watch(on_gone))
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self, on_gone: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        on_gone()

    # ---- the answer

    async def send_json(self, status: int, value: Any, headers: Headers = ()) -> None:
        body = b"" if value is None else encode_json(value)
        await self._start(
            status,
            [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        )
        await self._send({"type": "http.response.body", "body": body})

    async def send_error(self, error: ApiError) -> None:
        await self.send_json(error.status, error.body(), error.headers())

    async def start_stream(self, media_type: bytes, headers: Headers = ()) -> None:
        await self._start(
            200,
            [
                (b"content-type", media_type),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # nginx would keep the parts back
                *headers,
            ],
        )

    async def write(self, part: bytes) -> None:
        """Returns when there is room for more: a client that reads slowly holds its sender up."""
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
