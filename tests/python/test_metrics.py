"""Prometheus metrics: what is exposed, that it counts right, and what our documents say of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fakes import Gate, load_alphabet
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE, until

from fastpage import AsyncEngine, EngineArgs, SamplingParams
from fastpage.engine.async_engine import RequestStream
from fastpage.engine.core import EngineDied, EngineHung, EngineStopped
from fastpage.engine.loading import LoadedModel
from fastpage.engine.observer import EngineObserver
from fastpage.engine.process_core import ProcessCore
from fastpage.errors import FastpageError, InvalidArgument, ResourceExhausted
from fastpage.outputs import RequestMetrics
from fastpage.serving.grpc.server import GrpcServer, GrpcServerConfig
from fastpage.serving.grpc.service import FastpageService
from fastpage.serving.metrics import EngineMetrics, Exposition
from fastpage.serving.metrics.calls import CountRequests, http_requests
from fastpage.serving.metrics.catalogue import METRICS
from fastpage.serving.metrics.exposition import MissingExtra
from fastpage.serving.metrics.grpc_calls import CountCalls, grpc_calls
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]

# As vLLM exposes them: vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py.
VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:prompt_tokens_by_source": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_prefill_kv_computed_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
}

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80, 160, 640, 2560),
)
_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100)  # up to max_model_len, which is 128 here
BUCKETS = {
    "vllm:iteration_tokens_total": (
        *(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    ),
    "vllm:inter_token_latency_seconds": _TOKEN,
    "vllm:time_to_first_token_seconds": _FIRST_TOKEN,
    "vllm:e2e_request_latency_seconds": _REQUEST,
    "vllm:request_queue_time_seconds": _REQUEST,
    "vllm:request_inference_time_seconds": _REQUEST,
    "vllm:request_prefill_time_seconds": _REQUEST,
    "vllm:request_decode_time_seconds": _REQUEST,
    "vllm:request_time_per_output_token_seconds": _TOKEN,
    "vllm:request_prompt_tokens": _TOKENS,
    "vllm:request_prefill_kv_computed_tokens": _TOKENS,
    "vllm:request_generation_tokens": _TOKENS,
    "vllm:request_max_num_generation_tokens": _TOKENS,
    "vllm:request_params_n": (1, 2, 5, 10, 20),
    "vllm:request_params_max_tokens": _TOKENS,
}

# Whatever shows metrics that are not always there.
ALL_OPTIONS = {"num_speculative_tokens": 3, "num_host_blocks": 8}


class Scrape:
    """One GET /metrics, parsed."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        labels = {"model_name": "alphabet", "engine": "0", **labels}
        return self.samples[(name, *sorted(labels.items()))]

    def buckets(self, name: str) -> list[float]:
        samples = self.families[name].samples
        return [float(s.labels["le"]) for s in samples if s.name == f"{name}_bucket"]


class Setup:
    def __init__(self, engine: AsyncEngine, metrics: EngineMetrics) -> None:
        self.engine = engine
        self.metrics = metrics
        self.exposition = Exposition(metrics)

    def scrape(self) -> Scrape:
        return Scrape(self.exposition.render()[0].decode())

    async def add(self, prompt: str, **params: Any) -> RequestStream:
        params = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, **params}
        return await self.engine.add_request(prompt, SamplingParams(**params))

    async def generate(self, prompt: str, **params: Any) -> None:
        await read(await self.add(prompt, **params))


async def read(stream: RequestStream) -> None:
    async for _ in stream:
        pass


@contextlib.asynccontextmanager
async def serving(
    loaded: LoadedModel, metrics: EngineMetrics | None = None
) -> AsyncIterator[Setup]:
    metrics = metrics or EngineMetrics()
    async with AsyncEngine(loaded, metrics) as engine:
        yield Setup(engine, metrics)


