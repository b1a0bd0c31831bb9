"""The service fastpage.v1.Fastpage on an AsyncEngine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from fastpage._C import __version__
from fastpage.engine.async_engine import AsyncEngine
from fastpage.engine.prompts import Prompt, chat_prompt
from fastpage.errors import InvalidArgument
from fastpage.outputs import RequestOutputKind
from fastpage.sampling_params import SamplingParams
from fastpage.serving.grpc.calls import ModelNotFound, NotReady, abort, write_outputs
from fastpage.serving.grpc.convert import (
    refuse_unknown_fields,
    response_to_proto,
    sampling_params_from_proto,
    sampling_params_to_proto,
)
from fastpage.tokenizer import Tokenizer
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Fastpage"].full_name

_OUTPUT_KINDS = {
    pb.OUTPUT_KIND_UNSPECIFIED: RequestOutputKind.DELTA,
    pb.OUTPUT_KIND_DELTA: RequestOutputKind.DELTA,
    pb.OUTPUT_KIND_FINAL_ONLY: RequestOutputKind.FINAL_ONLY,
}

T = TypeVar("T")

# Requests of more bytes than this are read off the event loop: the other calls go on meanwhile.
_LONG_REQUEST = 1 << 14

ToPrompt = Callable[[Any, AsyncEngine], Awaitable[Prompt]]


class FastpageService(pb_grpc.FastpageServicer):
    """`slow_client_timeout`: see write_outputs()."""

    def __init__(self, slow_client_timeout: float = 60.0) -> None:
        self._engine: AsyncEngine | None = None
        self._slow_client_timeout = slow_client_timeout
        self._defaults: SamplingParams | None = None
        self._start = time.monotonic()

    # ---- as a GrpcService

    def register(self, server: grpc.aio.Server) -> list[str]:
        pb_grpc.add_FastpageServicer_to_server(self, server)
        return [SERVICE_NAME]

    def set_engine(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def drain(self) -> None:
        """Its streams end with their requests."""

    # ---- generation

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await self._stream(request, context, self._prompt)

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        await self._stream(request, context, self._chat_prompt)

    async def _stream(
        self, request: Any, context: grpc.aio.ServicerContext, to_prompt: ToPrompt
    ) -> None:
        try:
            engine = self._ready_engine()
            await _aside(request, refuse_unknown_fields, request)
            self._check_model(request.model, engine)
            params = self._sampling_params(request, engine)
            prompt = await to_prompt(request, engine)
            stream = await engine.add_request(
                prompt,
                params,
                request.request_id or None,
                priority=request.priority,
                output_kind=_output_kind(request),
            )
        except Exception as error:
            await abort(context, error)
        await write_outputs(
            stream, context, lambda output: (response_to_proto(output),), self._slow_client_timeout
        )

    async def _prompt(self, request: pb.GenerateRequest, engine: AsyncEngine) -> Prompt:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidArgument("prompt is not set: give text or token_ids")
        if kind == "text":
            if not request.text:
                raise InvalidArgument("text is empty")
            return await engine.to_prompt(
                {"prompt": request.text, "cache_salt": request.cache_salt}
            )
        return await engine.to_prompt(
            {
                "prompt_token_ids": list(request.token_ids.ids),
                "cache_salt": request.cache_salt,
            }
        )

    async def _chat_prompt(self, request: pb.ChatRequest, engine: AsyncEngine) -> Prompt:
        return await _aside(request, _render, request, engine.tokenizer)

    def _sampling_params(self, request: Any, engine: AsyncEngine) -> SamplingParams:
        if self._defaults is None:
            self._defaults = engine.get_default_sampling_params()
        return sampling_params_from_proto(request.sampling_params, self._defaults)

    # ---- the rest

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        try:
            refuse_unknown_fields(request)
            if not request.request_id:
                raise InvalidArgument("request_id is empty")
            return pb.AbortResponse(found=self._ready_engine().abort(request.request_id))
        except Exception as error:
            await abort(context, error)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        engine = await self._engine_or_abort(context)
        info = engine.info
        return pb.GetModelInfoResponse(
            model=info.served_model_name,
            model_path=info.model,
            architecture=info.architecture,
            dtype=info.dtype,
            kv_cache_dtype=info.kv_cache_dtype,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            has_chat_template=info.has_chat_template,
            default_sampling_params=sampling_params_to_proto(engine.get_default_sampling_params()),
            server_version=__version__,
        )

    async def GetServerStats(
        self, request: pb.GetServerStatsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerStatsResponse:
        engine = await self._engine_or_abort(context)
        stats = engine.stats()
        scheduler = stats.scheduler
        return pb.GetServerStatsResponse(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_total=scheduler.num_blocks,
            kv_blocks_free=scheduler.num_free_blocks,
            kv_blocks_used_peak=engine.peak_used_blocks,
            kv_block_size=engine.info.block_size,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_steps=stats.num_steps,
            num_computed_tokens=stats.num_computed_tokens,
            num_generated_tokens=stats.num_generated_tokens,
            schedule_seconds=stats.schedule_seconds,
            model_seconds=stats.model_seconds,
            uptime_seconds=time.monotonic() - self._start,
            num_preemptions_swap=scheduler.num_preemptions_swap,
            preempted_cache_queries=scheduler.preempted_cache_queries,
            preempted_cache_hits=scheduler.preempted_cache_hits,
            host_blocks_total=scheduler.num_host_blocks,
            host_blocks_cached=scheduler.num_cached_host_blocks,
            num_blocks_swapped_out=scheduler.num_blocks_swapped_out,
            num_blocks_swapped_in=scheduler.num_blocks_swapped_in,
            num_blocks_copied=scheduler.num_blocks_copied,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
        )

    def _ready_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise NotReady("the model is being loaded: try again in a few seconds")
        return self._engine

    async def _engine_or_abort(self, context: grpc.aio.ServicerContext) -> AsyncEngine:
        try:
            return self._ready_engine()
        except NotReady as error:
            await abort(context, error)

    def _check_model(self, name: str, engine: AsyncEngine) -> None:
        served = engine.info.served_model_name
        if name and name != served:
            raise ModelNotFound(f"model {name!r} is not served here: {served!r} is")


async def _aside(request: Message, call: Callable[..., T], *args: Any) -> T:
    """call(*args), on another thread if the request is long."""
    if request.ByteSize() > _LONG_REQUEST:
        return await asyncio.to_thread(call, *args)
    return call(*args)


def _render(request: pb.ChatRequest, tokenizer: Tokenizer) -> Prompt:
    messages = [{"role": m.role, "content": m.content} for m in request.messages]
    return chat_prompt(messages, tokenizer, request.cache_salt)


def _output_kind(request: Any) -> RequestOutputKind:
    try:
        return _OUTPUT_KINDS[request.output_kind]
    except KeyError:
        raise InvalidArgument(f"output_kind={request.output_kind} is unknown") from None
