"""OpenTelemetry traces: what a span says, whose child it is, and that it gets to a collector."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fakes import load_alphabet
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as service_pb,
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2_grpc as service_grpc,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from waiting import PATIENCE

from fastpage import AsyncEngine, SamplingParams
from fastpage.engine.core import LocalCore
from fastpage.engine.observer import EngineObserver, StepReport
from fastpage.errors import FastpageError
from fastpage.serving import tracing as tracing_module
from fastpage.serving.grpc.server import GrpcServer, GrpcServerConfig
from fastpage.serving.grpc.service import FastpageService
from fastpage.serving.openai.server import HttpOptions, HttpServer
from fastpage.serving.tracing import (
    TraceContextInterceptor,
    TraceContextMiddleware,
    Tracing,
    otlp_exporter,
)
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"


def spans_of(
    test: Callable[[AsyncEngine], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
) -> list[ReadableSpan]:
    """What `test` leaves in the exporter."""
    exporter = InMemorySpanExporter()

    async def main() -> None:
        tracing = Tracing(exporter)
        async with AsyncEngine(load_alphabet(before_step), tracing) as engine:
            await asyncio.wait_for(test(engine), PATIENCE)
        tracing.close()

    asyncio.run(main())
    return list(exporter.get_finished_spans())


async def generate(engine: AsyncEngine, prompt: str = "abc", **params: Any) -> None:
    params = {"temperature": 0, "max_tokens": 5, **params}
    async for _ in engine.generate(prompt, SamplingParams(**params), request_id="one"):
        pass


def test_a_span_under_vllms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # The two clocks, as if they were read at one time.
    wall, now = time.time_ns(), time.monotonic()
    clocks = SimpleNamespace(time_ns=lambda: wall, monotonic=lambda: now)
    monkeypatch.setattr(tracing_module, "time", clocks)
    (span,) = spans_of(lambda engine: generate(engine, n=2, top_p=0.5))
    assert span.name == "llm_request"
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "fastpage"
    attributes = dict(span.attributes or {})
    latencies = {
        name.removeprefix("gen_ai.latency."): attributes.pop(name)
        for name in list(attributes)
        if name.startswith("gen_ai.latency.")
    }
    assert attributes == {
        "gen_ai.response.model": "alphabet",
        "gen_ai.request.id": "one",
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 10,
        "gen_ai.usage.cached_tokens": 0,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.response.finish_reasons": "length",
    }
    assert latencies.keys() == {
        "time_in_queue",
        "time_to_first_token",
        "time_in_model_prefill",
        "time_in_model_decode",
        "time_in_model_inference",
        "e2e",
    }
    assert latencies["e2e"] == pytest.approx(
        latencies["time_to_first_token"] + latencies["time_in_model_decode"]
    )
    assert latencies["time_in_model_inference"] == pytest.approx(
        latencies["time_in_model_prefill"] + latencies["time_in_model_decode"]
    )
    assert span.start_time is not None and span.end_time is not None
    assert wall < span.start_time <= wall + 1e9 * (time.monotonic() - now)
    assert span.start_time < span.end_time


def test_the_parent_is_the_span_where_the_request_is_made() -> None:
    tracer = TracerProvider().get_tracer("test")
    parents = []

    async def test(engine: AsyncEngine) -> None:
        async def one(i: int) -> None:
            with tracer.start_as_current_span("caller") as parent:
                parents.append(parent.get_span_context())
                stream = await engine.add_request("abc", request_id=str(i))
            async for _ in stream:
                pass

        await asyncio.gather(*map(one, range(3)))

    spans = spans_of(test)
    assert {span.parent.span_id for span in spans if span.parent} == {p.span_id for p in parents}
    assert {span.context.trace_id for span in spans} == {parent.trace_id for parent in parents}


def test_the_parent_is_right_if_tokens_come_before_the_caller_goes_on() -> None:
    """As they may where the core is another process."""
    exporter = InMemorySpanExporter()
    tracer = TracerProvider().get_tracer("test")

    class LateCore(LocalCore):
        async def accepted(self, core_id: int) -> None:
            await last_step.wait()

    class Watch(EngineObserver):
        def stepped(self, report: StepReport) -> None:
            if report.stats.num_steps == 5:
                last_step.set()

    async def main() -> None:
        loaded, tracing = load_alphabet(), Tracing(exporter)
        async with AsyncEngine(loaded, tracing, LateCore(loaded.engine)) as engine:
            engine.add_observer(Watch())
            with tracer.start_as_current_span("caller") as parent:
                await asyncio.wait_for(generate(engine), PATIENCE)
        tracing.close()
        (span,) = exporter.get_finished_spans()
        assert span.parent is not None
        assert span.parent.span_id == parent.get_span_context().span_id

    last_step = asyncio.Event()
    asyncio.run(main())


def test_an_abort_and_a_failure() -> None:
    fail = threading.Event()

    def before_step() -> None:
        if fail.is_set():
            raise RuntimeError("the model broke")

    async def test(engine: AsyncEngine) -> None:
        (await engine.add_request("abc")).abort()
        fail.set()
        with pytest.raises(FastpageError):
            await generate(engine)

    aborted, failed = spans_of(test, before_step)
    assert (aborted.attributes or {})["gen_ai.response.finish_reasons"] == "abort"
    assert aborted.status.status_code is StatusCode.UNSET
    assert failed.status.status_code is StatusCode.ERROR
    assert "the model broke" in (failed.status.description or "")
    assert "gen_ai.latency.e2e" not in (failed.attributes or {})


class Collector(service_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        service_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return service_pb.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


def test_from_grpc_metadata_to_a_collector(collector: Collector) -> None:
    async def main() -> None:
        config = GrpcServerConfig(interceptors=[TraceContextInterceptor()])
        server = GrpcServer([FastpageService()], config)
        address = await server.start()
        tracing = Tracing(otlp_exporter(collector.endpoint))
        engine = AsyncEngine(load_alphabet(), tracing)
        await server.set_engine(engine)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.FastpageStub(channel)
            params = pb.SamplingParams(temperature=0, max_tokens=5)
            request = pb.GenerateRequest(text="abc", request_id="one", sampling_params=params)
            async for _ in stub.Generate(request, metadata=[("traceparent", TRACEPARENT)]):
                pass
            request.request_id = "two"
            async for _ in stub.Generate(request):
                pass
        await engine.shutdown()
        await server.stop(1)
        await asyncio.to_thread(tracing.close)

    asyncio.run(main())
    one, two = collector.spans
    assert one.name == two.name == "llm_request"
    assert int.from_bytes(one.trace_id, "big") == TRACE_ID
    assert int.from_bytes(one.parent_span_id, "big") == SPAN_ID
    assert two.parent_span_id == b""
    ids = {
        attribute.value.string_value
        for span in (one, two)
        for attribute in span.attributes
        if attribute.key == "gen_ai.request.id"
    }
    assert ids == {"one", "two"}


def test_from_an_http_header() -> None:
    exporter = InMemorySpanExporter()

    def post(url: str) -> None:
        body = json.dumps({"prompt": "abc", "max_tokens": 2, "stream": True}).encode()
        headers = {"Content-Type": "application/json", "traceparent": TRACEPARENT}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")

    async def main() -> None:
        server = HttpServer(HttpOptions(trace_context=True))
        url = await server.start()
        tracing = Tracing(exporter)
        engine = AsyncEngine(load_alphabet(), tracing)
        await server.set_engine(engine)
        await asyncio.to_thread(post, url)
        await engine.shutdown()
        await server.stop(1)
        tracing.close()

    asyncio.run(main())
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)


def test_the_middleware_makes_the_header_the_context() -> None:
    async def main() -> None:
        seen = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(trace.get_current_span().get_span_context().span_id)

        middleware = TraceContextMiddleware(app)
        for headers in ([(b"traceparent", TRACEPARENT.encode())], [(b"traceparent", b"x")], []):
            await middleware({"type": "http", "headers": headers}, None, None)
        await middleware({"type": "lifespan"}, None, None)
        assert seen == [SPAN_ID, 0, 0, 0]

    asyncio.run(main())


class StuckExporter(SpanExporter):
    """Tries again and again, until it is released; does not let go before."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.gave_up = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.shutdown()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.gave_up |= not self.released.wait(PATIENCE)


def test_a_collector_that_is_not_there_holds_nothing_up() -> None:
    async def main(exporter: SpanExporter) -> None:
        tracing = Tracing(exporter)
        async with AsyncEngine(load_alphabet(), tracing) as engine:
            await generate(engine)
        await asyncio.to_thread(tracing.close)

    exporter = StuckExporter()
    asyncio.run(main(exporter))
    assert not exporter.gave_up
    exporter.released.set()
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        asyncio.run(main(otlp_exporter(endpoint)))
