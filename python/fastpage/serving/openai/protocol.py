"""The requests, field by field.

None means that a field was left out, or null. What nobody knows is refused, as OpenAI does: a
misspelt parameter that does nothing is worse than an error. Fields of OpenAI's that cannot be
honoured are refused by name, unless they ask for what happens anyhow; those that change no answer
(user, metadata, ...) are taken.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from fastpage.errors import InvalidArgument
from fastpage.sampling_params import SamplingParams
from fastpage.serving.openai.errors import ApiError, invalid, unsupported

RequestT = TypeVar("RequestT", bound=msgspec.Struct)

# More would be one client's way to fill the queue.
MAX_PROMPTS = 2048

_STRUCTURED = "there is no structured output yet"
_TOOLS = "there are no tool calls yet; tool_choice 'none' takes tools, for the chat template"


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the three endpoints that generate have in common; see SamplingParams."""

    model: str | None = None
    stream: bool | None = None

    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None

    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None


class OpenAIRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's fields beside those, and vLLM's."""

    stream_options: StreamOptions | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # Taken, and without effect on the answer.
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    # Taken where they ask for what happens anyhow.
    response_format: ResponseFormat | None = None
    service_tier: Any = None
    store: Any = None


class CompletionRequest(OpenAIRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    suffix: Any = None


class ChatCompletionRequest(OpenAIRequest, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    parallel_tool_calls: Any = None  # says something only about tool calls
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class PlainRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Of POST /generate."""

    prompt: str | list[int] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either a prompt, or messages and what goes with them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = None


# ---------------------------------------------------------------- from bytes


class RequestDecoder:
    """Of one type; raises ApiError (400) naming the field."""

    def __init__(self, request_type: type[RequestT]) -> None:
        self.fields = request_type.__struct_fields__
        self._decoder = msgspec.json.Decoder(request_type)

    def decode(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _explained(str(error)) from None
        except msgspec.DecodeError as error:
            raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
        except UnicodeDecodeError:
            raise invalid("the body is not UTF-8", code="invalid_json") from None
        except RecursionError:
            raise invalid("the body is nested too deeply", code="invalid_json") from None


def _explained(message: str) -> ApiError:
    """From msgspec's "Expected `int`, got `str` - at `$.max_tokens`"."""
    what, _, where = message.partition(" - at ")
    path = where.strip("`").removeprefix("$").removeprefix(".")
    if match := re.search(r"unknown field `(.*)`", what):
        name = match[1]
        if name in _NOT_YET and not path:
            return unsupported(name, _NOT_YET[name])
        field = f"{path}.{name}" if path else name
        return invalid(f"unknown field {field!r:.200}", f"{field:.200}", "unknown_parameter")
    if match := re.search(r"required field `(.*)`", what):
        return invalid(f"{match[1]} is missing", match[1], "missing_required_parameter")
    what = what[0].lower() + what[1:].replace("`", "")
    field = re.match(r"\w*", path)[0]  # type: ignore[index]
    return invalid(f"{path or 'body'}: {what}", field or None, "invalid_type")


# ---------------------------------------------------------------- what cannot be served

# Of others' servers.
_NOT_YET = {
    **dict.fromkeys(
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "structured_outputs",
            "structural_tag",
        ),
        _STRUCTURED,
    ),
    "chat_template": "a template is a program; the model's own is used, see chat_template_kwargs",
    "prompt_embeds": "send text or token ids",
    "logits_processors": "they are programs",
    "mm_processor_kwargs": "there is text only",
    "lora_request": "there are no adapters yet",
}


class _Refusal(NamedTuple):
    harmless: tuple[Any, ...]  # beside null: what asks for nothing
    why: str


_REFUSED = {
    "suffix": _Refusal(("",), "nothing can be inserted"),
    "service_tier": _Refusal(("auto", "default"), "there is one tier"),
    "store": _Refusal((False,), "nothing is stored"),
    "functions": _Refusal(([],), _TOOLS),
    "function_call": _Refusal(("none",), _TOOLS),
    "audio": _Refusal((), "there is text only"),
    "modalities": _Refusal(([], ["text"]), "there is text only"),
    "prediction": _Refusal((), "there are no predicted outputs"),
    "reasoning_effort": _Refusal((), "give the chat template's own names in chat_template_kwargs"),
    "verbosity": _Refusal((), "ask for it in the messages"),
    "web_search_options": _Refusal((), "there is no web search"),
}


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises ApiError naming the first field that asks for what there is not."""
    for name, refusal in _REFUSED.items():
        value = getattr(request, name, None)
        if value is not None and value not in refusal.harmless:
            raise unsupported(name, refusal.why)
    if not isinstance(request, OpenAIRequest):
        return
    form = request.response_format
    if form is not None and form.type != "text":
        raise unsupported("response_format", _STRUCTURED)
    if isinstance(request, ChatCompletionRequest):
        wants_calls = request.tool_choice not in (None, "none")
        if wants_calls or (request.tools and request.tool_choice is None):
            raise unsupported("tools" if request.tool_choice is None else "tool_choice", _TOOLS)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options goes with stream=true only", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("prompt_logprobs does not go with stream=true", "prompt_logprobs")


# ---------------------------------------------------------------- sampling parameters

_SAME_NAME = [
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in GenerationRequest.__struct_fields__
]


def to_sampling_params(
    request: GenerationRequest, defaults: SamplingParams, **changes: Any
) -> SamplingParams:
    """`defaults`, changed by what the request sets, and then by `changes`."""
    given = {
        name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None
    } | changes
    if request.use_beam_search:
        given.setdefault("beam_width", given.get("n", 1))
    elif request.use_beam_search is False and request.beam_width:
        raise InvalidArgument("beam_width needs use_beam_search not to be false")
    if given.get("beam_width"):
        # What the model's makers recommend for drawing tokens has no meaning there.
        defaults = SamplingParams()
    return dataclasses.replace(defaults, **given)
