"""POST /generate: a prompt and sampling parameters, and back come texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from fastpage.engine.prompts import to_prompt
from fastpage.outputs import CompletionOutput, RequestOutput
from fastpage.serving.openai.errors import invalid
from fastpage.serving.openai.protocol import (
    PlainRequest,
    refuse_unsupported,
    to_sampling_params,
)
from fastpage.serving.openai.reply import Call, Dialect, Model, News
from fastpage.serving.openai.understanding import check_model, make_id, text_prompt


class Plain(Dialect):
    renamed: ClassVar = {"prompt_token_ids": "prompt"}
    media_type = b"application/x-ndjson"
    end = b""

    def __init__(self) -> None:
        super().__init__(PlainRequest)

    def understand(self, body: bytes, model: Model, request_id: str | None) -> Call:
        request: PlainRequest = self.decoder.decode(body)
        check_model(request.model, model)
        refuse_unsupported(request)
        if request.prompt is None:
            raise invalid("prompt is missing", "prompt", "missing_required_parameter")
        params = to_sampling_params(request, model.defaults)
        if isinstance(request.prompt, str):
            prompt = text_prompt(request.prompt, request, model)
        else:
            given: Any = {
                "prompt_token_ids": request.prompt,
                "cache_salt": request.cache_salt or "",
            }
            prompt = to_prompt(given, model.tokenizer, model.info.vocab_size)
        return Call(
            id=make_id("gen", request.request_id, request_id),
            request=request,
            prompts=[prompt],
            params=params,
            model=model,
        )

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
