"""The service vllm.grpc.engine.VllmEngine on an AsyncEngine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import NoReturn

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from fastpage.engine.async_engine import AsyncEngine, RequestStream
from fastpage.engine.core import DuplicateRequestId, EngineStopped
from fastpage.engine.prompts import Prompt, truncate
from fastpage.errors import InvalidArgument
from fastpage.outputs import RequestOutput, RequestOutputKind
from fastpage.sampling_params import SamplingParams
from fastpage.serving.grpc.calls import NotReady, abort, aside, write_outputs
from fastpage.serving.worker.convert import (
    Answer,
    check_answer_size,
    check_supported,
    model_info_to_proto,
    prompt_from_proto,
    sampling_params_from_proto,
    server_info_to_proto,
)
from fastpage.serving.worker.kv_events import CursorOutOfRange, KvEventLog
from fastpage.serving.worker.loads import Load, LoadMeter
from fastpage.serving.worker.tokenizer_archive import build_archive, split

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name

# A gateway holds a worker for stuck whose streams say nothing for 3 s.
_PATIENCE_SECONDS = 1.0
# How often a subscriber is told of a load that changed, and of one that did not: a gateway gives up
# a worker that is silent for 15 s.
_SECONDS_BETWEEN_LOADS = 0.5
_HEARTBEAT_SECONDS = 5.0
_SECONDS_BETWEEN_FLUSHES = 0.1


class VllmEngineService(pb_grpc.VllmEngineServicer):
    """Answers UNAVAILABLE until set_engine(). To be served by an engine with KV events."""

    def __init__(self, slow_client_timeout: float) -> None:
        self._slow_client_timeout = slow_client_timeout
        self._engine: AsyncEngine | None = None
        self._defaults: SamplingParams
        self._kv_events: KvEventLog
        self._loads: LoadMeter
        self._archive: asyncio.Future[bytes] | None = None
        # Request ids whose prompts are being looked at; the event: an Abort has come.
        self._starting: dict[str, asyncio.Event] = {}
        self._is_draining = False
        self._start = time.monotonic()
        self._last_receive = 0.0

    # ---- of a GrpcServer

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        pb_grpc.add_VllmEngineServicer_to_server(self, server)
        return (SERVICE_NAME,)

    def set_engine(self, engine: AsyncEngine) -> None:
        self._defaults = engine.get_default_sampling_params()
        self._loads = LoadMeter(engine)
        self._kv_events = KvEventLog(engine.info.block_size, index=engine.front_end_index)
        engine.add_observer(self._kv_events)
        engine.listen_to_kv_events(self._kv_events.take_in)
        self._engine = engine

    def drain(self) -> None:
        self._is_draining = True
        if self._engine is not None:
            self._kv_events.close()

    # ---- generation

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        self._last_receive = time.time()
        try:
            engine = self._ready_engine()
            stream, params = await self._add_request(request, engine)
        except Exception as error:
            await abort(context, error)
        answer = Answer(request, params)
        if not request.stream:
            await write_outputs(stream, context, answer.messages, self._slow_client_timeout)
            return

        def messages(output: RequestOutput | None) -> Iterable[pb.GenerateResponse]:
            return (answer.progress(),) if output is None else answer.messages(output)

        patient = _PatientStream(stream, engine)
        await write_outputs(patient, context, messages, self._slow_client_timeout)

    async def _add_request(
        self, request: pb.GenerateRequest, engine: AsyncEngine
    ) -> tuple[RequestStream, SamplingParams]:
        request_id = request.request_id
        if not request_id:
            raise InvalidArgument("request_id is empty")
        if request_id in self._starting:
            raise DuplicateRequestId(request_id)
        aborted = self._starting[request_id] = asyncio.Event()
        try:
            params, prompt = await aside(request, self._read, request, engine)
            kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
            stream = await engine.add_request(prompt, params, request_id, output_kind=kind)
        finally:
            del self._starting[request_id]
        if aborted.is_set():
            stream.abort()
        return stream, params

    def _read(
        self, request: pb.GenerateRequest, engine: AsyncEngine
    ) -> tuple[SamplingParams, Prompt]:
        """On any thread."""
        check_supported(request)
        params = sampling_params_from_proto(request.sampling_params, self._defaults)
        prompt = prompt_from_proto(request, engine)
        prompt = truncate(prompt, params, engine.info.max_model_len)
        check_answer_size(params, len(prompt.token_ids))
        return params, prompt

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        engine = await self._engine_or_abort(context)
        for request_id in request.request_ids:
            if request_id in self._starting:
                self._starting[request_id].set()
            await engine.abort_anywhere(request_id)
        return pb.AbortResponse()

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, "this worker generates text, it does not embed")

    # ---- what it is, and how it is

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        # A gateway takes a first answer, of whatever kind, for that of a worker that is complete.
        engine = await self._engine_or_abort(context)
        if self._is_draining:
            return pb.HealthCheckResponse(healthy=False, message="shutting down")
        if not engine.ready:
            return pb.HealthCheckResponse(healthy=False, message="the engine is being restarted")
        return pb.HealthCheckResponse(healthy=True, message="serving")

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return model_info_to_proto(await self._engine_or_abort(context))

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        engine = await self._engine_or_abort(context)
        return server_info_to_proto(
            engine.info,
            active_requests=self._loads.num_requests,
            uptime_seconds=time.monotonic() - self._start,
            last_receive_timestamp=self._last_receive,
        )

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        await self._engine_or_abort(context)
        return self._loads.to_response()

    async def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> None:
        engine = await self._engine_or_abort(context)
        if self._archive is None:
            making = asyncio.to_thread(build_archive, engine.tokenizer)
            self._archive = asyncio.ensure_future(making)
        try:
            # One for all calls: it goes on if this call ends.
            archive = await asyncio.shield(self._archive)
        except Exception as error:
            self._archive = None  # the next call tries again
            await abort(context, error)
        for chunk in split(archive):
            await context.write(chunk)

    # ---- the cache

    async def SubscribeKvEvents(
        self, request: common.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await self._engine_or_abort(context)
        if self._is_draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        try:
            cursor = self._kv_events.start(request.start_sequence_number)
        except CursorOutOfRange as error:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error))
        subscriber = _Subscriber(self._kv_events, self._loads, request, context)
        await subscriber.serve(cursor)

    async def FlushCache(
        self, request: common.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common.FlushCacheResponse:
        engine = await self._engine_or_abort(context)
        if not (math.isfinite(request.timeout_s) and request.timeout_s >= 0):
            error = f"timeout_s={request.timeout_s} is not a number of seconds"
            await abort(context, InvalidArgument(error))
        deadline = time.monotonic() + request.timeout_s
        try:
            while not await engine.reset_prefix_cache():
                if time.monotonic() >= deadline:
                    return common.FlushCacheResponse(
                        success=False, message="requests are in progress: nothing was flushed"
                    )
                await asyncio.sleep(_SECONDS_BETWEEN_FLUSHES)
        except EngineStopped as error:
            await abort(context, error)
        return common.FlushCacheResponse(success=True, message="the prefix cache is empty")

    async def StartProfile(
        self, request: common.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await _refuse(context, "this worker has no profiler")

    async def StopProfile(
        self, request: common.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await _refuse(context, "this worker has no profiler")

    # ----

    def _ready_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise NotReady("the model is being loaded: try again in a few seconds")
        return self._engine

    async def _engine_or_abort(self, context: grpc.aio.ServicerContext) -> AsyncEngine:
        try:
            return self._ready_engine()
        except NotReady as error:
            await abort(context, error)


class _PatientStream:
    """A RequestStream, with a None now and then while the engine makes steps but has no first
    output yet: of a long prompt, or in a long queue."""

    def __init__(self, stream: RequestStream, engine: AsyncEngine) -> None:
        self._stream = stream
        self._engine = engine
        self._num_steps = engine.stats().num_steps
        self._first: asyncio.Future[RequestOutput] | None = asyncio.ensure_future(
            stream.__anext__()
        )

    def __aiter__(self) -> _PatientStream:
        return self

    async def __anext__(self) -> RequestOutput | None:
        if self._first is None:
            return await self._stream.__anext__()
        while True:
            await asyncio.wait((self._first,), timeout=_PATIENCE_SECONDS)
            if self._first.done():
                first, self._first = self._first, None
                return first.result()
            num_steps = self._engine.stats().num_steps
            if num_steps != self._num_steps:
                self._num_steps = num_steps
                return None

    def abort(self) -> None:
        if self._first is not None:
            self._first.cancel()
        self._stream.abort()


class _Subscriber:
    """One call of SubscribeKvEvents."""

    def __init__(
        self,
        log: KvEventLog,
        loads: LoadMeter,
        request: common.SubscribeKvEventsRequest,
        context: grpc.aio.ServicerContext,
    ) -> None:
        self._log = log
        self._loads = loads
        self._context = context
        # Before there was a batch, the load has the number 0, which not everybody expects.
        self._number = request.start_sequence_number
        self._tells_load = self._number > 0 or request.load_records_before_first_batch
        self._num_records = 0
        self._last_load: Load | None = None
        self._last_time = 0.0

    async def serve(self, cursor: int | None) -> None:
        """From after batch `cursor` on (None: a snapshot first), till the log is closed."""
        with self._log.subscribe() as news:
            await self._context.send_initial_metadata(())
            while not self._log.closed:
                news.clear()
                for batch in self._log.read(cursor):
                    batch.load.CopyFrom(self._record(self._loads.read()))
                    cursor = self._number = batch.sequence_number
                    self._tells_load = True
                    await self._context.write(batch)
                await self._tell_load()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), _SECONDS_BETWEEN_LOADS)

    async def _tell_load(self) -> None:
        if not self._tells_load:
            return
        load = self._loads.read()
        silence = time.monotonic() - self._last_time
        if load.differs(self._last_load) or silence >= _HEARTBEAT_SECONDS:
            record = self._record(load)
            record.load_only = True
            await self._context.write(
                common.KvEventBatch(
                    sequence_number=self._number, timestamp=time.time(), dp_rank=0, load=record
                )
            )

    def _record(self, load: Load) -> common.EngineLoad:
        self._last_load = load
        self._last_time = time.monotonic()
        self._num_records += 1
        return load.to_engine_load(self._num_records)


async def _refuse(context: grpc.aio.ServicerContext, why: str) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
    raise AssertionError("abort() raises")