def with_all_options() -> LoadedModel:
    loaded = load_alphabet(**ALL_OPTIONS)
    loaded.info = dataclasses.replace(
        loaded.info, num_speculative_tokens=3, num_host_kv_blocks=ALL_OPTIONS["num_host_blocks"]
    )
    return loaded


# ---------------------------------------------------------------- names, types, buckets


def test_names_types_and_labels_are_those_of_vllm() -> None:
    async def main() -> None:
        async with serving(with_all_options()) as setup:
            scrape = setup.scrape()
            types = {
                name: family.type
                for name, family in scrape.families.items()
                if name.startswith("vllm:")
            }
            assert types == VLLM
            for name, family in scrape.families.items():
                if name.startswith(("vllm:", "fastpage:")):
                    assert family.documentation
                    for sample in family.samples:
                        assert sample.labels["model_name"] == "alphabet"
                        assert sample.labels["engine"] == "0"
            assert "process_resident_memory_bytes" in scrape.families

        async with serving(load_alphabet()) as setup:
            scrape = setup.scrape()
            missing = {name for name in VLLM if name not in scrape.families}
            assert missing == {name for name in VLLM if "spec_decode" in name}
            assert not any("host_cache" in name for name in scrape.families)

    asyncio.run(main())


def test_buckets_are_those_of_vllm() -> None:
    async def main() -> None:
        async with serving(load_alphabet()) as setup:
            scrape = setup.scrape()
            for name, kind in VLLM.items():
                if kind == "histogram":
                    assert scrape.buckets(name) == [*BUCKETS[name], math.inf], name

    asyncio.run(main())


# ---------------------------------------------------------------- values


