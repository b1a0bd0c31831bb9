"""Logs and traces: the options that every server has, and what follows from them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastpage import logs
from fastpage.serving.request_log import RequestLog

if TYPE_CHECKING:
    from fastpage.engine.observer import EngineObserver
    from fastpage.serving.tracing import Tracing


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Logs and traces", "what it tells of itself")
    group.add_argument(
        "--log-level",
        choices=logs.LEVELS,
        default=logs.LogConfig.level,
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        default=logs.LogConfig.format,
        help="json: one object a line (default: %(default)s)",
    )
    group.add_argument(
        "--log-requests",
        action="store_true",
        help="a line for each request that ends or is refused, as at level debug",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        default="",
        metavar="URL",
        help="send OpenTelemetry traces to this collector: http://HOST:4317 (needs "
        "fastpage[tracing])",
    )


class Observability:
    """Logs as the options say from here on."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises ValueError, one line."""
        logs.configure(logs.LogConfig(options.log_level, options.log_format))
        self._log = RequestLog(at_info=options.log_requests)
        endpoint = options.otlp_traces_endpoint
        self._tracing = _tracing(endpoint) if endpoint else None

    @property
    def observers(self) -> Sequence[EngineObserver]:
        return [self._log] if self._tracing is None else [self._log, self._tracing]

    async def close(self) -> None:
        """Traces that were not sent yet get a moment for it."""
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _tracing(endpoint: str) -> Tracing:
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--otlp-traces-endpoint {endpoint} is not http://HOST:PORT or https://")
    try:
        from fastpage.serving.tracing import Tracing, otlp_exporter

        return Tracing(otlp_exporter(endpoint))
    except ImportError:
        raise ValueError(
            '--otlp-traces-endpoint needs OpenTelemetry: pip install "fastpage[tracing]"'
        ) from None
