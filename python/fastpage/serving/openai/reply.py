"""What the endpoints that generate have in common: from a request to prompts and parameters, and
from the engine's outputs to what is sent."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import msgspec

from fastpage.engine.prompts import Prompt
from fastpage.outputs import RequestOutput
from fastpage.sampling_params import SamplingParams
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import RequestDecoder, refuse_unsupported
from fastpage.serving.openai.understanding import check_model, make_id


@dataclass(frozen=True)
class Call:
    """A request that has been understood."""

    id: str
    request: Any  # of protocol.py
    prompts: list[Prompt]
    params: SamplingParams
    model: Model
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def stream(self) -> bool:
        return bool(self.request.stream)


# An output, and the index of the prompt that it belongs to.
News = tuple[int, RequestOutput]


class Reply(Protocol):
    """The answer to one call, either whole or in parts: values that JSON can hold."""

    def whole(self, outputs: Sequence[RequestOutput]) -> Any:
        """`outputs`: one for each prompt, complete."""

    def chunks(self, news: Sequence[News]) -> Iterable[Any]:
        """`news`: deltas (see RequestOutputKind) of some of the prompts."""

    def last_chunks(self) -> Iterable[Any]:
        """After the end of all."""


class Dialect(ABC):
    """One endpoint: the words of its requests and of its answers. The parts of a streamed answer
    are server-sent events."""

    id_prefix: ClassVar[str]  # of the answers' ids
    renamed: ClassVar[Mapping[str, str]] = {}  # the engine's names of fields -> the request's
    prompt_field = "prompt"
    media_type = b"text/event-stream; charset=utf-8"
    end = b"data: [DONE]\n\n"

    def __init__(self, request_type: type[msgspec.Struct]) -> None:
        self.decoder = RequestDecoder(request_type)

    @property
    def fields(self) -> Collection[str]:
        return self.decoder.fields

    def understand(self, body: bytes, model: Model, request_id: str | None) -> Call:
        """Raises ApiError or InvalidArgument. Long prompts take long: not for the event loop."""
        request = self.decoder.decode(body)
        check_model(request.model, model)
        refuse_unsupported(request)
        params = self.params(request, model.defaults)
        return Call(
            id=make_id(self.id_prefix, request.request_id, request_id),
            request=request,
            prompts=self.prompts(request, model),
            params=params,
            model=model,
        )

    @abstractmethod
    def params(self, request: Any, defaults: SamplingParams) -> SamplingParams: ...

    @abstractmethod
    def prompts(self, request: Any, model: Model) -> list[Prompt]: ...

    @abstractmethod
    def reply(self, call: Call) -> Reply: ...

    def frame(self, part: bytes) -> bytes:
        return b"data: %b\n\n" % part


class UsageCounter:
    """OpenAI's `usage`, of all prompts of a call."""

    def __init__(self, discard_output: bool = False) -> None:
        self._discard_output = discard_output
        self._counts: dict[int, tuple[int, int, int]] = {}

    def take(self, prompt_index: int, output: RequestOutput) -> None:
        self._counts[prompt_index] = (
            len(output.prompt_token_ids),
            0 if self._discard_output else output.num_output_tokens,
            output.num_cached_tokens,
        )

    def usage(self) -> dict[str, Any]:
        counts = zip(*self._counts.values(), strict=True)
        prompt, completion, cached = (sum(count) for count in counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class StreamUsage:
    """The `usage` of chunks, as stream_options ask for it."""

    def __init__(self, call: Call, counter: UsageCounter) -> None:
        options = call.request.stream_options
        self.at_end = bool(options and options.include_usage)
        self.always = self.at_end and bool(options.continuous_usage_stats)
        self._counter = counter

    def fields(self) -> dict[str, Any]:
        """Of a chunk with choices."""
        if self.always:
            return {"usage": self._counter.usage()}
        return {"usage": None} if self.at_end else {}
