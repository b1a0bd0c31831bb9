"""Between the messages of vllm.grpc.engine and the types of the engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from fastpage.engine.async_engine import AsyncEngine
from fastpage.engine.loading import ModelInfo
from fastpage.engine.prompts import Prompt, checked_token_ids, to_prompt
from fastpage.errors import InvalidArgument
from fastpage.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.serving.worker.tokenizer_archive import NO_TOKENIZER_PATH

# What clients of this protocol take, unless they are told otherwise; the gateway is not.
MAX_MESSAGE_BYTES = 4 << 20

# Taken as they are. Those of the first line default to 0, which is no value of theirs: it means
# the model's default.
_UNSET_AT_ZERO = ("top_p", "repetition_penalty", "n")
_PLAIN = ("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos")
_OPTIONAL = ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_LISTS = ("stop", "stop_token_ids")
_TEXT = ("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output")

_UNSUPPORTED = {
    "kv_transfer_params": "the KV cache stays on this worker",
    "kv_transfer_params_json": "the KV cache stays on this worker",
    "mm_inputs": "the model takes text",
    "extra_mm_inputs": "the model takes text",
    "media_refs": "the model takes text",
}
# A logarithm that JSON, and so every client of a gateway, can hold.
_LEAST_LOGPROB = -9999.0
_VECTOR_BYTES = 10  # of a protobuf list: its tag and its length
_LOGPROB_BYTES = 9  # of a float and a token id


def check_supported(request: pb.GenerateRequest) -> None:
    """Raises InvalidArgument that names what this worker cannot do."""
    for field, why in _UNSUPPORTED.items():
        value = getattr(request, field)
        if value if field == "extra_mm_inputs" else request.HasField(field):
            raise InvalidArgument(f"{field} is not supported: {why}")
    if request.data_parallel_rank != 0:
        raise InvalidArgument(
            f"data_parallel_rank={request.data_parallel_rank}: this worker has rank 0 only"
        )
    constraint = request.sampling_params.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidArgument(
            f"sampling_params.{constraint} is not supported: this worker does not constrain "
            "outputs yet; ask for it in the prompt"
        )


def prompt_from_proto(request: pb.GenerateRequest, engine: AsyncEngine) -> Prompt:
    """Takes a while if it is long; on any thread."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidArgument("input is not set: give tokenized.input_ids or text")
    vocab_size = engine.info.vocab_size
    if kind == "tokenized":
        token_ids = list(request.tokenized.input_ids)
        return Prompt(None, checked_token_ids(token_ids, vocab_size, "tokenized.input_ids"))
    if not request.text:
        raise InvalidArgument("text is empty")
    return to_prompt(request.text, engine.tokenizer, vocab_size)


def sampling_params_from_proto(
    message: pb.SamplingParams, defaults: SamplingParams
) -> SamplingParams:
    """`defaults`, changed by what the message sets; max_tokens: up to the model's length."""
    changes: dict[str, Any] = {"max_tokens": None}
    changes |= {name: getattr(message, name) for name in _PLAIN}
    changes |= {name: list(getattr(message, name)) for name in _LISTS}
    changes |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    changes |= {name: value for name in _UNSET_AT_ZERO if (value := getattr(message, name)) != 0}
    if message.HasField("seed"):
        # Any number is as good as another, a negative one too; -1 is no seed.
        changes["seed"] = message.seed if message.seed >= -1 else message.seed % 2**32
    if message.logit_bias:
        changes["logit_bias"] = dict(message.logit_bias)
    # Nobody reads the text but those who look for stop strings.
    changes["detokenize"] = bool(message.stop)
    if message.stop:
        changes |= {name: getattr(message, name) for name in _TEXT}
    return dataclasses.replace(defaults, **changes)


def check_answer_size(params: SamplingParams, num_prompt_tokens: int) -> None:
    """Raises InvalidArgument if the prompt's log probabilities cannot be in one message."""
    if params.prompt_logprobs is None:
        return
    position = _LOGPROB_BYTES * (params.prompt_logprobs + 2) + 3 * _VECTOR_BYTES
    if num_prompt_tokens * position > MAX_MESSAGE_BYTES:
        most = MAX_MESSAGE_BYTES // position
        raise InvalidArgument(
            f"prompt_logprobs={params.prompt_logprobs} of {num_prompt_tokens} prompt tokens are "
            f"more than a message of {MAX_MESSAGE_BYTES >> 20} MiB holds: that is {most} tokens"
        )


