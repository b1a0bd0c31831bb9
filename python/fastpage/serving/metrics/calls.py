"""Calls that a server answered, by status: also what never got as far as the engine.

Under the names by which others count them: those of go-grpc-prometheus for gRPC, those of
prometheus-fastapi-instrumentator, which vLLM uses, for HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CallCounts:
    """A counter with labels."""

    name: str
    meaning: str
    labels: tuple[str, ...]
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)  # by the labels' values

    def add(self, *values: str) -> None:
        self.counts[values] = self.counts.get(values, 0) + 1


def http_requests() -> CallCounts:
    labels = ("handler", "method", "status")
    return CallCounts("http_requests", "Requests that were answered, by status.", labels)


Scope = MutableMapping[str, Any]


class CountRequests:
    """The outermost middleware of an ASGI app. `paths` are those that are counted apart."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], counts: CallCounts, paths: Collection[str]
    ) -> None:
        self._app = app
        self._counts = counts
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched_send(message: Scope) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            # 0: the client went before it got an answer, or the server has none but a closed
            # connection.
            handler = scope["path"] if scope["path"] in self._paths else "none"
            method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS") else "other"
            self._counts.add(handler, method, f"{status // 100}xx" if status else "none")
