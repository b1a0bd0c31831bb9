"""How the tokens of one request are chosen and when it ends, under vLLM's names and defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastpage import _C
from fastpage.errors import InvalidArgument

_MOST_STOP_STRINGS = 1024
# In all of them: what they are looked for with is made of each.
_MOST_STOP_CHARS = 4096
_MOST_BAD_WORDS = 16384
# Token ids are compared with the vocabulary once a model is known, by the engine.
_ANY_VOCABULARY = 2**31 - 1


class Encoder(Protocol):
    """The part of a tokenizer that bad_words need."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass
class SamplingParams:
    """Sampling parameters of one request; wrong values are a ValueError that names the field.

    Args:
        n: Outputs for the same prompt, 1 to 1024.
        best_of: Draw that many, n to 1024, and return the n most likely, the likeliest first (by
            the sum of their tokens' log probabilities). Stop strings are refused then. None: n.
        presence_penalty: Taken off the logit of every token in the output so far, [-2, 2].
        frequency_penalty: The same for each time that it occurs there, [-2, 2].
        repetition_penalty: Divides (or, if negative, multiplies) the logit of every token in the
            prompt and the output so far, > 0.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the most likely tokens that together have this probability, (0, 1].
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        min_p: Keep tokens at least this probable relative to the most likely one, [0, 1].
        seed: The same seed gives the same tokens, whatever else is in the batch. None (or -1):
            the engine picks one.
        stop: Strings that end the output, 1024 at most, of 4096 characters together.
        stop_token_ids: Token ids that end the output, beside EOS.
        bad_words: Words that must not be generated, 16384 at most: the last token of one is
            forbidden when the output ends with those before it.
        ignore_eos: Go on after EOS.
        max_tokens: Output tokens at most; None is as many as the model's context holds.
        min_tokens: No EOS nor stop token before that many output tokens.
        logprobs: Return log probabilities: of the chosen token (0) and of the k most likely ones.
        prompt_logprobs: The same for the prompt's tokens.
        detokenize: Return text; without it there are token ids only, and no stop strings.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between those that are kept.
        include_stop_str_in_output: Keep the stop string or stop token in the text.
        logit_bias: Added to the logits of these token ids.
        allowed_token_ids: Only these tokens may be generated.
        truncate_prompt_tokens: Use the last that many prompt tokens; -1: what the context holds.
        beam_width: Beam search, as transformers' `num_beams`: keep that many beams, n to 64, and
            return the n with the best score. Nothing is drawn then, and nothing may change the
            model's probabilities: penalties, biases, top_k, ..., and logprobs and stop strings, are
            refused. None: no beam search.
        length_penalty: Of beam search: a beam's score is the sum of its tokens' log probabilities
            divided by their number to this power.
        early_stopping: Of beam search: when it looks no further, once beam_width beams have ended.
            True: at once. False: when the best one that goes on scores no better now than the worst
            of them. "never": when it could not, however long it grows.

    Raises:
        InvalidArgument: also a ValueError.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        self.stop = _strings("stop", self.stop, _MOST_STOP_STRINGS)
        if (num_chars := sum(map(len, self.stop))) > _MOST_STOP_CHARS:
            raise InvalidArgument(
                f"stop must have at most {_MOST_STOP_CHARS} characters in all, got {num_chars}"
            )
        self.bad_words = _strings("bad_words", self.bad_words, _MOST_BAD_WORDS)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise InvalidArgument("allowed_token_ids must not be empty")
        self.logit_bias = _logit_bias(self.logit_bias)
        if isinstance(self.seed, int) and self.seed == -1:
            self.seed = None
        self._check_text_options()
        self._build([]).validate(_ANY_VOCABULARY)

    def to_core(self, tokenizer: Encoder | None = None) -> _C.SamplingParams:
        """What the engine takes. `tokenizer` turns bad_words into tokens.

        Raises:
            InvalidArgument: if a field has been set to a wrong value since construction, or
                bad_words are given without a tokenizer.
        """
        params = self._build(_tokenize_words(self.bad_words or [], tokenizer))
        params.validate(_ANY_VOCABULARY)
        return params

    def _check_text_options(self) -> None:
        for name in (
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidArgument(f"{name} must be True or False, got {value!r}")
        if self.stop and not self.detokenize:
            raise InvalidArgument("stop strings need detokenize=True")
        if self.stop and self.beam_width:
            raise InvalidArgument(
                "stop does not go with beam search, which knows tokens only: use stop_token_ids"
            )
        if self.stop and self.best_of is not None and self.best_of > self.n:
            raise InvalidArgument(
                "stop does not go with best_of > n, which compares tokens only: use stop_token_ids"
            )
        limit = self.truncate_prompt_tokens
        if limit is not None and (not _is_int(limit) or (limit < 1 and limit != -1)):
            raise InvalidArgument(f"truncate_prompt_tokens must be >= 1 or -1, got {limit!r}")

    def _build(self, bad_words: list[list[int]]) -> _C.SamplingParams:
        try:
            return _C.SamplingParams(
                n=self.n,
                best_of=0 if self.best_of is None else self.best_of,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=self.logit_bias,
                allowed_token_ids=self.allowed_token_ids,
                bad_words=bad_words,
                max_tokens=_or_minus_one("max_tokens", self.max_tokens, ">= 1"),
                min_tokens=self.min_tokens,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
                seed=self.seed,
                logprobs=_num_logprobs("logprobs", self.logprobs),
                prompt_logprobs=_num_logprobs("prompt_logprobs", self.prompt_logprobs),
                beam_width=0 if self.beam_width is None else self.beam_width,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
            )
        except TypeError as error:
            raise InvalidArgument(str(error)) from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or_minus_one(field: str, value: int | None, rule: str) -> int:
    """The core writes None as -1, which is therefore no value of the user's."""
    if _is_int(value) and value == -1:
        raise InvalidArgument(f"{field} must be {rule}, got -1")
    return -1 if value is None else value


