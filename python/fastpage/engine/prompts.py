"""Prompts as people write them, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return Prompt(text, checked_token_ids(token_ids, vocab_size), cache_salt)
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


def checked_token_ids(
    token_ids: Any, vocab_size: int, field: str = "prompt_token_ids"
) -> list[int]:
    """Raises InvalidArgument, naming the `field`, for what is no list of ids of the vocabulary."""
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, list | tuple):
        raise InvalidArgument(f"{field} is a {type(token_ids).__name__}, not a list of token ids")
    if not token_ids:
        raise InvalidArgument(f"{field} is empty")
    # There may be a million of them: as a rule all are right, and only who is wrong is looked for.
    if set(map(type, token_ids)) == {int} and 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        return list(token_ids)
    position, token_id = next(
        (position, token_id)
        for position, token_id in enumerate(token_ids)
        if type(token_id) is not int or not 0 <= token_id < vocab_size
    )
    raise InvalidArgument(
        f"{field}[{position}]={token_id!r} is not a token id of this model (0 to {vocab_size - 1})"
    )


Message = dict[str, Any]  # {"role": ..., "content": ...}

# Put behind the last message's content to see where it is in the text. (Of the code points that
# mean nothing.)
_HERE = "\ue000\uf8ffhere\uf8ff\ue000"


def chat_text(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation through the model's chat template: up to where the assistant's next answer
    begins, or (`continue_final_message`) to the end of the last message's content.
    `template_kwargs` are more variables for the template."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidArgument("messages is empty, or not a list")
    if add_generation_prompt and continue_final_message:
        raise InvalidArgument("add_generation_prompt does not go with continue_final_message")
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    kwargs = dict(template_kwargs or {})
    if taken := {"self", "messages", "tools", "add_generation_prompt"} & set(kwargs):
        raise InvalidArgument(f"template_kwargs must not have {min(taken)!r}")
    if continue_final_message:
        messages = [*messages[:-1], _with_mark(messages[-1])]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt, tools, **kwargs)
    except InvalidArgument as error:
        raise InvalidArgument(f"messages: {error}") from None
    if not continue_final_message:
        return text
    before, mark, _ = text.rpartition(_HERE)
    if not mark:
        raise InvalidArgument(
            "continue_final_message: the chat template leaves out the last message's content"
        )
    return before


def _with_mark(message: Message) -> Message:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return {**message, "content": content + _HERE}
    last = content[-1] if isinstance(content, list) and content else None
    if (
        isinstance(content, list)
        and isinstance(last, Mapping)
        and isinstance(last.get("text"), str)
    ):
        return {**message, "content": [*content[:-1], {**last, "text": last["text"] + _HERE}]}
    raise InvalidArgument("continue_final_message: the last message has no text to go on with")


def chat_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    cache_salt: str = "",
    *,
    add_special_tokens: bool = False,
    **options: Any,
) -> Prompt:
    """`options` are those of chat_text(). Templates write the special tokens themselves: few need
    `add_special_tokens`, those that the tokenizer puts around a text."""
    text = chat_text(messages, tokenizer, **options)
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not token_ids:
        raise InvalidArgument("messages: the chat template makes an empty prompt of them")
    return Prompt(text, token_ids, cache_salt)