def test_values_after_known_work() -> None:
    async def main() -> None:
        async with serving(load_alphabet()) as setup:
            await setup.generate("abcdefghij", max_tokens=5)
            await setup.generate("abcdefghij", max_tokens=20)  # 8 of its prompt are cached
            await setup.generate(".", ignore_eos=False)  # the end, at once
            await setup.generate("xyz", n=3, max_tokens=None, stop_token_ids=[25])  # 26 tokens
            scrape = setup.scrape()

            assert scrape("vllm:request_success_total", finished_reason="length") == 2
            assert scrape("vllm:request_success_total", finished_reason="stop") == 4
            assert scrape("vllm:request_success_total", finished_reason="abort") == 0
            assert scrape("vllm:prompt_tokens_total") == 10 + 10 + 1 + 3
            assert scrape("vllm:prompt_tokens_cached_total") == 8
            assert scrape("vllm:prompt_tokens_by_source_total", source="local_compute") == 16
            assert scrape("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 8
            assert scrape("vllm:prefix_cache_hits_total") == 8
            assert scrape("vllm:prefix_cache_queries_total") == 24
            assert scrape("vllm:generation_tokens_total") == 5 + 20 + 1 + 3 * 26

            steps = scrape("fastpage:steps_total")
            assert steps == 5 + 20 + 1 + 26
            assert scrape("vllm:iteration_tokens_total_count") == steps
            computed = scrape("fastpage:computed_tokens_total")
            assert scrape("vllm:iteration_tokens_total_sum") == computed
            assert scrape("vllm:iteration_tokens_total_bucket", le="1.0") == 4 + 19 + 1
            assert scrape("vllm:iteration_tokens_total_bucket", le="8.0") == steps - 1
            assert scrape("fastpage:step_seconds_count") == steps
            phases = sum(
                scrape("fastpage:step_phase_seconds_total", phase=phase)
                for phase in ("schedule", "prepare", "model", "sample", "output")
            )
            assert scrape("fastpage:step_seconds_sum") == pytest.approx(phases)

            assert scrape("vllm:inter_token_latency_seconds_count") == 4 + 19 + 0 + 3 * 25
            assert scrape("vllm:time_to_first_token_seconds_count") == 4
            assert scrape("vllm:e2e_request_latency_seconds_count") == 4
            assert scrape("vllm:request_decode_time_seconds_count") == 4
            assert scrape("vllm:e2e_request_latency_seconds_sum") == pytest.approx(
                scrape("vllm:time_to_first_token_seconds_sum")
                + scrape("vllm:request_decode_time_seconds_sum")
            )
            assert scrape("vllm:request_time_per_output_token_seconds_count") == 2 + 3
            assert scrape("vllm:request_queue_time_seconds_count") == 4
            assert scrape("vllm:request_queue_time_seconds_sum") > 0
            assert scrape("vllm:request_inference_time_seconds_count") == 4
            assert scrape("vllm:request_prefill_time_seconds_count") == 4
            assert scrape("vllm:request_inference_time_seconds_sum") == pytest.approx(
                scrape("vllm:request_prefill_time_seconds_sum")
                + scrape("vllm:request_decode_time_seconds_sum")
            )

            assert scrape("vllm:request_prompt_tokens_sum") == 24
            assert scrape("vllm:request_prefill_kv_computed_tokens_sum") == 16
            assert scrape("vllm:request_generation_tokens_count") == 6
            assert scrape("vllm:request_generation_tokens_bucket", le="20.0") == 3
            assert scrape("vllm:request_max_num_generation_tokens_count") == 4
            assert scrape("vllm:request_max_num_generation_tokens_sum") == 5 + 20 + 1 + 26
            assert scrape("vllm:request_params_n_sum") == 6
            assert scrape("vllm:request_params_max_tokens_count") == 3
            assert scrape("vllm:request_params_max_tokens_sum") == 5 + 20 + 5

            info = scrape.families["vllm:cache_config_info"].samples[0]
            assert info.labels["block_size"] == "4"
            assert info.labels["num_gpu_blocks"] == "256"

    asyncio.run(main())


def test_times_fit_together_whatever_a_busy_machine_does() -> None:
    """The front end may learn late of a request that is in the queue already."""
    metrics = EngineMetrics()
    times = RequestMetrics(arrival_time=10.0)
    times.queue_seconds, times.first_token_time, times.last_token_time = 3.0, 12.0, 17.0
    output = SimpleNamespace(finish_reason="length", token_ids=[1, 2])
    request: Any = SimpleNamespace(
        metrics=times,
        params=SamplingParams(max_tokens=2),
        prompt=SimpleNamespace(token_ids=[1]),
        num_cached_tokens=0,
        ranked=False,
        samples=[SimpleNamespace(output=output, last_token_time=17.0)],
    )
    metrics.request_finished(request)
    assert metrics.prefill_time.total == 0.0
    assert metrics.inference_time.total == metrics.decode_time.total == 5.0


def test_gauges_follow_the_scheduler() -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(load_alphabet(gate, max_num_seqs=2, num_blocks=64)) as setup:
            streams = [await setup.add("abcdefgh", max_tokens=4) for _ in range(3)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            gate.open(2)
            # The third step waits at the gate, and nothing changes meanwhile.
            await until(lambda: setup.metrics.total("num_steps") == 2)
            scrape = setup.scrape()
            assert scrape("vllm:num_requests_running") == 2
            assert scrape("vllm:num_requests_waiting") == 1
            assert scrape("vllm:kv_cache_usage_perc") > 0
            gate.open(100)
            await asyncio.gather(*readers)
            scrape = setup.scrape()
            assert scrape("vllm:num_requests_running") == 0
            assert scrape("vllm:num_requests_waiting") == 0
            assert scrape("vllm:kv_cache_usage_perc") == 0

    asyncio.run(main())


def test_beams_and_best_of_have_no_time_between_tokens() -> None:
    async def main() -> None:
        async with serving(load_alphabet()) as setup:
            await setup.generate("ab", n=2, beam_width=2, ignore_eos=False)
            await setup.generate("ab", n=1, best_of=3, temperature=1.0)
            scrape = setup.scrape()
            assert scrape("vllm:e2e_request_latency_seconds_count") == 2
            assert scrape("vllm:time_to_first_token_seconds_count") == 2
            assert scrape("vllm:inter_token_latency_seconds_count") == 0
            assert scrape("vllm:request_decode_time_seconds_count") == 0
            assert scrape("vllm:request_prefill_time_seconds_count") == 0
            assert scrape("vllm:request_time_per_output_token_seconds_count") == 0
            assert scrape("vllm:request_generation_tokens_sum") == 15

    asyncio.run(main())


def test_aborts_failures_and_refusals() -> None:
    async def main() -> None:
        fail, go = False, threading.Event()

        def before_step() -> None:
            assert go.wait(PATIENCE)
            if fail:
                raise RuntimeError("the model broke")

        async with serving(load_alphabet(before_step, max_num_waiting=4)) as setup:
            stream = await setup.add("abc")
            stream.abort()
            with pytest.raises(InvalidArgument):
                await setup.add("abc", logit_bias={1000: 1.0})
            added = await asyncio.gather(
                *[setup.add("a", n=4) for _ in range(9)], return_exceptions=True
            )
            refused = [answer for answer in added if isinstance(answer, ResourceExhausted)]
            streams = [answer for answer in added if isinstance(answer, RequestStream)]
            assert len(refused) + len(streams) == 9
            go.set()
            await asyncio.gather(*map(read, streams))
            fail = True
            with pytest.raises(FastpageError, match="the model broke"):
                await setup.generate("abc", n=2)
            await setup.engine.drain(PATIENCE)
            with pytest.raises(EngineStopped):
                await setup.add("abc")
            scrape = setup.scrape()
            assert scrape("fastpage:requests_refused_total", reason="invalid_argument") == 1
            assert scrape("fastpage:requests_refused_total", reason="resource_exhausted") == len(
                refused
            )
            assert refused
            assert scrape("fastpage:requests_refused_total", reason="unavailable") == 1
            assert scrape("fastpage:requests_refused_total", reason="internal") == 0
            assert scrape("vllm:request_success_total", finished_reason="abort") == 1
            assert scrape("vllm:request_success_total", finished_reason="error") == 2
            # Their times would say nothing of those of the others.
            assert scrape("vllm:e2e_request_latency_seconds_count") == len(streams)

    asyncio.run(main())


def test_counters_go_on_rising_when_the_engine_was_started_again() -> None:
    async def main() -> None:
        metrics = EngineMetrics()
        async with serving(load_alphabet(), metrics) as setup:
            await setup.generate("abc", max_tokens=5)
            assert setup.scrape()("fastpage:engine_restarts_total") == 0
            metrics.engine_died(EngineDied("kill -9"))
            scrape = setup.scrape()
            assert scrape("fastpage:engine_hangs_total") == 0
            assert scrape("fastpage:engine_up") == 0
            assert scrape("vllm:num_requests_running") == 0
            assert scrape("vllm:generation_tokens_total") == 5
            seconds = scrape("fastpage:step_phase_seconds_total", phase="model")
        async with serving(load_alphabet(), metrics) as setup:
            scrape = setup.scrape()
            assert scrape("fastpage:engine_up") == 1
            assert scrape("fastpage:engine_restarts_total") == 1
            assert scrape("vllm:generation_tokens_total") == 5
            await setup.generate("abc", max_tokens=7)
            scrape = setup.scrape()
            assert scrape("vllm:generation_tokens_total") == 12
            assert scrape("fastpage:steps_total") == 12
            assert scrape("fastpage:step_phase_seconds_total", phase="model") > seconds
            assert scrape("fastpage:step_seconds_count") == 12
            assert scrape("vllm:e2e_request_latency_seconds_count") == 2
            metrics.engine_died(EngineHung("it was stuck"))
            assert setup.scrape()("fastpage:engine_hangs_total") == 1

    asyncio.run(main())


# ---------------------------------------------------------------- scraping


def get(port: int, **headers: str) -> tuple[str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.read().decode(), response.headers["Content-Type"]


def test_the_server_speaks_both_formats() -> None:
    async def main() -> None:
        async with serving(load_alphabet()) as setup:
            await setup.generate("abc")
            port = setup.exposition.start_server("127.0.0.1", 0)
            try:
                text, content_type = await asyncio.to_thread(get, port)
                assert content_type.startswith("text/plain")
                assert Scrape(text)("vllm:generation_tokens_total") == 5
                accept = "application/openmetrics-text; version=1.0.0"
                text, content_type = await asyncio.to_thread(get, port, Accept=accept)
                assert content_type.startswith("application/openmetrics-text")
                names = {family.name for family in parse_openmetrics(text)}
                assert {"vllm:generation_tokens", "fastpage:engine_up"} <= names
                with pytest.raises(FastpageError, match=f"127.0.0.1:{port} for metrics: address"):
                    Exposition(setup.metrics).start_server("127.0.0.1", port)
            finally:
                setup.exposition.stop_server()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))

    asyncio.run(main())


def test_before_the_engine_has_started_the_process_is_seen() -> None:
    text = Exposition(EngineMetrics()).render()[0].decode()
    assert "process_resident_memory_bytes" in Scrape(text).families
    assert "vllm:" not in text


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtra, match=r'pip install "fastpage\[metrics\]"'):
        Exposition(EngineMetrics())


