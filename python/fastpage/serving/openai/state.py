"""What the endpoints share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastpage.engine.async_engine import AsyncEngine
from fastpage.errors import ResourceExhausted
from fastpage.serving.metrics import EngineMetrics, Exposition
from fastpage.serving.metrics.calls import http_requests
from fastpage.serving.metrics.exposition import Expose
from fastpage.serving.openai.errors import not_ready
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.model import Model

# Bodies of more bytes than this are read, and their prompts tokenized, off the event loop: that
# takes a millisecond or more, and a hop to another thread a tenth of one.
_LONG_BODY = 1 << 12
# And those with more quotation marks: so many texts take as long, however short they are.
_MANY_QUOTES = 100
# And those that are longer than this one after the other: tokenizing takes some 150 bytes of memory
# for each byte of text.
_HUGE_BODY = 1 << 18
# Those that wait for that hold their memory.
_MOST_WAITING_BYTES = 64 << 20


class ServerState:
    """Raises MissingExtra if prometheus_client is not there."""

    def __init__(self, limits: Limits | None = None, expose: Expose | None = None) -> None:
        self.limits = limits or Limits()
        self.started = int(time.time())
        self.draining = False
        self._metrics = EngineMetrics()
        self.requests = http_requests()
        self.exposition = (expose or Exposition)(self._metrics, self.requests)
        self._huge_body = asyncio.Lock()
        self._num_waiting_bytes = 0  # of huge bodies; also of the one whose turn it is
        self._engine: AsyncEngine | None = None
        self._model: Model | None = None

    def set_engine(self, engine: AsyncEngine) -> None:
        engine.add_observer(self._metrics)
        self._engine = engine
        self._model = Model(engine.info, engine.tokenizer, engine.get_default_sampling_params())

    @property
    def ready(self) -> bool:
        return self._engine is not None and self._engine.ready and not self.draining

    def ready_engine(self) -> AsyncEngine:
        """Raises ApiError (503) while there is none that takes requests."""
        if self.draining:
            raise not_ready("the server is shutting down", "shutting_down")
        if self._engine is None:
            raise not_ready("the model is being loaded: try again in a few seconds", "loading")
        if not self._engine.ready:
            raise not_ready("the engine is being started again", "engine_died")
        return self._engine

    def model(self) -> Model:
        assert self._model is not None
        return self._model

    async def aside(self, body: bytes, call: Callable[..., Any], *arguments: Any) -> Any:
        """call(body, *arguments), on another thread if that may take long. Raises ResourceExhausted
        if many wait for that already."""
        if len(body) <= _LONG_BODY and body.count(b'"') <= _MANY_QUOTES:
            return call(body, *arguments)
        if len(body) <= _HUGE_BODY:
            return await asyncio.to_thread(call, body, *arguments)
        waiting = self._num_waiting_bytes
        if waiting and waiting + len(body) > _MOST_WAITING_BYTES:
            raise ResourceExhausted(
                f"{waiting} bytes of long requests are being read: try again later"
            )
        self._num_waiting_bytes += len(body)
        try:
            async with self._huge_body:
                return await asyncio.to_thread(call, body, *arguments)
        finally:
            self._num_waiting_bytes -= len(body)
