"""Log probabilities in OpenAI's two shapes, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastpage.outputs import Logprob, PositionLogprobs
from fastpage.tokenizer import Tokenizer

_NO_CHARACTER = "\ufffd"  # in the text of a token that is a part of one


class TokenNames:
    """How tokens are written: their text, or "token_id:17" for those who asked for that."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self._as_ids else text

    def text(self, token_id: int, entry: Logprob | None) -> str:
        if entry is None or entry.decoded_token is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        return entry.decoded_token


class CompletionLogprobs:
    """Of one choice of /v1/completions: its text_offset goes on from one delta to the next."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def take(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> dict[str, list[Any]]:
        """A position is None for the prompt's first token, which nothing precedes."""
        tokens, token_logprobs, top_logprobs, offsets = [], [], [], []
        for token_id, position in zip(token_ids, positions, strict=True):
            entry = None if position is None else position[token_id]
            text = self._names.text(token_id, entry)
            tokens.append(self._names.name(token_id, text))
            offsets.append(self._offset)
            self._offset += len(text)
            token_logprobs.append(None if entry is None else _finite(entry.logprob))
            top_logprobs.append(None if position is None else self._top(position))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, entry in position.items():
            name = self._names.name(token_id, self._names.text(token_id, entry))
            top.setdefault(name, _finite(entry.logprob))  # parts of characters look alike
        return top


def chat_logprobs(
    positions: Iterable[PositionLogprobs], num_top: int, names: TokenNames
) -> dict[str, Any]:
    return {"content": [_chat_position(position, num_top, names) for position in positions]}


def _chat_position(position: PositionLogprobs, num_top: int, names: TokenNames) -> dict[str, Any]:
    chosen = next(iter(position.items()))
    likeliest = sorted(position.items(), key=lambda item: -item[1].logprob)[:num_top]
    return {
        **_chat_token(*chosen, names),
        "top_logprobs": [_chat_token(*item, names) for item in likeliest],
    }


def _chat_token(token_id: int, entry: Logprob, names: TokenNames) -> dict[str, Any]:
    text = names.text(token_id, entry)
    return {
        "token": names.name(token_id, text),
        "logprob": _finite(entry.logprob),
        "bytes": None if _NO_CHARACTER in text else list(text.encode()),
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what vLLM writes for it."""
    return max(logprob, -9999.0)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[Any]:
    """vLLM's shape."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]
