"""A line in the log for each request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastpage.engine.core import EngineStopped
from fastpage.engine.observer import EngineObserver

if TYPE_CHECKING:
    from fastpage.engine.output_processor import RequestState

_logger = logging.getLogger("fastpage.requests")

_MOST_CHARS = 1024  # of what a client may have written


class RequestLog(EngineObserver):
    """Requests that end or are refused, at level debug, or info if that is asked for; those that
    fail through no fault of the client, and not because the engine stopped, as warnings."""

    def __init__(self, at_info: bool) -> None:
        self._level = logging.INFO if at_info else logging.DEBUG

    def request_finished(self, request: RequestState) -> None:
        failed = request.error is not None and not isinstance(request.error, EngineStopped)
        level = logging.WARNING if failed else self._level
        if _logger.isEnabledFor(level):
            text = "failed" if request.error is not None else "done"
            _logger.log(level, text, extra={"fields": _describe(request)})

    def request_refused(self, request_id: str, error: Exception) -> None:
        if _logger.isEnabledFor(self._level):
            fields = {"request_id": _shortened(request_id), "error": _one_line(error)}
            _logger.log(self._level, "refused", extra={"fields": fields})


def _describe(request: RequestState) -> dict[str, Any]:
    outputs = [sample.output for sample in request.samples]
    fields: dict[str, Any] = {
        "request_id": request.request_id,
        "finish_reason": ",".join(sorted({output.finish_reason or "error" for output in outputs})),
        "prompt_tokens": len(request.prompt.token_ids),
        "cached_tokens": request.num_cached_tokens,
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "n": len(outputs),
    }
    times = request.metrics
    if times.queue_seconds is not None:
        fields["queue_seconds"] = round(times.queue_seconds, 6)
    if times.first_token_time is not None and times.last_token_time is not None:
        fields["first_token_seconds"] = round(times.first_token_time - times.arrival_time, 6)
        fields["seconds"] = round(times.last_token_time - times.arrival_time, 6)
    if request.error is not None:
        fields["error"] = _one_line(request.error)
    return fields


def _one_line(error: Exception) -> str:
    return _shortened(" ".join(str(error).split())) or type(error).__name__


def _shortened(text: str) -> str:
    """A client may have had it refused for being too long."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} ..."
