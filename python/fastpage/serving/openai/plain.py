"""POST /generate: a prompt and sampling parameters, and back come texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from fastpage.engine.prompts import Prompt, to_prompt
from fastpage.outputs import CompletionOutput, RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.serving.openai.errors import invalid
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import PlainRequest, to_sampling_params
from fastpage.serving.openai.reply import Call, Dialect, News
from fastpage.serving.openai.understanding import text_prompt


class Plain(Dialect):
    id_prefix = "gen"
    renamed: ClassVar = {"prompt_token_ids": "prompt"}
    media_type = b"application/x-ndjson"
    end = b""

    def __init__(self) -> None:
        super().__init__(PlainRequest)

    def params(self, request: PlainRequest, defaults: SamplingParams) -> SamplingParams:
        return to_sampling_params(request, defaults)

    def prompts(self, request: PlainRequest, model: Model) -> list[Prompt]:
        prompt = request.prompt
        if prompt is None:
            raise invalid("prompt is missing", "prompt", "missing_required_parameter")
        if isinstance(prompt, str):
            return [text_prompt(prompt, request, model)]
        given: Any = {"prompt_token_ids": prompt, "cache_salt": request.cache_salt or ""}
        return [to_prompt(given, model.tokenizer, model.info.vocab_size)]

    def reply(self, call: Call) -> PlainReply:
        return PlainReply(call)

    def frame(self, part: bytes) -> bytes:
        return part + b"\n"


class PlainReply:
    """{"text": [...], "finish_reason": [...]}, by index; of a stream each line has all so far."""

    def __init__(self, call: Call) -> None:
        (prompt,) = call.prompts
        text = prompt.text
        if text is None:
            text = call.model.tokenizer.decode(prompt.token_ids)
        self._texts = [text] * call.params.n
        self._finish_reasons: list[str | None] = [None] * call.params.n

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        return self._taken(output.outputs)

    def chunks(self, news: Sequence[News]) -> Iterator[dict[str, Any]]:
        for _, output in news:
            if output.outputs:
                yield self._taken(output.outputs)

    def last_chunks(self) -> Iterable[dict[str, Any]]:
        return ()

    def _taken(self, completions: Sequence[CompletionOutput]) -> dict[str, Any]:
        for completion in completions:
            self._texts[completion.index] += completion.text
            self._finish_reasons[completion.index] = completion.finish_reason
        return {"text": self._texts, "finish_reason": self._finish_reasons}
