"""What the endpoints ask of a request, whatever it is for."""

from __future__ import annotations

import re
import uuid
from typing import Any

from fastpage.engine.prompts import Prompt, to_prompt
from fastpage.errors import InvalidArgument
from fastpage.serving.openai.errors import invalid, model_not_found
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.protocol import GenerationRequest

_MAX_ID_CHARS = 128
_ID = re.compile(f"[!-~]{{1,{_MAX_ID_CHARS}}}")


def check_model(name: str | None, model: Model) -> None:
    served = model.info.served_model_name
    if name is not None and name != served:
        raise model_not_found(name, served)


def make_id(prefix: str, in_body: str | None, in_header: str | None) -> str:
    """The call's id. That of the body is its caller's, and must be unique; one in a header may be
    handed on from a call to many others."""
    _check_id("request_id", in_body)
    _check_id("X-Request-Id", in_header)
    if in_body is not None:
        return f"{prefix}-{in_body}"
    if in_header is not None:
        return f"{prefix}-{in_header}-{uuid.uuid4().hex[:8]}"
    return f"{prefix}-{uuid.uuid4().hex}"


def _check_id(name: str, value: str | None) -> None:
    if value is not None and not _ID.fullmatch(value):
        raise invalid(f"{name} must be 1 to {_MAX_ID_CHARS} visible ASCII characters", "request_id")


def text_prompt(text: str, request: GenerationRequest, model: Model) -> Prompt:
    salt = request.cache_salt or ""
    if request.add_special_tokens is not False:
        prompt: Any = {"prompt": text, "cache_salt": salt}
        return to_prompt(prompt, model.tokenizer, model.info.vocab_size)
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise InvalidArgument("prompt has no tokens")
    return Prompt(text, token_ids, salt)