def test_calls_are_counted_whether_they_reach_the_engine_or_not() -> None:
    async def main() -> None:
        calls, gate = grpc_calls(), Gate()
        server = GrpcServer([FastpageService()], GrpcServerConfig(interceptors=[CountCalls(calls)]))
        address = await server.start()
        engine = AsyncEngine(load_alphabet(gate))
        await server.set_engine(engine)
        service = "fastpage.v1.Fastpage"
        cancelled = ("server_stream", service, "Generate", "CANCELLED")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.FastpageStub(channel)

            async def generate(**params: Any) -> grpc.StatusCode:
                params = {"max_tokens": 2, "temperature": 0, **params}
                request = pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(**params))
                try:
                    await stub.GenerateUnary(request, timeout=PATIENCE)
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

            assert await generate(temperature=-1) is grpc.StatusCode.INVALID_ARGUMENT
            streaming = stub.Generate(pb.GenerateRequest(text="a"))
            await until(lambda: engine._streams)
            streaming.cancel()
            await until(lambda: cancelled in calls.counts)
            gate.open(1000)
            assert await generate() is grpc.StatusCode.OK
            undecodable = channel.unary_unary("/fastpage.v1.Fastpage/GenerateUnary")
            unknown = channel.unary_unary("/fastpage.v1.Fastpage/Unheard")
            for call in (undecodable, unknown):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(b"\xff\xff")
            async for _ in stub.Generate(pb.GenerateRequest(text="a")):
                pass
        await server.stop(1)
        assert calls.counts == {
            cancelled: 1,
            ("unary", service, "GenerateUnary", "INVALID_ARGUMENT"): 2,
            ("unary", service, "GenerateUnary", "OK"): 1,
            ("server_stream", service, "Generate", "OK"): 1,
            ("unknown", "unknown", "unknown", "UNIMPLEMENTED"): 1,
        }
        scrape = Scrape(Exposition(EngineMetrics(), calls).render()[0].decode())
        assert scrape.families["grpc_server_handled"].type == "counter"
        assert sum(s.value for s in scrape.families["grpc_server_handled"].samples) == 6

    asyncio.run(main())


