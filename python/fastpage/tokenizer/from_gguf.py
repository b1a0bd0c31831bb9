"""A tokenizer from the metadata of a GGUF file.

The keys `tokenizer.ggml.*` hold the vocabulary, and name the rules for cutting text into words
(`pre`) instead of spelling them out: they are repeated here, as in the models' tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fastpage.errors import CheckpointError
from fastpage.tokenizer.tokenizer import Tokenizer, surround_texts, tokenizers_errors

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    return _Builder(metadata, source).build()


class _Builder:
    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source
        tokens = self._get("tokens", list)
        if not tokens:
            raise self._error("is missing", "tokens")
        self._tokens: list[str] = tokens
        types = self._numbers("token_type")
        self._types: list[int] = [_NORMAL] * len(tokens) if types is None else types.tolist()

    def build(self) -> Tokenizer:
        kind = self._get("model", str)
        if kind == "gpt2":
            backend = self._byte_level()
        elif kind == "llama":
            backend = self._sentencepiece()
        else:
            raise self._error(f"is {kind!r:.40}; 'gpt2' and 'llama' are supported", "model")
        self._add_tokens(backend)
        adds_bos = kind == "llama" or self._get("pre", str) in _LLAMA3_NAMES
        bos, eos = self._token("bos_token_id"), self._token("eos_token_id")
        surround_texts(
            backend,
            bos if self._flag("add_bos_token", adds_bos) else None,
            eos if self._flag("add_eos_token", False) else None,
        )
        ends = (self._token(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
        return Tokenizer(
            backend,
            bos_token_id=bos[1] if bos else None,
            eos_token_ids=[end[1] for end in ends if end],
            special_tokens=self._named_tokens(),
            chat_templates=self._chat_templates(),
        )

    # ------------------------------------------------------------ kinds of vocabulary

    def _byte_level(self) -> tokenizers.Tokenizer:
        pre = self._get("pre", str) or "default"
        prepare = _PRE_TOKENIZERS.get(pre)
        if prepare is None:
            raise self._error(f"is {pre!r:.40}, which is not known", "pre")
        merges = self._get("merges", list)
        if merges is None:
            raise self._error("is missing", "merges")
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        if any(" " in right or not right for _, right in pairs):
            raise self._error("holds a line that is not two tokens", "merges")
        backend = self._bpe(pairs, ignore_merges=pre in _WHOLE_WORDS_FIRST)
        backend.decoder = decoders.ByteLevel()
        prepare(backend)
        return backend

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        unknown = self._token("unknown_token_id")
        backend = self._bpe(
            self._pairs_by_score(),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown[0] if unknown else None,
        )
        add_space = self._flag("add_space_prefix", True)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if add_space else "never", split=False
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if add_space:
            steps.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(steps)
        return backend

    def _bpe(self, merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
        vocab = {token: token_id for token_id, token in enumerate(self._tokens)}
        with tokenizers_errors(
            lambda reason: self._error(f"does not fit the tokens: {reason}", "merges")
        ):
            return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))

    def _pairs_by_score(self) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose result scores highest: BPE merges in that order."""
        scores = self._numbers("scores")
        if scores is None:
            raise self._error("is missing", "scores")
        known = set(self._tokens)
        pairs = []
        for token_id in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
            token = self._tokens[token_id]
            if self._types[token_id] == _NORMAL:
                cuts = ((token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1))
                pairs += [pair for pair in cuts if pair[0] in known and pair[1] in known]
        return pairs

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """The tokens that are recognised in text as a whole."""
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
                for token, kind in zip(self._tokens, self._types, strict=True)
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
            ]
        )

    # ------------------------------------------------------------ metadata

    def _chat_templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        templates = {
            key.removeprefix(prefix).removeprefix(".") or "default": value
            for key, value in self._metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
        }
        return templates

    def _named_tokens(self) -> dict[str, str]:
        keys = {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }
        tokens = {name: self._token(key) for name, key in keys.items()}
        return {name: token[0] for name, token in tokens.items() if token}

    def _token(self, key: str) -> tuple[str, int] | None:
        """The token that a key names, as (text, id)."""
        token_id = self._get(key, int)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self._tokens):
            raise self._error(f"is {token_id}, there are {len(self._tokens)} tokens", key)
        return self._tokens[token_id], token_id

    def _flag(self, key: str, default: bool) -> bool:
        value = self._get(key, bool)
        return default if value is None else value

    def _numbers(self, key: str) -> np.ndarray | None:
        """One number for each token."""
        array: np.ndarray | None = self._get(key, np.ndarray)
        if array is not None and len(array) != len(self._tokens):
            raise self._error(f"has {len(array)} items for {len(self._tokens)} tokens", key)
        return array

    def _get(self, key: str, kind: type) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not kind:
            raise self._error(f"is a {type(value).__name__}, not a {kind.__name__}", key)
        return value

    def _error(self, fault: str, key: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: metadata key 'tokenizer.ggml.{key}' {fault}")


# ---------------------------------------------------------------- how text is cut into words


def _gpt2_words(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _gpt2_words_and_digits(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _split_by(pattern: str, nfc: bool = False) -> Callable[[tokenizers.Tokenizer], None]:
    def prepare(backend: tokenizers.Tokenizer) -> None:
        if nfc:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return prepare


_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
_WHOLE_WORDS_FIRST = (*_LLAMA3_NAMES, "tekken")  # a word in the vocabulary is not taken apart
_PRE_TOKENIZERS: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais"), _gpt2_words),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
        _gpt2_words_and_digits,
    ),
    **dict.fromkeys((*_LLAMA3_NAMES, "dbrx", "smaug-bpe"), _split_by(_LLAMA3)),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _split_by(_QWEN2)),
    "qwen2": _split_by(_QWEN2, nfc=True),
    "tekken": _split_by(_TEKKEN),
}
