"""What an AsyncEngine stands on: the core in this process, or in another (process_core.py)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from fastpage import _C
from fastpage.engine.engine_thread import EngineThread
from fastpage.errors import FastpageError, InvalidArgument


class DuplicateRequestId(InvalidArgument):
    """Another request in progress has that request_id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id={request_id!r} is in use by another request")


class EngineStopped(FastpageError):
    """The engine was shut down before the request was done."""


class EngineDied(EngineStopped):
    """The engine's process has ended, and is being started again."""


class EngineHung(EngineDied):
    """It was there, and did nothing, until it was killed."""


class EngineLost(EngineStopped):
    """The engine's process cannot be started again for this front end: the model's files or the
    package have been replaced. Both have to be started again."""


class CoreListener(Protocol):
    """Called on the event loop."""

    def on_step(self, step: _C.StepOutput, stats: _C.EngineStats) -> None: ...

    def on_step_error(self, error: Exception) -> None:
        """The model failed in a step. The requests that it cost end in the next one."""

    def on_died(self, error: EngineDied) -> None:
        """All requests in progress are lost."""

    def on_started(self) -> None:
        """It takes requests again."""

    def on_lost(self, error: EngineLost) -> None:
        """It never will."""


class Core(Protocol):
    """All methods belong to one event loop."""

    def start(self, listener: CoreListener) -> None:
        """Before the first request, on the event loop that will hear of the steps. May be called
        again."""

    @property
    def ready(self) -> bool: ...

    def add_request(
        self,
        token_ids: list[int],
        params: _C.SamplingParams,
        *,
        priority: int,
        cache_salt: str,
        name: str = "",
    ) -> int:
        """An id of its own for the request. `name`: one that no request of another front end of the
        engine may have meanwhile. Raises InvalidArgument, ResourceExhausted, DuplicateRequestId,
        EngineDied: here or in accepted()."""

    async def accepted(self, core_id: int) -> None:
        """Returns when the request is in the queue, or raises."""

    def abort(self, core_id: int, index: int | None = None) -> None: ...

    def stats(self) -> _C.EngineStats: ...

    @property
    def peak_used_blocks(self) -> int: ...

    async def reset_prefix_cache(self) -> bool: ...

    async def stop(self) -> None: ...


class LocalCore:
    """A core in this process, on a thread of its own."""

    ready = True

    def __init__(self, engine: _C.Engine) -> None:
        self._engine = engine
        self._thread = EngineThread(engine, self._post_step, self._post_error)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: CoreListener

    def start(self, listener: CoreListener) -> None:
        if self._loop is None:
            self._listener = listener
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def add_request(
        self,
        token_ids: list[int],
        params: _C.SamplingParams,
        *,
        priority: int,
        cache_salt: str,
        name: str = "",
    ) -> int:
        return self._engine.add_request(token_ids, params, priority=priority, cache_salt=cache_salt)

    async def accepted(self, core_id: int) -> None:
        pass

    def abort(self, core_id: int, index: int | None = None) -> None:
        if index is None:
            self._engine.abort(core_id)
        else:
            self._engine.abort(core_id, index)

    def stats(self) -> _C.EngineStats:
        return self._engine.stats()

    @property
    def peak_used_blocks(self) -> int:
        return self._thread.watch.peak_used_blocks

    async def reset_prefix_cache(self) -> bool:
        return await asyncio.to_thread(self._engine.reset_prefix_cache)

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.stop)

    # Between the two threads: one call_soon_threadsafe a step, not one a token.

    def _post_step(self, step: _C.StepOutput, stats: _C.EngineStats) -> None:
        self._post(self._listener.on_step, step, stats)

    def _post_error(self, error: Exception) -> None:
        self._post(self._listener.on_step_error, error)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        # An error: the loop was closed without shutdown(), and nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)