def test_http_requests_are_counted_by_known_paths() -> None:
    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/gone":
                raise ConnectionError
            await send({"type": "http.response.start", "status": 429 if receive else 200})
            await send({"type": "http.response.body"})

        async def send(message: Any) -> None:
            pass

        requests = http_requests()
        count = CountRequests(app, requests, {"/health", "/gone"})
        for path, method, receive in (
            ("/health", "GET", None),
            ("/health", "GET", True),
            ("/elsewhere", "BREW", None),
        ):
            await count({"type": "http", "path": path, "method": method}, receive, send)
        with pytest.raises(ConnectionError):
            await count({"type": "http", "path": "/gone", "method": "POST"}, None, send)
        assert requests.counts == {
            ("/health", "GET", "2xx"): 1,
            ("/health", "GET", "4xx"): 1,
            ("none", "other", "2xx"): 1,
            ("/gone", "POST", "none"): 1,
        }

    asyncio.run(main())


def test_an_engine_process_that_is_killed(smollm2_gguf: Path) -> None:
    class Death(EngineObserver):
        """What the metrics say while it is dead; it may be back before anybody looks again."""

        def engine_died(self, error: EngineDied) -> None:
            assert not metrics.engine_up
            steps.append(metrics.total("num_steps"))

    metrics = EngineMetrics()
    steps: list[float] = []

    async def main() -> None:
        args = EngineArgs(model=str(smollm2_gguf), kv_cache_memory="64MiB", max_model_len=512)
        engine = await AsyncEngine.start_process(args, metrics)
        core = engine._core
        assert isinstance(core, ProcessCore)
        async with engine:
            engine.add_observer(Death())
            setup = Setup(engine, metrics)
            await setup.generate("Once", max_tokens=4)
            assert metrics.total("num_steps") == 4
            os.kill(core.pid, signal.SIGKILL)
            await until(lambda: metrics.num_restarts)
            assert steps == [4] and metrics.engine_up
            await setup.generate("Once", max_tokens=4)
            assert metrics.total("num_steps") == 8
            assert metrics.num_generation_tokens == 8

    asyncio.run(main())


