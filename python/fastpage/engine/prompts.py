"""Prompts as people write them, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from fastpage.errors import InvalidArgument
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer


class PromptDict(TypedDict, total=False):
    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


# A text, its token ids, or a dict with either.
PromptType = str | Sequence[int] | PromptDict


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


def to_prompt(prompt: PromptType, tokenizer: Tokenizer, vocab_size: int) -> Prompt:
    """Raises InvalidArgument for what is no prompt, an empty one, or ids out of the vocabulary."""
    text: Any = None
    token_ids: Any = None
    cache_salt: Any = ""
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, dict):
        unknown = set(prompt) - set(PromptDict.__annotations__)
        if unknown:
            raise InvalidArgument(
                f"prompt has unknown keys: {', '.join(sorted(map(str, unknown)))} "
                f"(known: {', '.join(PromptDict.__annotations__)})"
            )
        text = prompt.get("prompt")
        token_ids = prompt.get("prompt_token_ids")
        cache_salt = prompt.get("cache_salt") or ""
    else:
        token_ids = prompt

    if not isinstance(cache_salt, str):
        raise InvalidArgument(f"cache_salt is a {type(cache_salt).__name__}, not a string")
    if token_ids is not None:
        return Prompt(text, _checked_ids(token_ids, vocab_size), cache_salt)
    if not isinstance(text, str):
        raise InvalidArgument(
            f"prompt is a {type(prompt).__name__}: it must be a string, a list of token ids, or a "
            'dict with "prompt" or "prompt_token_ids"'
        )
    if not text:
        raise InvalidArgument("prompt is empty")
    token_ids = tokenizer.encode(text)
    if not token_ids:
        raise InvalidArgument("prompt has no tokens")
    return Prompt(text, token_ids, cache_salt)


def truncate(prompt: Prompt, params: SamplingParams, max_model_len: int) -> Prompt:
    """The end of the prompt, if params.truncate_prompt_tokens says so (-1: what leaves room for
    max_tokens)."""
    limit = params.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit == -1:
        limit = max(1, max_model_len - (params.max_tokens or 1))
    return replace(prompt, token_ids=prompt.token_ids[-limit:])


def _checked_ids(token_ids: Any, vocab_size: int) -> list[int]:
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, list | tuple):
        raise InvalidArgument(
            f"prompt_token_ids is a {type(token_ids).__name__}, not a list of token ids"
        )
    if not token_ids:
        raise InvalidArgument("prompt_token_ids is empty")
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidArgument(
                f"prompt_token_ids[{position}]={token_id!r} is not a token id of this model "
                f"(0 to {vocab_size - 1})"
            )
    return list(token_ids)


Message = dict[str, Any]  # {"role": ..., "content": ...}


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer, cache_salt: str = "") -> Prompt:
    """A conversation through the model's chat template, ready for the assistant's next answer."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidArgument("messages is empty, or not a list")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    # The template has written the special tokens already.
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise InvalidArgument("messages: the chat template makes an empty prompt of them")
    return Prompt(text, token_ids, cache_salt)
