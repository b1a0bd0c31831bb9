"""AsyncEngine: the engine for asyncio programs, and what the servers stand on."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol

from fastpage import _C
from fastpage.engine.args import EngineArgs
from fastpage.engine.core import (
    Core,
    DuplicateRequestId,
    EngineDied,
    EngineLost,
    EngineStopped,
    LocalCore,
)
from fastpage.engine.loading import LoadedModel, ModelInfo, ServedModel, load_model
from fastpage.engine.observer import EngineObserver, StepReport
from fastpage.engine.output_processor import OutputProcessor, RequestState
from fastpage.engine.prompts import Prompt, PromptType, to_prompt, truncate
from fastpage.errors import InvalidArgument, ResourceExhausted
from fastpage.outputs import RequestOutput, RequestOutputKind
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer

KvEventListener = Callable[[list[_C.KvEvent]], None]
_News = Callable[[EngineObserver], None]

_logger = logging.getLogger("fastpage.engine")

# More bad_words than this, or of more characters, are tokenized off the event loop.
_MANY_WORDS = 100
_LONG_WORDS = 1 << 12
# Biases, allowed tokens and those that stop: so many are looked at there, too.
_MANY_TOKENS = 1 << 12
# Texts, and lists of token ids, that are longer than this are looked at off the event loop.
_LONG_PROMPT = 1 << 14

# A server says it in every message of the answer.
_LONGEST_REQUEST_ID = 1024


class Siblings(Protocol):
    """The other front ends of the same engine."""

    index: int  # of this one among them

    async def abort(self, request_id: str) -> bool: ...


class RequestStream:
    """The outputs of one request, as an async iterator.

    A reader that is slower than the engine finds the news of several steps in one output. abort()
    must be called by whoever stops reading before the end.
    """

    def __init__(self, engine: AsyncEngine, state: RequestState, kind: RequestOutputKind) -> None:
        self._engine = engine
        self._state = state
        self._kind = kind
        self._has_news = False
        self._reader: asyncio.Future[None] | None = None  # who waits for news
        self._ended = False
        self._accepted = False  # by the engine
        self._announced = False  # to the observers
        self._caller = contextvars.copy_context()

    @property
    def request_id(self) -> str:
        return self._state.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        while not self._has_news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._has_news = False
        state = self._state
        self._ended = state.finished
        if state.error is not None:
            raise state.error
        return state.delta() if self._kind is RequestOutputKind.DELTA else state.snapshot()

    def abort(self) -> None:
        """Gives the request up: its KV blocks are free after the step in progress. No output comes
        after it but one with finish_reason "abort", if somebody still reads."""
        self._engine._abort(self._state)

    def _notify(self) -> None:
        if self._kind is not RequestOutputKind.FINAL_ONLY or self._state.finished:
            self._has_news = True
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)


class AsyncEngine:
    """All methods but stats() belong to the event loop of the first request."""

    def __init__(
        self,
        model: LoadedModel | ServedModel,
        observer: EngineObserver | None = None,
        core: Core | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        """`core`: what computes `model`; that of a LoadedModel is its own engine."""
        if core is None:
            assert isinstance(model, LoadedModel)
            core = LocalCore(model.engine)
        self._core = core
        self._model = model
        # Seconds that each part of the start took. Whoever starts it may add its own.
        self.phases = dict(model.phases)
        self._observers: list[EngineObserver] = []
        self._kv_event_listeners: list[KvEventListener] = []
        self._processor = OutputProcessor(model.tokenizer)
        self._streams: dict[int, RequestStream] = {}
        self._core_ids: dict[str, int] = {}
        self._siblings = siblings
        self._auto_prefix = "request-" if siblings is None else f"request-{siblings.index}-"
        self._pace = _Pace()
        self._stopped = False
        self._lost = asyncio.Event()
        self._lost_error: EngineLost
        if observer is not None:
            self.add_observer(observer)

    @classmethod
    def from_engine_args(
        cls, args: EngineArgs, observer: EngineObserver | None = None
    ) -> AsyncEngine:
        """In this process: what a notebook wants."""
        return cls(load_model(args), observer)

    @classmethod
    async def start_process(
        cls, args: EngineArgs, observer: EngineObserver | None = None
    ) -> AsyncEngine:
        """In a process of its own, which is started again if it dies: what a server wants. Returns
        when the model is loaded. Raises what load_model() raises, and EngineDied if the process
        ends instead."""
        from fastpage.engine.process_core import ProcessCore

        core, model = await ProcessCore.launch(args)
        engine = cls(model, observer, core)
        core.start(engine)
        return engine

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
        """Raises InvalidArgument if the request can never be served, ResourceExhausted if it cannot
        be served now (with `retry_after_seconds`, an estimate), EngineStopped if no request can.
        The caller reads the stream to its end or calls its abort()."""
        is_callers = bool(request_id)
        # Nobody can guess it: what others call theirs is never in its way.
        request_id = request_id or self._auto_prefix + secrets.token_hex(8)
        try:
            stream = await self._add_request(
                prompt, sampling_params, request_id, is_callers, priority, output_kind
            )
        except Exception as error:
            if isinstance(error, ResourceExhausted):
                error.retry_after_seconds = self._pace.seconds_per_request()  # type: ignore[attr-defined]
            refusal = error
            self._tell(lambda observer: observer.request_refused(request_id, refusal))
            raise
        self._announce(stream)
        return stream

    async def _add_request(
        self,
        prompt: PromptType | Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        is_callers: bool,
        priority: int,
        output_kind: RequestOutputKind,
    ) -> RequestStream:
        if len(request_id) > _LONGEST_REQUEST_ID:
            raise InvalidArgument(
                f"request_id has {len(request_id)} characters: at most {_LONGEST_REQUEST_ID}"
            )
        self.info.check_priority(priority)
        params = sampling_params or SamplingParams()
        if not isinstance(prompt, Prompt):
            prompt = await self.to_prompt(prompt)
        prompt = truncate(prompt, params, self.info.max_model_len)
        core_params = await self._to_core(params)
        self.info.check_logprobs(core_params)
        # No await from here on until the request is known: of two with one id, one comes first.
        if self._stopped:
            raise EngineStopped("the engine is shutting down")
        if request_id in self._core_ids:
            raise DuplicateRequestId(request_id)
        self._core.start(self)
        core_id = self._core.add_request(
            prompt.token_ids,
            core_params,
            priority=priority,
            cache_salt=prompt.cache_salt,
            name=request_id if is_callers and self._siblings is not None else "",
        )
        try:
            state = self._processor.add(core_id, request_id, prompt, params)
        except BaseException:  # nobody would hear of it
            self._core.abort(core_id)
            raise
        stream = RequestStream(self, state, output_kind)
        self._streams[core_id] = stream
        self._core_ids[request_id] = core_id
        try:
            await self._core.accepted(core_id)
        except BaseException:  # the core refuses it, or the caller has gone meanwhile
            stream.abort()
            raise
        stream._accepted = True
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

    async def abort_anywhere(self, request_id: str) -> bool:
        """abort(), of a request of whichever front end of the engine."""
        stream = self._streams.get(self._core_ids.get(request_id, -1))
        found = self.abort(request_id)
        if self._siblings is None or (stream is not None and stream._accepted):
            return found
        # The engine may be about to refuse that one: the name is another front end's request's.
        return await self._siblings.abort(request_id) or found

    @property
    def front_end_index(self) -> int:
        """Of several over one engine."""
        return 0 if self._siblings is None else self._siblings.index

    async def to_prompt(self, prompt: PromptType) -> Prompt:
        arguments = (prompt, self.tokenizer, self.info.vocab_size)
        if _is_long(prompt):
            return await asyncio.to_thread(to_prompt, *arguments)
        return to_prompt(*arguments)

    async def _to_core(self, params: SamplingParams) -> _C.SamplingParams:
        words = params.bad_words or ()
        tokens = (params.logit_bias, params.allowed_token_ids, params.stop_token_ids)
        if (
            len(words) > _MANY_WORDS
            or sum(map(len, words)) > _LONG_WORDS
            or sum(len(each or ()) for each in tokens) > _MANY_TOKENS
        ):
            return await asyncio.to_thread(params.to_core, self.tokenizer)
        return params.to_core(self.tokenizer)

    # ---- the rest

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    @property
    def ready(self) -> bool:
        """False while its process is being started again, and from drain() or shutdown() on."""
        return self._core.ready and not self._stopped

    def get_default_sampling_params(self) -> SamplingParams:
        return self._model.default_sampling_params()

    def stats(self) -> _C.EngineStats:
        """As of the last step, if the engine is in a process of its own."""
        return self._core.stats()

    @property
    def peak_used_blocks(self) -> int:
        """Most KV blocks in use at the end of a step."""
        return self._core.peak_used_blocks

    def add_observer(self, observer: EngineObserver) -> None:
        self._observers.append(observer)
        if self.ready:
            self._tell_one(observer, lambda observer: observer.engine_started(self))

    def listen_to_kv_events(self, listener: KvEventListener) -> None:
        """`listener` is called on the event loop with what steps stored and removed, if the engine
        was started with enable_kv_events. All is forgotten when an engine process dies: see
        EngineObserver.engine_died()."""
        self._kv_event_listeners.append(listener)

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing is done, if a request is in progress."""
        return await self._core.reset_prefix_cache()

    async def wait_lost(self) -> EngineLost:
        """Returns when the engine's process has ended for good: what it would be started from is no
        longer what this side has of it, so that all of the program is to be started again."""
        await self._lost.wait()
        return self._lost_error

    async def drain(self, timeout_seconds: float) -> None:
        """No new requests from now on; returns when those in progress are done, or the time is
        over: shutdown() ends what is left."""
        self._stopped = True
        deadline = time.monotonic() + timeout_seconds
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def shutdown(self) -> None:
        """Ends the requests in progress with EngineStopped, and the core."""
        self._stopped = True
        for core_id in self._streams:
            self._core.abort(core_id)
        self._lose_all(EngineStopped("the engine was shut down"))
        await self._core.stop()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    # ---- what the core tells (CoreListener)

    def on_step(self, step: _C.StepOutput, stats: _C.EngineStats) -> None:
        if self._kv_event_listeners and (events := step.kv_events):
            for listener in self._kv_event_listeners:
                try:
                    listener(events)
                except Exception:
                    _logger.exception("a listener to KV events failed")
        processed = self._processor.process(step.outputs)
        for abort in processed.aborts:
            abort.tell(self._core)
        streams = [self._streams[state.core_id] for state in processed.changed]
        if self._observers:
            for stream in streams:
                self._announce(stream)
            report = StepReport(
                stats,
                step.num_tokens,
                processed.num_new_tokens,
                processed.first_tokens,
                processed.token_gaps,
            )
            self._tell(lambda observer: observer.stepped(report))
        for stream in streams:
            if stream._state.finished:
                self._pace.request_finished(processed.time)
                self._remove(stream)
            stream._notify()

    def on_step_error(self, error: Exception) -> None:
        self._processor.step_failed(error)

    def on_died(self, error: EngineDied) -> None:
        self._lose_all(error)
        self._tell(lambda observer: observer.engine_died(error))

    def on_started(self) -> None:
        self._tell(lambda observer: observer.engine_started(self))

    def on_lost(self, error: EngineLost) -> None:
        self._lost_error = error
        self._lost.set()

    # ---- observers: what one of them does wrong costs no request anything

    def _tell(self, news: _News) -> None:
        for observer in self._observers:
            self._tell_one(observer, news)

    def _tell_one(self, observer: EngineObserver, news: _News) -> None:
        try:
            news(observer)
        except Exception:
            _logger.exception("%s, an observer of the engine, failed", type(observer).__name__)

    # ---- one request's end

    def _abort(self, state: RequestState) -> None:
        stream = self._streams.get(state.core_id)
        if stream is None or stream._state is not state:
            return
        self._core.abort(state.core_id)
        self._processor.forget(state.core_id)
        state.abort()
        self._remove(stream)
        stream._notify()

    def _lose_all(self, error: EngineStopped) -> None:
        for stream in list(self._streams.values()):
            self._processor.forget(stream._state.core_id)
            stream._state.fail(type(error)(str(error)))
            self._remove(stream)
            stream._notify()

    def _announce(self, stream: RequestStream) -> None:
        """Its first output, and its end, may come before add_request() gets to go on."""
        if stream._announced:
            return
        stream._announced = True
        state = stream._state
        ended = state.core_id not in self._streams
        self._tell(lambda observer: stream._caller.run(observer.request_added, state))
        if ended:
            self._tell(lambda observer: observer.request_finished(state))

    def _remove(self, stream: RequestStream) -> None:
        state = stream._state
        if self._streams.pop(state.core_id, None) is None:  # an observer has aborted it
            return
        del self._core_ids[state.request_id]
        if stream._announced:
            self._tell(lambda observer: observer.request_finished(state))


class _Pace:
    """How long it takes until a place in the queue is free: about as long as between the ends of
    two requests."""

    _WEIGHT_OF_LAST = 0.1

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval = 1.0

    def request_finished(self, now: float) -> None:
        if self._last is not None:
            self._interval += self._WEIGHT_OF_LAST * (now - self._last - self._interval)
        self._last = now

    def seconds_per_request(self) -> float:
        return min(max(self._interval, 0.05), 30.0)


def _is_long(prompt: PromptType) -> bool:
    if isinstance(prompt, dict):
        return any(
            isinstance(value, str | list) and len(value) > _LONG_PROMPT for value in prompt.values()
        )
    return isinstance(prompt, str | list) and len(prompt) > _LONG_PROMPT
