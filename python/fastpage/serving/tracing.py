"""OpenTelemetry traces: a span `llm_request` for each request, under the names that vLLM gives to
its attributes.

Its parent is the caller's span: of the `traceparent` header or metadata of the call, which a
TraceContextInterceptor (gRPC) or TraceContextMiddleware (ASGI) makes the current context, or
whatever span is current where AsyncEngine.add_request() is called.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fastpage._C import __version__
from fastpage.engine.observer import EngineObserver

if TYPE_CHECKING:
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.engine.output_processor import RequestState

_HEADERS = ("traceparent", "tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()
# Of the last spans, to be taken by the collector when the server ends.
_SECONDS_TO_FLUSH = 2.0

Attributes = dict[str, str | int | float]


class Tracing(EngineObserver):
    """Ended spans are sent by a thread of the exporter's own."""

    def __init__(self, exporter: SpanExporter) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "fastpage")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fastpage", __version__)
        self._model = ""
        self._contexts: dict[int, otel_context.Context] = {}  # of requests in progress

    def engine_started(self, engine: AsyncEngine) -> None:
        self._model = engine.info.served_model_name

    def request_added(self, request: RequestState) -> None:
        self._contexts[id(request)] = otel_context.get_current()

    def request_finished(self, request: RequestState) -> None:
        span = self._tracer.start_span(
            "llm_request",
            context=self._contexts.pop(id(request), None),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.response.model": self._model, **_attributes(request)},
            start_time=_wall_clock_ns(request.metrics.arrival_time),
        )
        if request.error is not None:
            span.set_status(Status(StatusCode.ERROR, str(request.error)))
        span.end()

    def close(self) -> None:
        """Sends what is left. Blocks for two seconds at most."""
        # A collector that is not there is tried again and again; this thread may be left behind.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_SECONDS_TO_FLUSH)


def otlp_exporter(endpoint: str) -> SpanExporter:
    """To a collector's OTLP gRPC endpoint: http://host:4317, or https://."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))


def _attributes(request: RequestState) -> Attributes:
    params, outputs = request.params, [sample.output for sample in request.samples]
    attributes: Attributes = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.prompt_tokens": len(request.prompt.token_ids),
        "gen_ai.usage.completion_tokens": sum(len(output.token_ids) for output in outputs),
        "gen_ai.usage.cached_tokens": request.num_cached_tokens,
        "gen_ai.usage.num_sequences": len(outputs),
    }
    if params.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = params.max_tokens
    reasons = sorted({output.finish_reason or "error" for output in outputs})
    attributes["gen_ai.response.finish_reasons"] = ",".join(reasons)
    return attributes | _latencies(request)


def _latencies(request: RequestState) -> Attributes:
    """In seconds; what did not come to pass is left out."""
    times, latencies = request.metrics, Attributes()
    if times.queue_seconds is not None:
        latencies["gen_ai.latency.time_in_queue"] = times.queue_seconds
    if times.first_token_time is None or times.last_token_time is None:
        return latencies
    latencies["gen_ai.latency.time_to_first_token"] = times.first_token_time - times.arrival_time
    latencies["gen_ai.latency.e2e"] = times.last_token_time - times.arrival_time
    decode = times.last_token_time - times.first_token_time
    latencies["gen_ai.latency.time_in_model_decode"] = decode
    if times.queue_seconds is not None:
        scheduled = times.arrival_time + times.queue_seconds
        prefill = max(0.0, times.first_token_time - scheduled)
        latencies["gen_ai.latency.time_in_model_prefill"] = prefill
        latencies["gen_ai.latency.time_in_model_inference"] = prefill + decode
    return latencies


def _wall_clock_ns(monotonic: float) -> int:
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)


def _caller(headers: Iterable[tuple[Any, Any]]) -> otel_context.Context | None:
    """The context of a call's W3C headers, if it has some."""
    found = {_text(name): _text(value) for name, value in headers if _text(name) in _HEADERS}
    return _PROPAGATOR.extract(found) if "traceparent" in found else None


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class TraceContextInterceptor(grpc.aio.ServerInterceptor):
    """The context is the call's: a call is a task of its own, and handlers run in it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        caller = _caller(handler_call_details.invocation_metadata)
        if caller is not None:
            otel_context.attach(caller)
        return await continuation(handler_call_details)


Scope = MutableMapping[str, Any]


class TraceContextMiddleware:
    """For an ASGI app."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        caller = _caller(scope["headers"]) if scope["type"] == "http" else None
        if caller is None:
            await self._app(scope, receive, send)
            return
        token = otel_context.attach(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            otel_context.detach(token)
