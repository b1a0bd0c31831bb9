"""The tokenizer as files, for gateways that tokenize themselves."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

from smg_grpc_proto.generated import common_pb2 as common

from fastpage.tokenizer import Tokenizer

_CHUNK_BYTES = 64 << 10
# The gateway looks for a tokenizer under this path first, then on the Hub, and asks GetTokenizer
# only when it has found none. A path that is everywhere, with no tokenizer in it, makes it ask at
# once: it gets the very tokenizer that runs here.
NO_TOKENIZER_PATH = "/dev/null"


def build_archive(tokenizer: Tokenizer) -> bytes:
    """A zip of tokenizer.json and the two files of Hugging Face's that belong to it, written anew
    from `tokenizer`, wherever that came from."""
    files = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(_config(tokenizer), ensure_ascii=False),
        "generation_config.json": json.dumps({"eos_token_id": tokenizer.eos_token_ids}),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            # With a date of its own every archive would differ.
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def split(archive: bytes) -> Iterator[common.GetTokenizerChunk]:
    for start in range(0, len(archive), _CHUNK_BYTES):
        end = start + _CHUNK_BYTES
        yield common.GetTokenizerChunk(
            data=archive[start:end],
            sha256=hashlib.sha256(archive).hexdigest() if end >= len(archive) else "",
        )


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Without add_bos_token and add_eos_token: what tokenizer.json puts around a text holds."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config
