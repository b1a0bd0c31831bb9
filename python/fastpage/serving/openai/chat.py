"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from fastpage.engine.prompts import Prompt, chat_prompt
from fastpage.outputs import CompletionOutput, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.serving.openai.completions import rank_fields
from fastpage.serving.openai.errors import invalid
from fastpage.serving.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import (
    ChatCompletionRequest,
    TokenizeRequest,
    to_sampling_params,
)
from fastpage.serving.openai.reply import Call, Dialect, News, StreamUsage, UsageCounter
from fastpage.tokenizer import Tokenizer


class Chat(Dialect):
    id_prefix = "chatcmpl"
    # The engine's logprobs say how many there are at each position.
    renamed: ClassVar = {
        "logprobs": "top_logprobs",
        "message": "messages",
        "template_kwargs": "chat_template_kwargs",
    }
    prompt_field = "messages"

    def __init__(self) -> None:
        super().__init__(ChatCompletionRequest)

    def params(self, request: ChatCompletionRequest, defaults: SamplingParams) -> SamplingParams:
        limit = request.max_completion_tokens
        if limit is not None and request.max_tokens is not None and limit != request.max_tokens:
            raise invalid(
                "max_tokens and max_completion_tokens are two names of one limit: give one",
                "max_completion_tokens",
            )
        changes: dict[str, Any] = {"max_tokens": request.max_tokens if limit is None else limit}
        if request.logprobs:
            changes["logprobs"] = request.top_logprobs or 0
        elif request.top_logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return to_sampling_params(request, defaults, **changes)

    def prompts(self, request: ChatCompletionRequest, model: Model) -> list[Prompt]:
        return [to_chat_prompt(request, model.tokenizer, request.cache_salt or "")]

    def reply(self, call: Call) -> ChatReply:
        return ChatReply(call)


def to_chat_prompt(
    request: ChatCompletionRequest | TokenizeRequest, tokenizer: Tokenizer, cache_salt: str = ""
) -> Prompt:
    """Raises ApiError or InvalidArgument."""
    if not request.messages:
        code = "missing_required_parameter" if request.messages is None else "invalid_value"
        raise invalid("messages is missing, or empty", "messages", code)
    variables = dict(request.chat_template_kwargs or {})
    if request.documents is not None:
        variables["documents"] = request.documents
    return chat_prompt(
        [_with_arguments(message) for message in request.messages],
        tokenizer,
        cache_salt,
        add_special_tokens=bool(request.add_special_tokens),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        tools=request.tools or None,
        template_kwargs=variables,
    )


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Tool calls of earlier answers: OpenAI writes arguments as JSON text, templates expect what it
    says."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}")
    except (msgspec.DecodeError, RecursionError):
        raise invalid("messages: the arguments of a tool call are not JSON", "messages") from None
    return call | {"function": function | {"arguments": arguments}}


class ChatReply:
    def __init__(self, call: Call) -> None:
        self._call = call
        self._request: ChatCompletionRequest = call.request
        self._names = TokenNames(
            call.model.tokenizer, bool(self._request.return_tokens_as_token_ids)
        )
        last = (self._request.messages or [{}])[-1]
        goes_on = self._request.continue_final_message or (
            self._request.add_generation_prompt is False
        )
        self._role: str = last["role"] if goes_on else "assistant"
        self._echo = ""
        if self._request.echo and last["role"] == self._role:
            content = last.get("content")
            self._echo = content if isinstance(content, str) else ""
        self._counter = UsageCounter()
        self._usage = StreamUsage(call, self._counter)
        self._begun: set[int] = set()
        self._model = call.model.info.served_model_name

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        self._counter.take(0, output)
        choices = [
            {
                "index": completion.index,
                "message": {"role": self._role, "content": self._echo + completion.text},
                **self._rest(completion),
            }
            for completion in output.outputs
        ]
        answer = self._envelope("chat.completion", choices) | {"usage": self._counter.usage()}
        if self._request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def chunks(self, news: Sequence[News]) -> Iterator[dict[str, Any]]:
        for i, output in news:
            self._counter.take(i, output)
            for completion in output.outputs:
                index = completion.index
                if index not in self._begun:
                    self._begun.add(index)
                    yield self._first_chunk(index, output)
                delta = {"content": completion.text} if completion.text else {}
                rest = self._rest(completion)
                if delta or rest["finish_reason"] or rest["logprobs"] or "token_ids" in rest:
                    yield self._chunk({"index": index, "delta": delta, **rest})

    def last_chunks(self) -> Iterable[dict[str, Any]]:
        if self._usage.at_end:
            chunk = self._envelope("chat.completion.chunk", [])
            yield chunk | {"usage": self._counter.usage()}

    def _first_chunk(self, index: int, output: RequestOutput) -> dict[str, Any]:
        chunk = self._chunk(
            {
                "index": index,
                "delta": {"role": self._role, "content": self._echo},
                "logprobs": None,
                "finish_reason": None,
            }
        )
        if self._request.return_token_ids:
            chunk["prompt_token_ids"] = output.prompt_token_ids
        return chunk

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", [choice]) | self._usage.fields()

    def _rest(self, completion: CompletionOutput) -> dict[str, Any]:
        """Of a choice, beside its text."""
        logprobs = None
        if completion.logprobs:
            num_top = self._request.top_logprobs or 0
            logprobs = chat_logprobs(completion.logprobs, num_top, self._names)
        rest = {
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **rank_fields(completion),
        }
        if self._request.return_token_ids:
            rest["token_ids"] = completion.token_ids
        return rest

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": kind,
            "created": self._call.created,
            "model": self._model,
            "choices": choices,
        }
