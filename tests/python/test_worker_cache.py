"""vllm.grpc.engine.VllmEngine: KV events, loads that are pushed, and flushes."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fakes import Gate
from kv_index import Index
from smg_grpc_proto.generated import common_pb2 as common
from worker_harness import STATUS, Client, collect, generate, refused, run

from fastpage.engine.core import EngineDied
from fastpage.serving.worker import service


async def read_batches(call: Any, number: int) -> list[common.KvEventBatch]:
    """That many with events in them."""
    batches: list[common.KvEventBatch] = []
    while len(batches) < number:
        batch = await call.read()
        assert batch is not grpc.aio.EOF
        if batch.load.load_only:
            assert not batch.events
        else:
            batches.append(batch)
    return batches


def test_kv_events_tell_what_is_cached() -> None:
    async def test(client: Client) -> None:
        call = client.subscribe()
        # Headers at once, though there is nothing to say.
        await call.initial_metadata()
        await collect(client.stub.Generate(generate("abcdefghijkl", max_tokens=2)))
        (first,) = await read_batches(call, 1)
        assert not first.HasField("snapshot")
        assert first.load.max_running_requests == 16
        index = Index()
        index.apply(first)
        assert index.prompts() == {tuple(range(4)), tuple(range(8)), tuple(range(12))}
        (stored,) = [event.stored for event in first.events]
        assert [len(stored.blocks), stored.HasField("parent_block_hash")] == [3, False]

        await collect(client.stub.Generate(generate("abcdzzzz", max_tokens=1)))
        (second,) = await read_batches(call, 1)
        assert second.sequence_number == first.sequence_number + 1
        (stored,) = [event.stored for event in second.events]
        assert stored.parent_block_hash == first.events[0].stored.blocks[0].block_hash
        call.cancel()

        # Who comes back gets what came after; who comes late the state as it is.
        again = client.subscribe(first.sequence_number)
        assert [b.events for b in await read_batches(again, 1)] == [second.events]
        again.cancel()
        late = client.subscribe()
        (snapshot,) = await read_batches(late, 1)
        assert (snapshot.snapshot.index, snapshot.snapshot.count) == (0, 1)
        assert snapshot.snapshot.blocks == 4
        assert snapshot.sequence_number == second.sequence_number
        index.apply(second)
        other = Index()
        other.apply(snapshot)
        assert other.prompts() == index.prompts()

        assert (await client.stub.FlushCache(common.FlushCacheRequest())).success
        await collect(client.stub.Generate(generate("a", max_tokens=1)))
        (cleared,) = await read_batches(late, 1)
        assert cleared.sequence_number == second.sequence_number + 1
        other.apply(cleared)
        assert other.prompts() == set()
        late.cancel()

        for cursor in (1, cleared.sequence_number + 1, 2**64 - 1):
            error = await refused(client.subscribe(cursor))
            assert error.code() == STATUS.OUT_OF_RANGE

    run(test)


def test_evictions_are_told() -> None:
    async def test(client: Client) -> None:
        call = client.subscribe()
        index = Index()
        letters = "abcdefghijklmnopqrstuvwxyz"
        for i in range(12):
            await collect(client.stub.Generate(generate(letters[i : i + 12], max_tokens=1)))
            for batch in await read_batches(call, 1):
                index.apply(batch)
            assert len(index.blocks) <= 8
        assert tuple(range(11, 23)) in index.prompts()
        assert tuple(range(4)) not in index.prompts()
        call.cancel()

    run(test, num_blocks=8, max_model_len=32)


def test_loads_are_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SECONDS_BETWEEN_LOADS", 0.01)
    monkeypatch.setattr(service, "_HEARTBEAT_SECONDS", 0.05)
    gate = Gate()

    async def test(client: Client) -> None:
        call = client.subscribe(loads_first=True)
        records = [await call.read() for _ in range(3)]
        assert all(r.load.load_only and r.sequence_number == 0 for r in records)
        assert [r.load.sample for r in records] == [1, 2, 3]
        # It is not for everybody to hear before there was a batch.
        other = client.subscribe()

        generating = client.stub.Generate(generate("abcdefgh", max_tokens=3))
        collecting = asyncio.ensure_future(collect(generating))
        gate.open(1)
        while not (record := await call.read()).load.running_requests:
            pass
        assert record.load.token_usage == record.load.active_token_usage > 0
        batch = await other.read()
        assert batch.events and not batch.load.load_only
        gate.open(20)
        await collecting
        for stream in (call, other):
            record = await stream.read()
            while record.load.running_requests or not record.load.load_only:
                record = await stream.read()
            assert record.sequence_number == batch.sequence_number
            assert record.load.token_usage == 0

        # The streams end with the server, and no new one begins.
        client.worker.drain()
        for stream in (call, other):
            while await stream.read() is not grpc.aio.EOF:
                pass
            assert await stream.code() == STATUS.OK
        assert (await refused(client.subscribe())).code() == STATUS.UNAVAILABLE

    run(test, gate)


def test_flush_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: Client) -> None:
        tries = 0

        async def busy_at_first() -> bool:
            nonlocal tries
            tries += 1
            return tries > 2

        monkeypatch.setattr(client.engine, "reset_prefix_cache", busy_at_first)
        answer = await client.stub.FlushCache(common.FlushCacheRequest())
        assert not answer.success and "in progress" in answer.message
        assert (await client.stub.FlushCache(common.FlushCacheRequest(timeout_s=30))).success
        assert tries == 3
        for seconds in (-1.0, float("nan"), float("inf")):
            request = common.FlushCacheRequest(timeout_s=seconds)
            error = await refused(client.stub.FlushCache(request))
            assert error.code() == STATUS.INVALID_ARGUMENT

    run(test)


def test_an_engine_that_dies_meanwhile_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies() -> bool:
        raise EngineDied("its process has ended")

    async def test(client: Client) -> None:
        monkeypatch.setattr(client.engine, "reset_prefix_cache", dies)
        error = await refused(client.stub.FlushCache(common.FlushCacheRequest()))
        assert (error.code(), error.details()) == (STATUS.UNAVAILABLE, "its process has ended")

    run(test)
