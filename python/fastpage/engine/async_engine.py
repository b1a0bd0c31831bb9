"""AsyncEngine: the engine for asyncio programs, and what the servers stand on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from fastpage import _C
from fastpage.engine.args import EngineArgs
from fastpage.engine.engine_thread import EngineThread
from fastpage.engine.loading import LoadedModel, ModelInfo, load_model
from fastpage.engine.observer import EngineObserver
from fastpage.engine.output_processor import OutputProcessor, RequestState
from fastpage.engine.prompts import Prompt, PromptType, to_prompt, truncate
from fastpage.errors import FastpageError, InvalidArgument
from fastpage.outputs import RequestOutput, RequestOutputKind
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer

KvEventListener = Callable[[list[_C.KvEvent]], None]

# Texts longer than this are tokenized off the event loop.
_LONG_TEXT = 1 << 14


class EngineStopped(FastpageError):
    """The engine was shut down before the request was done."""


class DuplicateRequestId(InvalidArgument):
    """Another request in progress has that request_id."""


class RequestStream:
    """The outputs of one request, as an async iterator.

    A reader that is slower than the engine finds the news of several steps in one output. abort()
    must be called by whoever stops reading before the end.
    """

    def __init__(self, engine: AsyncEngine, state: RequestState, kind: RequestOutputKind) -> None:
        self._engine = engine
        self._state = state
        self._kind = kind
        self._news = asyncio.Event()
        self._stopped = False
        self._ended = False

    @property
    def request_id(self) -> str:
        return self._state.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        state = self._state
        self._ended = state.finished or self._stopped
        if state.error is not None:
            raise state.error
        if self._stopped and not state.finished:
            raise EngineStopped("the engine was shut down")
        return state.delta() if self._kind is RequestOutputKind.DELTA else state.snapshot()

    def abort(self) -> None:
        """Gives the request up: its KV blocks are free after the step in progress. No output comes
        after it but one with finish_reason "abort", if somebody still reads."""
        self._engine._abort(self._state)

    def _notify(self) -> None:
        if self._kind is not RequestOutputKind.FINAL_ONLY or self._state.finished:
            self._news.set()

    def _stop(self) -> None:
        self._stopped = True
        self._news.set()


class AsyncEngine:
    """All methods but stats() belong to the event loop of the first request."""

    def __init__(self, loaded: LoadedModel, observer: EngineObserver | None = None) -> None:
        self._observer = observer or EngineObserver()
        self._kv_event_listeners: list[KvEventListener] = []
        self._core = loaded.engine
        self._tokenizer = loaded.tokenizer
        self._loaded = loaded
        self._processor = OutputProcessor(loaded.tokenizer)
        self._streams: dict[int, RequestStream] = {}
        self._core_ids: dict[str, int] = {}
        self._auto_ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._thread = EngineThread(self._core, self._post_step, self._post_error)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> AsyncEngine:
        return cls(load_model(args))

    # ---- requests

    async def add_request(
        self,
        prompt: PromptType | Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> RequestStream:
        """Raises InvalidArgument or ResourceExhausted if the request can never, or not now, be
        served. The caller reads the stream to its end or calls its abort()."""
        try:
            return await self._add_request(
                prompt, sampling_params, request_id, priority, output_kind
            )
        except Exception as error:
            self._observer.request_refused(error)
            raise

    async def _add_request(
        self,
        prompt: PromptType | Prompt,
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        output_kind: RequestOutputKind,
    ) -> RequestStream:
        self.info.check_priority(priority)
        params = sampling_params or SamplingParams()
        request_id = request_id or f"request-{next(self._auto_ids)}"
        if not isinstance(prompt, Prompt):
            prompt = await self.to_prompt(prompt)
        prompt = truncate(prompt, params, self.info.max_model_len)
        core_params = params.to_core(self._tokenizer)
        # No await from here on: of two requests with one id, one comes first.
        if self._stopped:
            raise EngineStopped("the engine was shut down")
        if request_id in self._core_ids:
            raise DuplicateRequestId(f"request_id={request_id!r} is in use by another request")
        self._start()
        core_id = self._core.add_request(
            prompt.token_ids, core_params, priority=priority, cache_salt=prompt.cache_salt
        )
        state = self._processor.add(core_id, request_id, prompt, params)
        stream = RequestStream(self, state, output_kind)
        self._streams[core_id] = stream
        self._core_ids[request_id] = core_id
        self._observer.request_added(state)
        return stream

    async def generate(
        self,
        prompt: PromptType | Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> AsyncIterator[RequestOutput]:
        """add_request() and its stream in one; the request is aborted if the reader goes away."""
        stream = await self.add_request(
            prompt, sampling_params, request_id, priority=priority, output_kind=output_kind
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    def abort(self, request_id: str) -> bool:
        """False if there is no such request in progress."""
        core_id = self._core_ids.get(request_id)
        if core_id is None:
            return False
        self._streams[core_id].abort()
        return True

    async def to_prompt(self, prompt: PromptType) -> Prompt:
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        vocab_size = self.info.vocab_size
        if isinstance(text, str) and len(text) > _LONG_TEXT:
            return await asyncio.to_thread(to_prompt, prompt, self._tokenizer, vocab_size)
        return to_prompt(prompt, self._tokenizer, vocab_size)

    # ---- the rest

    @property
    def info(self) -> ModelInfo:
        return self._loaded.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self._loaded.default_sampling_params()

    def stats(self) -> _C.EngineStats:
        return self._core.stats()

    @property
    def peak_used_blocks(self) -> int:
        """Most KV blocks in use at the end of a step."""
        return self._thread.peak_used_blocks

    def listen_to_kv_events(self, listener: KvEventListener) -> None:
        """`listener` is called on the event loop with what steps stored and removed, if the engine
        was started with enable_kv_events."""
        self._kv_event_listeners.append(listener)

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing is done, if a request is in progress."""
        return await asyncio.to_thread(self._core.reset_prefix_cache)

    async def drain(self, timeout_seconds: float) -> None:
        """No new requests from now on; returns when those in progress are done, or the time is
        over: shutdown() ends what is left."""
        self._stopped = True
        deadline = time.monotonic() + timeout_seconds
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def shutdown(self) -> None:
        """Ends the requests in progress with EngineStopped, and the engine's thread."""
        self._stopped = True
        for stream in list(self._streams.values()):
            self._core.abort(stream._state.core_id)
            self._processor.forget(stream._state.core_id)
            stream._stop()
        self._streams.clear()
        self._core_ids.clear()
        await asyncio.to_thread(self._thread.stop)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    # ---- between the two threads: one call_soon_threadsafe a step, not one a token

    def _start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def _post_step(self, step: _C.StepOutput, stats: _C.EngineStats) -> None:
        self._post(self._process, step, stats)

    def _post_error(self, error: Exception) -> None:
        self._post(self._processor.step_failed, error)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop was closed without shutdown(): nobody listens any more
            self._stopped = True

    def _process(self, step: _C.StepOutput, stats: _C.EngineStats) -> None:
        self._observer.stepped(stats, step.num_tokens)
        if events := step.kv_events:
            for listener in self._kv_event_listeners:
                listener(events)
        changed, aborts = self._processor.process(step.outputs)
        for abort in aborts:
            abort.tell(self._core)
        now = time.monotonic()
        for state in changed:
            stream = self._streams.get(state.core_id)
            if stream is None:
                continue
            self._observer.request_progressed(state, now)
            if state.finished:
                self._remove(state)
            stream._notify()

    def _abort(self, state: RequestState) -> None:
        stream = self._streams.get(state.core_id)
        if stream is None:
            return
        self._core.abort(state.core_id)
        self._processor.forget(state.core_id)
        for sample in state.samples:
            if not sample.finished:
                sample.finish("abort")
        self._remove(state)
        stream._notify()

    def _remove(self, state: RequestState) -> None:
        del self._streams[state.core_id]
        del self._core_ids[state.request_id]
        self._observer.request_finished(state)