class Answer:
    """The messages of one request, from its outputs: deltas if it streams, or else one."""

    def __init__(self, request: pb.GenerateRequest, params: SamplingParams) -> None:
        self._stream = request.stream
        self._params = params
        self._token_ids: dict[int, list[int]] = {}  # what was sent of each index
        self._input_logprobs: pb.InputLogProbs | None = None

    def messages(self, output: RequestOutput) -> Iterator[pb.GenerateResponse]:
        if output.prompt_logprobs:
            self._take_prompt_logprobs(output)
        for completion in output.outputs:
            message = self._chunk(output, completion) if self._stream else None
            if message is not None:
                yield message
            if completion.finish_reason is not None:
                yield self._complete(output, completion)

    def progress(self) -> pb.GenerateResponse:
        """No tokens yet, but the engine is at it."""
        return pb.GenerateResponse(chunk=pb.GenerateStreamChunk())

    def _chunk(
        self, output: RequestOutput, completion: CompletionOutput
    ) -> pb.GenerateResponse | None:
        sent = self._token_ids.setdefault(completion.index, [])
        sent += completion.token_ids
        if not completion.token_ids:
            return None
        chunk = pb.GenerateStreamChunk(
            token_ids=completion.token_ids,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(sent),
            cached_tokens=output.num_cached_tokens,
            output_logprobs=self._output_logprobs(completion),
            input_logprobs=self._pop_input_logprobs() if completion.index == 0 else None,
            index=completion.index,
        )
        return pb.GenerateResponse(chunk=chunk)

    def _complete(self, output: RequestOutput, completion: CompletionOutput) -> pb.GenerateResponse:
        token_ids = self._token_ids.pop(completion.index, completion.token_ids)
        complete = pb.GenerateComplete(
            output_ids=token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(token_ids),
            cached_tokens=output.num_cached_tokens,
            index=completion.index,
        )
        if not self._stream:
            if logprobs := self._output_logprobs(completion):
                complete.output_logprobs.CopyFrom(logprobs)
            if self._input_logprobs is not None:
                complete.input_logprobs.CopyFrom(self._input_logprobs)
        if isinstance(completion.stop_reason, str):
            complete.matched_stop_str = completion.stop_reason
        elif completion.stop_reason is not None:
            complete.matched_token_id = completion.stop_reason
        response = pb.GenerateResponse(complete=complete)
        if (size := response.ByteSize()) > MAX_MESSAGE_BYTES:
            raise InvalidArgument(
                f"logprobs={self._params.logprobs}: the answer of {size} bytes is more than a "
                f"message of {MAX_MESSAGE_BYTES >> 20} MiB holds: ask for fewer, or stream"
            )
        return response

    def _output_logprobs(self, completion: CompletionOutput) -> pb.OutputLogProbs | None:
        if completion.logprobs is None or self._params.logprobs is None:
            return None
        most = self._params.logprobs
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        return pb.OutputLogProbs(
            token_logprobs=[_logprob(position[token_id].logprob) for token_id, position in chosen],
            token_ids=completion.token_ids,
            top_logprobs=[_top(position, most) for position in completion.logprobs] if most else (),
        )

    def _take_prompt_logprobs(self, output: RequestOutput) -> None:
        """They come in parts, as the prompt is computed, the first token's None with the first."""
        assert output.prompt_logprobs is not None
        if self._input_logprobs is None:
            self._input_logprobs = pb.InputLogProbs()
        message, most = self._input_logprobs, self._params.prompt_logprobs or 0
        start = len(message.token_ids)
        token_ids = output.prompt_token_ids[start : start + len(output.prompt_logprobs)]
        for token_id, position in zip(token_ids, output.prompt_logprobs, strict=True):
            message.token_ids.append(token_id)
            entry = message.token_logprobs.add()
            if position is not None:
                entry.value = _logprob(position[token_id].logprob)
            if most:
                message.top_logprobs.append(_top(position or {}, most))

    def _pop_input_logprobs(self) -> pb.InputLogProbs | None:
        message, self._input_logprobs = self._input_logprobs, None
        return message


def _top(position: PositionLogprobs, most: int) -> pb.TopLogProbs:
    """The chosen token is among `position` wherever it ranks."""
    top = sorted((entry.rank or 0, token_id) for token_id, entry in position.items())[:most]
    return pb.TopLogProbs(
        values=[_logprob(position[token_id].logprob) for _, token_id in top],
        token_ids=[token_id for _, token_id in top],
    )


def _logprob(value: float) -> float:
    return max(value, _LEAST_LOGPROB)


def model_info_to_proto(engine: AsyncEngine) -> pb.GetModelInfoResponse:
    info, tokenizer = engine.info, engine.tokenizer
    return pb.GetModelInfoResponse(
        model_path=info.model,
        is_generation=True,
        max_context_length=info.max_model_len,
        vocab_size=info.vocab_size,
        served_model_name=info.served_model_name,
        tokenizer_path=NO_TOKENIZER_PATH,
        architectures=[info.architecture],
        eos_token_ids=info.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id or 0,
        max_req_input_len=info.max_model_len - 1,
        default_sampling_params_json=_defaults_as_json(engine.get_default_sampling_params()),
    )


def _defaults_as_json(params: SamplingParams) -> str:
    """What the model's author recommends, of what gateways fill in."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    usual = SamplingParams()
    recommended = {
        name: value for name in names if (value := getattr(params, name)) != getattr(usual, name)
    }
    return json.dumps(recommended) if recommended else ""


def server_info_to_proto(
    info: ModelInfo, *, active_requests: int, uptime_seconds: float, last_receive_timestamp: float
) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        active_requests=active_requests,
        last_receive_timestamp=last_receive_timestamp,
        uptime_seconds=uptime_seconds,
        server_type="fastpage-grpc",
        data_parallel_size=1,
        kv_cache_dtype=info.kv_cache_dtype,
        block_size=info.block_size,
        model_dtype=info.dtype,
        max_num_seqs=info.max_num_seqs,
    )
