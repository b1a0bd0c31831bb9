"""A gRPC server in this process with a fake model, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
from fakes import AlphabetRunner, Gate, load_alphabet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import PATIENCE, until_idle

from fastpage import AsyncEngine
from fastpage.engine.loading import LoadedModel
from fastpage.serving.grpc.server import GrpcServer
from fastpage.serving.grpc.service import FastpageService
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Client:
    def __init__(
        self, address: str, engine: AsyncEngine | None = None, runner: AlphabetRunner | None = None
    ) -> None:
        self.address = address
        self.engine = engine
        self.runner = runner
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = pb_grpc.FastpageStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def status(self) -> int:
        return (await self.health.Check(health_pb2.HealthCheckRequest())).status

    async def stats(self) -> pb.GetServerStatsResponse:
        return await self.stub.GetServerStats(pb.GetServerStatsRequest())

    async def wait_until_idle(self) -> None:
        await until_idle(self.stats)


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel, slow_client_timeout: float = 60.0) -> AsyncIterator[Client]:
    server = GrpcServer([FastpageService(slow_client_timeout)])
    address = await server.start()
    engine = AsyncEngine(loaded)
    await server.set_engine(engine)
    client = Client(address, engine, loaded.runner)
    try:
        yield client
        await client.wait_until_idle()
    finally:
        await client.channel.close()
        await server.drain()
        await engine.shutdown()
        await server.stop(0)


def run(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Runs `test(client)` against the alphabet; afterwards every block must be free."""

    async def main() -> None:
        async with serve(load_alphabet(before_step, **options)) as client:
            with Gate.opened_at_the_end(before_step):
                await asyncio.wait_for(test(client), timeout=PATIENCE)
                await client.wait_until_idle()

    asyncio.run(main())


def text_request(text: str, **sampling: Any) -> pb.GenerateRequest:
    sampling = {"temperature": 0.0, "max_tokens": 5, **sampling}
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**sampling))


async def collect(call: Any) -> tuple[dict[int, str], dict[int, list[int]], list[Any]]:
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
        for delta in response.outputs:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            ids.setdefault(delta.index, []).extend(delta.token_ids)
    return texts, ids, responses
