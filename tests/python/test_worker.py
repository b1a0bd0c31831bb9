"""vllm.grpc.engine.VllmEngine: requests, and what the worker says of itself."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fakes import EOS_ID, Gate
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc
from waiting import PATIENCE
from worker_harness import STATUS, Client, collect, generate, refused, run

from fastpage.serving.worker import create_worker_service, service
from fastpage.serving.worker.loads import LoadMeter
from fastpage.serving.worker.service import VllmEngineService

# ---------------------------------------------------------------- the end of a request


def test_abort_ends_the_stream() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        for stream in (True, False):
            call = client.stub.Generate(generate("ab", n=2, stream=stream, max_tokens=100))
            responses = aiter(call)
            gate.open(2)
            if stream:
                await anext(responses)
            else:
                await client.wait_until_running()
            await client.stub.Abort(pb.AbortRequest(request_ids=["somebody else", "r"]))
            _, completes = await collect(responses)
            assert [c.finish_reason for c in completes] == ["abort", "abort"]
            assert await call.code() == STATUS.OK
            gate.open(5)
            await client.wait_until_idle()

    run(test, gate)


def test_an_abort_comes_while_the_prompt_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: Client) -> None:
        looked_at, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(request: Any, call: Callable[..., Any], *args: Any) -> Any:
            looked_at.set()
            await go_on.wait()
            return call(*args)

        monkeypatch.setattr(service, "aside", slowly)
        call = client.stub.Generate(generate("ab", max_tokens=100))
        first = asyncio.ensure_future(collect(call))
        await looked_at.wait()
        error = await refused(client.stub.Generate(generate("ab")))
        assert error.code() == STATUS.ALREADY_EXISTS
        await client.stub.Abort(pb.AbortRequest(request_ids=["r"]))
        go_on.set()
        _, completes = await first
        assert [c.finish_reason for c in completes] == ["abort"]

    run(test)


def test_cancellation_and_deadlines_free_the_blocks() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        for stream in (True, False):
            call = client.stub.Generate(generate("ab", stream=stream, max_tokens=100))
            gate.open(1)
            await client.wait_until_running()
            error = await refused(client.stub.Generate(generate("ab")))
            assert error.code() == STATUS.ALREADY_EXISTS
            call.cancel()
            await client.wait_until_ended()
        call = client.stub.Generate(generate("ab", max_tokens=100), timeout=0.2)
        error = await refused(call)
        assert error.code() == STATUS.DEADLINE_EXCEEDED
        await client.wait_until_ended()
        # The step in progress is the last one.
        gate.open(2)
        await client.wait_until_idle()

    run(test, gate)


# ---------------------------------------------------------------- what it says of itself


def test_before_the_model_is_loaded() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        VllmEngineService(slow_client_timeout=PATIENCE).register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.VllmEngineStub(channel)
            for call in (
                stub.HealthCheck(pb.HealthCheckRequest()),
                stub.GetModelInfo(pb.GetModelInfoRequest()),
                stub.GetServerInfo(pb.GetServerInfoRequest()),
                stub.GetLoads(pb.GetLoadsRequest()),
                stub.GetTokenizer(common.GetTokenizerRequest()),
                stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()),
                stub.FlushCache(common.FlushCacheRequest()),
                stub.Abort(pb.AbortRequest()),
                stub.Generate(generate("a")),
            ):
                assert (await refused(call)).code() == STATUS.UNAVAILABLE
        await server.stop(0)

    asyncio.run(main())


def test_health_and_info() -> None:
    async def test(client: Client) -> None:
        health = await client.stub.HealthCheck(pb.HealthCheckRequest())
        assert health.healthy
        client.worker._defaults.temperature = 0.6
        client.engine.get_default_sampling_params = lambda: client.worker._defaults  # type: ignore
        model = await client.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.is_generation) == ("alphabet", True)
        assert (model.max_context_length, model.vocab_size) == (128, 29)
        assert list(model.eos_token_ids) == [EOS_ID]
        assert json.loads(model.default_sampling_params_json) == {"temperature": 0.6}
        server = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (server.max_num_seqs, server.block_size, server.data_parallel_size) == (16, 4, 1)
        assert server.uptime_seconds > 0
        client.worker.drain()
        health = await client.stub.HealthCheck(pb.HealthCheckRequest())
        assert not health.healthy

    run(test)


def test_what_there_is_not() -> None:
    async def test(client: Client) -> None:
        for call in (
            client.stub.Embed(pb.EmbedRequest(request_id="r")),
            client.stub.StartProfile(common.StartProfileRequest()),
            client.stub.StopProfile(common.StopProfileRequest()),
        ):
            assert (await refused(call)).code() == STATUS.UNIMPLEMENTED

    run(test)


def test_loads_count_what_cannot_be_evicted() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        async def load() -> Any:
            response = await client.stub.GetLoads(pb.GetLoadsRequest())
            assert response.dp_rank_count == len(response.loads) == 1
            return response.loads[0]

        assert (await load()).max_total_num_tokens == 16 * 4
        calls = [
            client.stub.Generate(generate("abcdefghij", request_id=f"{i}", max_tokens=6))
            for i in range(3)
        ]
        gate.open(1)
        reading = [asyncio.ensure_future(collect(call)) for call in calls]
        while (await load()).num_running_reqs != 1 or (await load()).num_waiting_reqs != 2:
            await asyncio.sleep(0.01)
        busy = await load()
        assert busy.num_total_reqs == 3
        assert busy.max_running_requests == 1
        assert busy.num_used_tokens == 12
        assert busy.token_usage == pytest.approx(3 / 16)
        assert busy.num_waiting_uncached_tokens > 0
        gate.open(100)
        await asyncio.gather(*reading)
        idle = await load()
        assert (idle.num_total_reqs, idle.token_usage, idle.num_used_tokens) == (0, 0, 0)
        assert idle.cache_hit_rate > 0
        assert idle.gen_throughput > 0

    run(test, gate, num_blocks=16, max_num_seqs=1, max_model_len=32)


def test_rates_are_of_the_last_seconds() -> None:
    now = 100.0
    scheduler = SimpleNamespace(
        num_running=0,
        num_waiting=0,
        num_blocks=10,
        num_free_blocks=10,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
    )
    stats = SimpleNamespace(scheduler=scheduler, num_generated_tokens=0)
    info = SimpleNamespace(block_size=4, max_num_seqs=2)
    engine: Any = SimpleNamespace(stats=lambda: stats, info=info, add_observer=lambda _: None)
    meter = LoadMeter(engine, clock=lambda: now)
    assert meter.read().gen_throughput == 0
    for _ in range(60):
        now += 1
        stats.num_generated_tokens += 50
        scheduler.prefix_cache_queries += 10
        scheduler.prefix_cache_hits += 5
        load = meter.read()
        assert load.gen_throughput == pytest.approx(50)
        assert load.cache_hit_rate == pytest.approx(0.5)
    for _ in range(12):
        now += 1
        load = meter.read()
    assert load.gen_throughput == 0
    # An engine that was started again counts from 0.
    now += 1
    stats.num_generated_tokens = 7
    assert meter.read().gen_throughput >= 0


def test_without_its_messages_there_is_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert create_worker_service() is not None
    # As if it did not go with the grpcio that is there.
    monkeypatch.setitem(sys.modules, "fastpage.serving.worker.service", None)
    assert create_worker_service() is None
    assert "is not served: smg-grpc-proto" in caplog.text
    # As if it were not there.
    caplog.clear()
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    assert create_worker_service() is None
    assert caplog.text == ""
