"""A tokenizer from tokenizer.json and the files that Hugging Face keeps beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from fastpage.checkpoints.safetensors import read_json
from fastpage.errors import CheckpointError
from fastpage.tokenizer.tokenizer import Tokenizer, tokenizers_errors

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def build_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path}: no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    with tokenizers_errors(lambda reason: CheckpointError(f"{file}: not a tokenizer: {reason}")):
        backend = tokenizers.Tokenizer.from_file(str(file))
    config = _read_optional(path / "tokenizer_config.json")
    _add_missing_tokens(backend, config)
    named = _named_tokens(_read_optional(path / "special_tokens_map.json") | config)
    bos, eos = _token(backend, named, "bos_token"), _token(backend, named, "eos_token")
    # The config's add_bos_token and add_eos_token count for nothing, as in transformers: what
    # tokenizer.json itself puts around a text does.
    return Tokenizer(
        backend,
        bos_token_id=bos[1] if bos else None,
        eos_token_ids=[*_generation_eos_token_ids(path), *([eos[1]] if eos else [])],
        special_tokens=named,
        chat_templates=_chat_templates(path, config),
    )


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows, as older files have them."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    missing = [
        tokenizers.AddedToken(
            token["content"],
            single_word=bool(token.get("single_word")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
            normalized=bool(token.get("normalized")),
            special=bool(token.get("special")),
        )
        for _, token in sorted(declared.items(), key=lambda item: _as_int(item[0]))
        if isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and backend.token_to_id(token["content"]) is None
    ]
    if missing:
        backend.add_tokens(missing)


def _as_int(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _named_tokens(fields: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: each a string, or a dict that holds it as "content"."""
    texts = {}
    for name in _NAMED_TOKENS:
        value = fields.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _token(
    backend: tokenizers.Tokenizer, named: dict[str, str], name: str
) -> tuple[str, int] | None:
    """A named token that is in the vocabulary, as (text, id)."""
    token_id = backend.token_to_id(named[name]) if name in named else None
    return None if token_id is None else (named[name], token_id)


def _generation_eos_token_ids(path: Path) -> list[int]:
    """What generation_config.json says, or where it is silent config.json."""
    for file in ("generation_config.json", "config.json"):
        value = _read_optional(path / file).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise CheckpointError(f"{path / file}: eos_token_id is {value!r:.40}")
            return ids
    return []


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files, if there are any, or else what tokenizer_config.json has."""
    files = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    if files:
        return {name: _read_template(file) for name, file in files.items()}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        return {"default": declared}
    return {
        entry["name"]: entry["template"]
        for entry in (declared if isinstance(declared, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
