"""uvicorn's HTTP connection, bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastpage.serving.openai.exchange import Limits

# Of what is no body: headers, but also trailers and the framing of chunks.
_MAX_OTHER_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Bounds what a client can hold: no half-sent requests, no requests ahead of their answers, no
    answers that nobody takes."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._num_other_bytes = 0  # since headers were complete, or a part of a body came
        self._in_headers = True
        self._sent_ahead = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self._limits.request_timeout_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        # uvicorn's timer of an idle connection runs on after a reset, and holds the last request;
        # so does the cycle of the two, until the garbage collector next looks at all there is.
        self._unset_keepalive_if_required()
        self.cycle = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._num_other_bytes += len(data)
        super().data_received(data)
        if self._num_other_bytes > _MAX_OTHER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # A request sent ahead. Its connection would be read no more, and the end of its client
            # go unnoticed; nobody's client does this.
            self._sent_ahead = True
            self.transport.abort()
        self._in_headers = True
        self._arm(self._limits.request_timeout_seconds)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # or else it is a trailer, of which nobody makes use
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._num_other_bytes = 0
        # Whoever reads the body gives up before, and says so; there may be nobody who does.
        self._arm(2 * self._limits.request_timeout_seconds)
        if not self._sent_ahead:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm(self._limits.slow_client_timeout_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
