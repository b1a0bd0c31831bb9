"""Between the messages of fastpage.v1 and the types of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.unknown_fields import UnknownFieldSet

from fastpage.engine.prompts import Message
from fastpage.errors import InvalidArgument
from fastpage.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.v1 import fastpage_pb2 as pb

_FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}

_EARLY_STOPPING: dict[int, bool | str] = {
    pb.EARLY_STOPPING_UNSPECIFIED: False,
    pb.EARLY_STOPPING_NO: False,
    pb.EARLY_STOPPING_YES: True,
    pb.EARLY_STOPPING_NEVER: "never",
}

# Of fields that are not known. More of them are not looked through for the first one's number.
_MOST_UNKNOWN_BYTES = 1 << 16

# Fields of pb.SamplingParams that are set or not; the rest are lists.
_OPTIONAL_FIELDS = [f.name for f in pb.SamplingParams.DESCRIPTOR.fields if f.has_presence]
_LIST_FIELDS = ("allowed_token_ids", "bad_words", "stop", "stop_token_ids")


def refuse_unknown_fields(message: ProtoMessage) -> None:
    """Raises InvalidArgument if the sender set a field that this server's protocol lacks."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    unknown_bytes = message.ByteSize() - known.ByteSize()
    if unknown_bytes > _MOST_UNKNOWN_BYTES:
        raise InvalidArgument(
            f"request has {unknown_bytes} bytes of fields that this server does not know"
        )
    if unknown_bytes > 0:
        _name_unknown_field(message, "")


def _name_unknown_field(message: ProtoMessage, where: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidArgument(
            f"{where or 'request'} has field number {unknown[0].field_number}, which this server "
            "does not know"
        )
    for name, child in _submessages(message):
        _name_unknown_field(child, f"{where}.{name}" if where else name)


def _submessages(message: ProtoMessage) -> Iterator[tuple[str, ProtoMessage]]:
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, ProtoMessage):
            yield field.name, value
        else:
            for i, item in enumerate(value):
                yield f"{field.name}[{i}]", item


def sampling_params_from_proto(
    message: pb.SamplingParams, defaults: SamplingParams
) -> SamplingParams:
    """`defaults`, changed by what the message sets; max_tokens: up to the model's length."""
    changes: dict[str, Any] = {"max_tokens": None}
    for name in _OPTIONAL_FIELDS:
        if message.HasField(name):
            changes[name] = getattr(message, name)
    if "early_stopping" in changes:
        changes["early_stopping"] = _early_stopping(changes["early_stopping"])
    for name in _LIST_FIELDS:
        values = list(getattr(message, name))
        if values:
            changes[name] = values
    if message.logit_bias:
        changes["logit_bias"] = dict(message.logit_bias)
    return dataclasses.replace(defaults, **changes)


def messages_from_proto(message: pb.ChatRequest | pb.Conversation) -> list[Message]:
    return [{"role": m.role, "content": m.content} for m in message.messages]


def chat_options_from_proto(message: pb.ChatRequest | pb.Conversation) -> dict[str, Any]:
    """The keyword arguments of chat_text()."""
    options: dict[str, Any] = {"continue_final_message": message.continue_final_message}
    if message.HasField("add_generation_prompt"):
        options["add_generation_prompt"] = message.add_generation_prompt
    if message.HasField("template_kwargs"):
        options["template_kwargs"] = _plain_struct(message.template_kwargs)
    return options


def _plain_struct(struct: Struct) -> dict[str, Any]:
    return {key: _plain_value(value) for key, value in struct.fields.items()}


def _plain_value(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _plain_struct(value.struct_value)
    if kind == "list_value":
        return [_plain_value(item) for item in value.list_value.values]
    if kind == "number_value":
        # Struct knows no other numbers; a template would print 512.0.
        number = value.number_value
        return int(number) if number.is_integer() else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def _early_stopping(value: int) -> bool | str:
    try:
        return _EARLY_STOPPING[value]
    except KeyError:
        raise InvalidArgument(f"early_stopping={value} is unknown") from None


def sampling_params_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """The fields that a generation_config.json can set."""
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )


def response_to_proto(output: RequestOutput) -> pb.GenerateResponse:
    # Assigned, not handed to the constructors, which take twice as long: this is done for every
    # message.
    response = pb.GenerateResponse()
    response.request_id = output.request_id
    for completion in output.outputs:
        _write_completion(completion, response.outputs.add())
    if output.prompt_logprobs:
        response.prompt_logprobs.extend(
            _position(position) for position in output.prompt_logprobs if position is not None
        )
    if output.finished:
        response.usage.prompt_tokens = len(output.prompt_token_ids)
        response.usage.completion_tokens = output.num_output_tokens
        response.usage.cached_tokens = output.num_cached_tokens
    return response


def _write_completion(output: CompletionOutput, message: pb.CompletionDelta) -> None:
    message.index = output.index
    message.text = output.text
    message.token_ids.extend(output.token_ids)
    if output.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[output.finish_reason]
    if isinstance(output.stop_reason, str):
        message.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        message.stop_token_id = output.stop_reason
    if output.cumulative_logprob is not None:
        message.cumulative_logprob = output.cumulative_logprob
    if output.score is not None:
        message.score = output.score
    if output.logprobs:
        message.logprobs.extend(map(_position, output.logprobs))


def _position(logprobs: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        tokens=[
            pb.TokenLogprob(
                token_id=token_id,
                logprob=entry.logprob,
                rank=entry.rank or 0,
                text=entry.decoded_token or "",
            )
            for token_id, entry in logprobs.items()
        ]
    )