def _num_logprobs(field: str, value: int | None) -> int:
    if isinstance(value, bool):  # OpenAI's logprobs=True
        return 1 if value else -1
    return _or_minus_one(field, value, "between 0 and 1024")


def _strings(field: str, value: str | Iterable[str] | None, most: int) -> list[str]:
    if value is None:
        return []
    strings = [value] if isinstance(value, str) else list(_items(field, value, "strings"))
    for item in strings:
        if not isinstance(item, str):
            raise InvalidArgument(f"{field} must be a string or a list of strings, got {item!r}")
        if not item:
            raise InvalidArgument(f"{field} must not contain an empty string")
    unique = list(dict.fromkeys(strings))
    if len(unique) > most:
        raise InvalidArgument(f"{field} must have at most {most} strings, got {len(unique)}")
    return unique


def _token_ids(field: str, value: Iterable[int] | None) -> list[int]:
    return [] if value is None else list(dict.fromkeys(_items(field, value, "token ids")))


def _items(field: str, value: Any, what: str) -> Iterable[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidArgument(f"{field} must be a list of {what}, got {value!r}")
    return value


def _logit_bias(value: Any) -> dict[int, float] | None:
    """Keys may be strings: JSON has no others."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"logit_bias must be a dict, got {value!r}")
    result = {}
    for token, bias in value.items():
        try:
            result[int(token)] = bias
        except (TypeError, ValueError):
            raise InvalidArgument(f"logit_bias must map token ids, got {token!r}") from None
    return result


def _tokenize_words(words: list[str], tokenizer: Encoder | None) -> list[list[int]]:
    """Each word as at the beginning of a text, and as after a space where that is another token."""
    if not words:
        return []
    if tokenizer is None:
        raise InvalidArgument("bad_words need a tokenizer, and there is none")
    sequences: list[list[int]] = []
    for word in words:
        bare = list(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = list(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not bare:
            raise InvalidArgument(f"bad_words must have at least one token each, got {word!r}")
        sequences.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            sequences.append(spaced)
    return sequences
