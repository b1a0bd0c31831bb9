"""What goes wrong, as HTTP statuses and OpenAI's error object."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastpage.engine.core import DuplicateRequestId, EngineDied, EngineStopped
from fastpage.errors import InvalidArgument, ResourceExhausted

_INVALID = "invalid_request_error"
_SERVER = "server_error"

_LONGEST = 600  # characters of a message

_RETRY_WHEN_LOADING = 2.0  # seconds


class ApiError(Exception):
    """An answer that is not 200. `param`: the request's field; `code`: for programs to look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
        close: bool = False,
    ) -> None:
        # What a client sent may be in it.
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.close = close  # the connection: what else comes over it cannot be understood

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = []
        if self.retry_after_seconds is not None:
            seconds = max(1, math.ceil(self.retry_after_seconds))
            headers.append((b"retry-after", b"%d" % seconds))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param} is not supported: {why}", param=param, code="unsupported_value")


def model_not_found(name: str, served: str) -> ApiError:
    message = f"model {name!r:.200} is not served here: {served!r} is"
    return ApiError(404, message, param="model", code="model_not_found")


def not_ready(why: str, code: str) -> ApiError:
    return ApiError(503, why, kind=_SERVER, code=code, retry_after_seconds=_RETRY_WHEN_LOADING)


def to_api_error(
    error: Exception,
    fields: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    prompt_field: str | None = None,
) -> ApiError:
    """`fields` are the request's; `renamed` maps the engine's names of some to the request's;
    `prompt_field` is the one to blame for a prompt that is too long."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, DuplicateRequestId):
        return ApiError(409, message, param="request_id", code="duplicate_request_id")
    if isinstance(error, InvalidArgument):
        if _is_too_long(message):
            return invalid(message, prompt_field, "context_length_exceeded")
        return invalid(message, _named_field(message, fields, renamed or {}) or prompt_field)
    if isinstance(error, ResourceExhausted):
        seconds = getattr(error, "retry_after_seconds", None) or 1.0
        return ApiError(
            429, message, kind="rate_limit_error", code="queue_full", retry_after_seconds=seconds
        )
    if isinstance(error, EngineDied):
        return not_ready(message, "engine_died")
    if isinstance(error, EngineStopped):
        return not_ready(message, "shutting_down")
    return ApiError(500, message, kind=_SERVER, code="internal_error")


def _is_too_long(message: str) -> bool:
    return message.startswith("prompt ") and " > max_model_len " in message


def _named_field(message: str, fields: Collection[str], renamed: Mapping[str, str]) -> str | None:
    """The engine's messages begin with the name of the field, or have it elsewhere."""
    words = re.findall("[a-z_]+", message)
    names = words[:1] + [word for word in words if "_" in word]
    return next((name for word in names if (name := renamed.get(word, word)) in fields), None)
