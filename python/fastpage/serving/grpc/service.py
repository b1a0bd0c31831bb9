"""The service fastpage.v1.Fastpage on an AsyncEngine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import grpc

from fastpage._C import __version__
from fastpage.engine.async_engine import AsyncEngine, RequestStream
from fastpage.engine.prompts import Prompt, chat_prompt, chat_text, checked_token_ids
from fastpage.errors import InvalidArgument
from fastpage.outputs import RequestOutputKind
from fastpage.sampling_params import SamplingParams
from fastpage.serving.grpc.calls import (
    ModelNotFound,
    NotReady,
    abort,
    aside,
    last_output,
    write_outputs,
)
from fastpage.serving.grpc.convert import (
    chat_options_from_proto,
    messages_from_proto,
    refuse_unknown_fields,
    response_to_proto,
    sampling_params_from_proto,
    sampling_params_to_proto,
)
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Fastpage"].full_name

_OUTPUT_KINDS = {
    pb.OUTPUT_KIND_UNSPECIFIED: RequestOutputKind.DELTA,
    pb.OUTPUT_KIND_DELTA: RequestOutputKind.DELTA,
    pb.OUTPUT_KIND_FINAL_ONLY: RequestOutputKind.FINAL_ONLY,
}

T = TypeVar("T")
Context: TypeAlias = grpc.aio.ServicerContext
# From a request to its prompt; called on any thread.
ToPrompt = Callable[[Any, AsyncEngine], Prompt]


class FastpageService(pb_grpc.FastpageServicer):
    """`slow_client_timeout`: see write_outputs()."""

    def __init__(self, slow_client_timeout: float = 60.0) -> None:
        self._engine: AsyncEngine | None = None
        self._defaults = SamplingParams()
        self._slow_client_timeout = slow_client_timeout
        self._start = time.monotonic()

    # ---- as a GrpcService

    def register(self, server: grpc.aio.Server) -> list[str]:
        pb_grpc.add_FastpageServicer_to_server(self, server)
        return [SERVICE_NAME]

    def set_engine(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._defaults = engine.get_default_sampling_params()

    def drain(self) -> None:
        """Its streams end with their requests."""

    # ---- generation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        await self._stream(request, context, _text_prompt)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:
        await self._stream(request, context, _chat_prompt)

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        return await self._unary(request, context, _text_prompt)

    async def ChatUnary(self, request: pb.ChatRequest, context: Context) -> pb.GenerateResponse:
        return await self._unary(request, context, _chat_prompt)

    async def _stream(self, request: Any, context: Context, to_prompt: ToPrompt) -> None:
        try:
            stream = await self._add(request, to_prompt, _output_kind(request))
        except Exception as error:
            await abort(context, error)
        await write_outputs(
            stream, context, lambda output: (response_to_proto(output),), self._slow_client_timeout
        )

    async def _unary(
        self, request: Any, context: Context, to_prompt: ToPrompt
    ) -> pb.GenerateResponse:
        try:
            if _output_kind(request) is not RequestOutputKind.FINAL_ONLY and request.output_kind:
                raise InvalidArgument("output_kind=DELTA: a unary call has one message")
            stream = await self._add(request, to_prompt, RequestOutputKind.FINAL_ONLY)
            return response_to_proto(await last_output(stream))
        except Exception as error:
            await abort(context, error)

    async def _add(
        self, request: Any, to_prompt: ToPrompt, output_kind: RequestOutputKind
    ) -> RequestStream:
        engine = self._ready_engine()
        params, prompt = await aside(request, self._read, request, engine, to_prompt)
        return await engine.add_request(
            prompt,
            params,
            request.request_id or None,
            priority=request.priority,
            output_kind=output_kind,
        )

    def _read(
        self, request: Any, engine: AsyncEngine, to_prompt: ToPrompt
    ) -> tuple[SamplingParams, Prompt]:
        refuse_unknown_fields(request)
        _check_model(request.model, engine)
        params = sampling_params_from_proto(request.sampling_params, self._defaults)
        return params, to_prompt(request, engine)

    # ---- the rest

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return await self._answer(request, context, _tokenize)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        return await self._answer(request, context, _detokenize)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        try:
            refuse_unknown_fields(request)
            if not request.request_id:
                raise InvalidArgument("request_id is empty")
            found = await self._ready_engine().abort_anywhere(request.request_id)
            return pb.AbortResponse(found=found)
        except Exception as error:
            await abort(context, error)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return await self._answer(request, context, _model_info)

    async def GetServerStats(
        self, request: pb.GetServerStatsRequest, context: Context
    ) -> pb.GetServerStatsResponse:
        stats = await self._answer(request, context, _server_stats)
        stats.uptime_seconds = time.monotonic() - self._start
        return stats

    async def _answer(
        self, request: Any, context: Context, answer: Callable[[Any, AsyncEngine], T]
    ) -> T:
        try:
            engine = self._ready_engine()

            def check_and_answer() -> T:
                refuse_unknown_fields(request)
                return answer(request, engine)

            return await aside(request, check_and_answer)
        except Exception as error:
            await abort(context, error)

    def _ready_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise NotReady("the model is being loaded: try again in a few seconds")
        return self._engine


# ---- from a request to its prompt


def _text_prompt(request: pb.GenerateRequest, engine: AsyncEngine) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgument("prompt is not set: give text or token_ids")
    if kind == "token_ids":
        ids = checked_token_ids(list(request.token_ids.ids), engine.info.vocab_size, "token_ids")
        return Prompt(None, ids, request.cache_salt)
    if not request.text:
        raise InvalidArgument("text is empty")
    ids = engine.tokenizer.encode(request.text)
    if not ids:
        raise InvalidArgument("text has no tokens")
    return Prompt(request.text, ids, request.cache_salt)


def _chat_prompt(request: pb.ChatRequest, engine: AsyncEngine) -> Prompt:
    return chat_prompt(
        messages_from_proto(request),
        engine.tokenizer,
        request.cache_salt,
        **chat_options_from_proto(request),
    )


def _output_kind(request: Any) -> RequestOutputKind:
    try:
        return _OUTPUT_KINDS[request.output_kind]
    except KeyError:
        raise InvalidArgument(f"output_kind={request.output_kind} is unknown") from None


def _check_model(name: str, engine: AsyncEngine) -> None:
    served = engine.info.served_model_name
    if name and name != served:
        raise ModelNotFound(f"model {name!r} is not served here: {served!r} is")


# ---- answers


def _tokenize(request: pb.TokenizeRequest, engine: AsyncEngine) -> pb.TokenizeResponse:
    _check_model(request.model, engine)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidArgument("input is not set: give text or conversation")
    text = request.text
    if kind == "conversation":
        text = chat_text(
            messages_from_proto(request.conversation),
            engine.tokenizer,
            **chat_options_from_proto(request.conversation),
        )
    special = request.add_special_tokens
    if not request.HasField("add_special_tokens"):
        special = kind == "text"
    token_ids = engine.tokenizer.encode(text, add_special_tokens=special)
    tokens: list[str] = []
    if request.return_tokens:
        tokens = [engine.tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
    return pb.TokenizeResponse(
        token_ids=token_ids, tokens=tokens, max_model_len=engine.info.max_model_len
    )


def _detokenize(request: pb.DetokenizeRequest, engine: AsyncEngine) -> pb.DetokenizeResponse:
    _check_model(request.model, engine)
    token_ids = list(request.token_ids)
    if token_ids:
        token_ids = checked_token_ids(token_ids, engine.info.vocab_size, "token_ids")
    return pb.DetokenizeResponse(
        text=engine.tokenizer.decode(token_ids, skip_special_tokens=request.skip_special_tokens)
    )


def _model_info(request: pb.GetModelInfoRequest, engine: AsyncEngine) -> pb.GetModelInfoResponse:
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
        quantization=info.quantization,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        scheduling_policy=info.scheduling_policy,
    )


def _server_stats(
    request: pb.GetServerStatsRequest, engine: AsyncEngine
) -> pb.GetServerStatsResponse:
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
        prepare_seconds=stats.prepare_seconds,
        sample_seconds=stats.sample_seconds,
        output_seconds=stats.output_seconds,
        num_waiting_tokens=scheduler.num_waiting_tokens,
        ready=engine.ready,
    )
