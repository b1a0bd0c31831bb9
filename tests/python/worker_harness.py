"""vllm.grpc.engine.VllmEngine over a real server with a fake model, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import pytest
from fakes import Gate, load_alphabet
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc
from waiting import PATIENCE, is_idle, until

from fastpage import AsyncEngine
from fastpage.engine.loading import LoadedModel
from fastpage.serving.worker.service import VllmEngineService

STATUS = grpc.StatusCode


class Client:
    def __init__(
        self, stub: pb_grpc.VllmEngineStub, engine: AsyncEngine, worker: VllmEngineService
    ) -> None:
        self.stub = stub
        self.engine = engine
        self.worker = worker

    async def wait_until_idle(self) -> None:
        await until(lambda: is_idle(self.engine.stats().scheduler), "requests are left over")

    async def wait_until_ended(self) -> None:
        """No request is known, whatever the step in progress still computes."""
        while (await self.stub.GetServerInfo(pb.GetServerInfoRequest())).active_requests:
            await asyncio.sleep(0.01)

    async def wait_until_running(self) -> None:
        await until(lambda: self.engine.stats().scheduler.num_running)

    def subscribe(self, start: int = 0, loads_first: bool = False) -> Any:
        request = common.SubscribeKvEventsRequest(
            start_sequence_number=start, load_records_before_first_batch=loads_first
        )
        return self.stub.SubscribeKvEvents(request)


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel) -> AsyncIterator[Client]:
    server = grpc.aio.server()
    worker = VllmEngineService(slow_client_timeout=PATIENCE)
    worker.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    engine = AsyncEngine(loaded)
    worker.set_engine(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Client(pb_grpc.VllmEngineStub(channel), engine, worker)
        yield client
        worker.drain()
        await engine.shutdown()
        await server.stop(1)


def run(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    async def main() -> None:
        loaded = load_alphabet(before_step, enable_kv_events=True, **options)
        async with serve(loaded) as client:
            with Gate.opened_at_the_end(before_step):
                await asyncio.wait_for(test(client), timeout=PATIENCE)
                await client.wait_until_idle()

    asyncio.run(main())


def generate(text: str = "", request_id: str = "r", stream: bool = False, **sampling: Any) -> Any:
    sampling = {"temperature": 0.0, "max_tokens": 5, **sampling}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(
            original_text=text,
            input_ids=[" .".find(c) + 26 if c in " ." else ord(c) - 97 for c in text],
        ),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


async def collect(call: Any) -> tuple[list[Any], list[Any]]:
    """The chunks and the completes of a call."""
    chunks, completes = [], []
    async for response in call:
        if response.WhichOneof("response") == "chunk":
            chunks.append(response.chunk)
        else:
            completes.append(response.complete)
    return chunks, completes


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        if hasattr(call, "__aiter__"):
            await collect(call)
        else:
            await call
    return error.value
