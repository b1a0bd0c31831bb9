"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from fastpage.engine.prompts import Prompt, to_prompt
from fastpage.errors import InvalidArgument
from fastpage.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.serving.openai.errors import invalid
from fastpage.serving.openai.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import MAX_PROMPTS, CompletionRequest, to_sampling_params
from fastpage.serving.openai.reply import Call, Dialect, News, StreamUsage, UsageCounter
from fastpage.serving.openai.understanding import text_prompt

_DEFAULT_MAX_TOKENS = 16


class Completions(Dialect):
    id_prefix = "cmpl"
    renamed: ClassVar = {"prompt_token_ids": "prompt"}

    def __init__(self) -> None:
        super().__init__(CompletionRequest)

    def params(self, request: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
        changes: dict[str, Any] = {}
        if request.max_tokens is None:
            changes["max_tokens"] = _DEFAULT_MAX_TOKENS
        elif request.max_tokens == 0 and request.echo:
            changes["max_tokens"] = 1  # which the reply leaves out
        if request.logprobs is not None:
            changes["logprobs"] = request.logprobs
            if request.echo and request.prompt_logprobs is None:
                changes["prompt_logprobs"] = request.logprobs
        return to_sampling_params(request, defaults, **changes)

    def prompts(self, request: CompletionRequest, model: Model) -> list[Prompt]:
        prompt = request.prompt
        if prompt is None:
            raise invalid("prompt is missing", "prompt", "missing_required_parameter")
        if isinstance(prompt, str):
            return [text_prompt(prompt, request, model)]
        if not prompt:
            raise invalid("prompt is an empty list", "prompt")
        if all(type(item) is int for item in prompt):
            return [_ids_prompt(prompt, request, model)]
        if len(prompt) > MAX_PROMPTS:
            raise invalid(f"prompt has {len(prompt)} prompts: at most {MAX_PROMPTS}", "prompt")
        return _many_prompts(prompt, request, model)

    def reply(self, call: Call) -> CompletionReply:
        return CompletionReply(call)


def _many_prompts(items: Sequence[Any], request: CompletionRequest, model: Model) -> list[Prompt]:
    prompts = []
    for i, item in enumerate(items):
        if isinstance(item, int):
            raise invalid(f"prompt[{i}] is a token id among texts or lists", "prompt")
        try:
            if isinstance(item, str):
                prompts.append(text_prompt(item, request, model))
            else:
                prompts.append(_ids_prompt(item, request, model))
        except InvalidArgument as error:
            raise InvalidArgument(f"prompt[{i}]: {error}") from None
    return prompts


def _ids_prompt(token_ids: Any, request: CompletionRequest, model: Model) -> Prompt:
    info = model.info
    if len(token_ids) >= info.max_model_len and request.truncate_prompt_tokens is None:
        raise invalid(
            f"prompt {len(token_ids)} tokens + 1 > max_model_len {info.max_model_len}",
            "prompt",
            "context_length_exceeded",
        )
    prompt = {"prompt_token_ids": token_ids, "cache_salt": request.cache_salt or ""}
    return to_prompt(prompt, model.tokenizer, info.vocab_size)  # type: ignore[arg-type]


class _Echo:
    """The prompt, which goes before each of its choices."""

    def __init__(self) -> None:
        self.logprobs: list[PositionLogprobs | None] = []

    def take(self, output: RequestOutput) -> None:
        self.logprobs += output.prompt_logprobs or ()


class CompletionReply:
    def __init__(self, call: Call) -> None:
        self._call = call
        self._request: CompletionRequest = call.request
        self._n = call.params.n
        self._names = TokenNames(
            call.model.tokenizer, bool(self._request.return_tokens_as_token_ids)
        )
        self._discard_output = bool(self._request.echo) and self._request.max_tokens == 0
        self._counter = UsageCounter(self._discard_output)
        self._usage = StreamUsage(call, self._counter)
        self._echoes = [_Echo() for _ in call.prompts] if self._request.echo else []
        # Of choices that have begun, by their index among all.
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for i, output in enumerate(outputs):
            self._counter.take(i, output)
            if self._echoes:
                self._echoes[i].take(output)
            for completion in output.outputs:
                choice = self._choice(i, output, completion)
                if self._request.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
                choices.append(choice)
        return self._envelope(choices) | {"usage": self._counter.usage()}

    def chunks(self, news: Sequence[News]) -> Iterator[dict[str, Any]]:
        for i, output in news:
            self._counter.take(i, output)
            if self._echoes:
                self._echoes[i].take(output)
            for completion in output.outputs:
                choice = self._choice(i, output, completion)
                if _says_something(choice):
                    yield self._envelope([choice]) | self._usage.fields()

    def last_chunks(self) -> Iterable[dict[str, Any]]:
        if self._usage.at_end:
            yield self._envelope([]) | {"usage": self._counter.usage()}

    def _choice(
        self, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        index = prompt_index * self._n + completion.index
        first = index not in self._logprobs
        if first:
            self._logprobs[index] = CompletionLogprobs(self._names)
        text, token_ids = completion.text, completion.token_ids
        positions: list[PositionLogprobs | None] = [*(completion.logprobs or ())]
        if self._discard_output:
            text, token_ids, positions = "", [], []
        if first and self._echoes:
            text = self._prompt_text(prompt_index, output) + text
            if self._request.logprobs is not None:
                token_ids = output.prompt_token_ids + token_ids
                positions = self._echoes[prompt_index].logprobs + positions
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": "length" if self._discard_output else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._request.logprobs is not None:
            choice["logprobs"] = self._logprobs[index].take(token_ids, positions)
        if self._request.return_token_ids:
            choice["token_ids"] = completion.token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice | rank_fields(completion)

    def _prompt_text(self, prompt_index: int, output: RequestOutput) -> str:
        prompt = self._call.prompts[prompt_index]
        if prompt.text is not None and len(prompt.token_ids) == len(output.prompt_token_ids):
            return prompt.text
        skip = self._call.params.skip_special_tokens
        return self._call.model.tokenizer.decode(output.prompt_token_ids, skip)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": "text_completion",
            "created": self._call.created,
            "model": self._call.model.info.served_model_name,
            "choices": choices,
        }


def rank_fields(completion: CompletionOutput) -> dict[str, Any]:
    """What best_of and beam search compare by; nothing of other outputs."""
    if completion.score is not None:
        return {"score": completion.score, "cumulative_logprob": completion.cumulative_logprob}
    return {}


def _says_something(choice: dict[str, Any]) -> bool:
    """False for tokens whose text is held back, as it may yet become part of a stop string."""
    logprobs = choice["logprobs"]
    return bool(
        choice["text"]
        or choice["finish_reason"] is not None
        or (logprobs and logprobs["tokens"])
        or choice.get("token_ids")
    )