# ---------------------------------------------------------------- documents


def exposed_names() -> set[str]:
    """Of all samples, with every option on."""

    async def main() -> set[str]:
        async with serving(with_all_options()) as setup:
            setup.engine.phases = {"imports": 1.0}
            return {key[0] for key in setup.scrape().samples}

    return asyncio.run(main())


def expressions(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        for target in panel.get("targets", ()):
            yield target["expr"]
        yield from expressions(panel.get("panels", []))


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((ROOT / "examples/grafana/fastpage.json").read_text())
    found = list(expressions(dashboard["panels"]))
    found += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    asked = {
        name for text in found for name in re.findall(r"\b(?:vllm|fastpage|process)[:_]\w+", text)
    }
    assert len(asked) > 25
    assert asked <= exposed_names()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    rows = re.findall(r"^\| `((?:vllm|fastpage):\w+)` \| (\w+) \| (.*) \|$", text, re.M)
    expected = []
    for metric in METRICS:
        kind = "gauge" if metric.kind == "info" else metric.kind
        expected.append((metric.exposed_name, kind, metric.meaning))
    assert rows == expected


def test_an_expired_deadline_is_counted_as_one() -> None:
    async def main() -> None:
        calls, gate = grpc_calls(), Gate()
        server = GrpcServer([FastpageService()], GrpcServerConfig(interceptors=[CountCalls(calls)]))
        address = await server.start()
        await server.set_engine(AsyncEngine(load_alphabet(gate)))
        key = ("unary", "fastpage.v1.Fastpage", "GenerateUnary", "DEADLINE_EXCEEDED")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.FastpageStub(channel)
            # Not every one gets to the server in time, nor does it see the end of each by itself.
            while key not in calls.counts:
                with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                    await stub.GenerateUnary(pb.GenerateRequest(text="a"), timeout=0.1)
        await server.stop(0)  # before a late one could be answered
        gate.open(1000)
        assert {code for *_, code in calls.counts} <= {"DEADLINE_EXCEEDED", "CANCELLED"}

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
