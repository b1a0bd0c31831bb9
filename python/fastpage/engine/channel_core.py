"""A core behind a socket: the front end's half of cpp/include/fastpage/engine_channel.h."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastpage import _C
from fastpage.engine.core import CoreListener, DuplicateRequestId, EngineDied, EngineHung
from fastpage.engine.engine_thread import SchedulerWatch
from fastpage.engine.watchdog import Watchdog
from fastpage.errors import FastpageError, InvalidArgument, ResourceExhausted

_logger = logging.getLogger("fastpage.engine")

# What a front end may have waiting for an engine that does not read.
_MOST_UNSENT_BYTES = 256 << 20

_REFUSALS: dict[_C.EngineNews.Refusal, type[FastpageError]] = {
    _C.EngineNews.Refusal.INVALID_ARGUMENT: InvalidArgument,
    _C.EngineNews.Refusal.RESOURCE_EXHAUSTED: ResourceExhausted,
    _C.EngineNews.Refusal.NAME_IN_USE: DuplicateRequestId,
}


class ChannelCore:
    """A core whose EngineServer has the other end of a socket. Belongs to the event loop that it is
    made on. One that gets nowhere for `timeout` seconds counts as dead; 0: never."""

    def __init__(self, timeout: float = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._watchdog = Watchdog(timeout, self._ping, self._on_hang)
        self._listener: CoreListener | None = None
        self._client: _C.EngineClient | None = None
        self._fileno = -1
        self._stats = _C.EngineStats()
        self._watch = SchedulerWatch()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._resets: list[asyncio.Future[bool]] = []
        self._closed = asyncio.Event()

    def open(self, fileno: int) -> None:
        """Takes the socket over: the core is ready from now on, until close() or its end."""
        self._closed.clear()
        self._fileno = fileno
        self._client = _C.EngineClient(fileno)
        self._loop.add_reader(fileno, self._on_readable)
        if self._timeout:
            self._watchdog.start()

    def close(self, error: EngineDied) -> None:
        if self._client is None:
            return
        self._watchdog.stop()
        self._loop.remove_reader(self._fileno)
        self._loop.remove_writer(self._fileno)
        self._client = None  # closes the socket
        self._stats = _C.EngineStats()  # nothing runs any more
        lost: list[asyncio.Future[Any]] = [*self._waiting.values(), *self._resets]
        for future in lost:
            if not future.done():
                future.set_exception(type(error)(str(error)))
                future.exception()  # there may be nobody left who asks
        self._waiting.clear()
        self._resets.clear()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # ---- Core

    def start(self, listener: CoreListener) -> None:
        self._listener = listener

    @property
    def ready(self) -> bool:
        return self._client is not None

    def add_request(
        self,
        token_ids: list[int],
        params: _C.SamplingParams,
        *,
        priority: int,
        cache_salt: str,
        name: str = "",
    ) -> int:
        client = self._ready_client()
        if client.num_unsent_bytes > _MOST_UNSENT_BYTES:
            raise ResourceExhausted(
                "the engine is behind with reading requests: try again in a few seconds"
            )
        core_id = client.add_request(
            token_ids, params, priority=priority, cache_salt=cache_salt, name=name
        )
        self._waiting[core_id] = self._loop.create_future()
        self._flush()
        return core_id

    async def accepted(self, core_id: int) -> None:
        await self._waiting[core_id]

    def abort(self, core_id: int, index: int | None = None) -> None:
        if self._client is None:
            return
        if index is None:
            self._answer(core_id, None)
            self._client.abort(core_id)
        else:
            self._client.abort(core_id, index)
        self._flush()

    def stats(self) -> _C.EngineStats:
        return self._stats

    @property
    def peak_used_blocks(self) -> int:
        return self._watch.peak_used_blocks

    async def reset_prefix_cache(self) -> bool:
        client = self._ready_client()
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._resets.append(answer)
        client.reset_prefix_cache()
        self._flush()
        return await answer

    async def stop(self) -> None:
        self.close(EngineDied("the engine was shut down"))

    # ---- the channel

    def _ready_client(self) -> _C.EngineClient:
        if self._client is None:
            raise EngineDied("the engine is being started again: try again in a few seconds")
        return self._client

    def _flush(self) -> None:
        """The rest goes when the socket takes it."""
        if self._client is not None and self._client.has_unsent:
            self._loop.add_writer(self._fileno, self._on_writable)

    def _on_writable(self) -> None:
        assert self._client is not None
        self._client.flush()
        if not self._client.has_unsent:
            self._loop.remove_writer(self._fileno)

    def _on_readable(self) -> None:
        client = self._client
        assert client is not None and self._listener is not None
        why = "the engine's process has ended"
        lost = False  # some of its news: it cannot go on
        try:
            for news in client.receive():
                self._take_in(news, self._listener)
        except (FastpageError, MemoryError) as error:
            lost, why = True, str(error) or "there was no memory for what the engine said"
        except Exception:
            lost, why = True, "what the engine said could not be taken in"
            _logger.exception("%s", why)
        if (lost or client.closed) and client is self._client:
            self._die(EngineDied(f"{why}: try again in a few seconds"))

    def _die(self, error: EngineDied) -> None:
        assert self._listener is not None
        self.close(error)
        self._listener.on_died(error)

    def _ping(self) -> None:
        assert self._client is not None
        self._client.ping()
        self._flush()

    def _on_hang(self) -> None:
        why = f"the engine got nowhere for {self._timeout:g} s"
        self._die(EngineHung(f"{why}: try again in a few seconds"))

    def _take_in(self, news: _C.EngineNews, listener: CoreListener) -> None:
        kind = news.kind
        if kind == _C.EngineNews.Kind.STEP:
            self._watchdog.heard = True
            self._stats = news.stats
            self._watch.look_at(news.stats.scheduler)
            listener.on_step(news.step, news.stats)
        elif kind == _C.EngineNews.Kind.ACCEPTED:
            self._answer(news.request_id, None)
        elif kind == _C.EngineNews.Kind.REFUSED:
            self._answer(news.request_id, _REFUSALS[news.refusal](news.error))
        elif kind == _C.EngineNews.Kind.STEP_FAILED:
            listener.on_step_error(FastpageError(news.error))
        elif kind == _C.EngineNews.Kind.ALIVE:
            self._watchdog.answered(news.progress)
        elif self._resets:
            answer = self._resets.pop(0)
            if not answer.done():
                answer.set_result(news.done)

    def _answer(self, core_id: int, error: Exception | None) -> None:
        future = self._waiting.pop(core_id, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
