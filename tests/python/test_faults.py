"""What clients, networks and signals do to a server process: it costs them, and nobody else.

After each of these the server must be as it was: no request running, all blocks free, no file left
open, no more memory than before, and the next request answered as `LLM` answers it.

FASTPAGE_FAULTS: how many malformed requests (`make faults`: 10,000). FASTPAGE_SEED: what they are
drawn from; a failure says it.
"""

from __future__ import annotations

import asyncio
import collections
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import raw_http2 as h2
from grpc_health.v1 import health_pb2
from malformed import PROMPT, SERVICES, MalformedMessages, valid_messages
from server_process import (
    ENDLESS,
    ENDLESS_OPTIONS,
    GRPC,
    NOT_SERVING,
    SERVING,
    GrpcClient,
    MemoryRecord,
    ServerProcess,
    is_alive,
    write_endless_model,
    write_tiny_model,
)
from waiting import PATIENCE, eventually

from fastpage import LLM, SamplingParams
from fastpage.v1 import fastpage_pb2 as pb

NUM_MALFORMED = int(os.environ.get("FASTPAGE_FAULTS", "1000"))
SEED = int(os.environ.get("FASTPAGE_SEED", "6"))
OPTIONS = ("--num-kv-blocks", "256", "--max-num-seqs", "16", "--max-num-waiting", "64")
OPTIONS += ("--enable-kv-events",)


# What a server may say to a request that it does not serve.
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("model") / "endless.gguf")


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[int]:
    """The tokens that `probe` must get."""
    llm = LLM(str(tiny_model), threads=1)
    params = SamplingParams(temperature=0.9, seed=11, max_tokens=40, ignore_eos=True)
    return list(llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids)


def serve(model: Path, *options: str) -> Iterator[ServerProcess]:
    with ServerProcess(GRPC, model, *options) as server:
        yield server
        assert server.stop() == 0, server.err
        # Warnings of preempted sequences are all that belongs there.
        assert "Traceback" not in server.err and "rror" not in server.err, server.err


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    yield from serve(tiny_model, *OPTIONS)


@pytest.fixture(scope="module")
def endless_server(endless_model: Path) -> Iterator[ServerProcess]:
    yield from serve(endless_model, *ENDLESS_OPTIONS)


def request(max_tokens: int = 40, **fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0.9, seed=11, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(**{"text": PROMPT, "sampling_params": sampling, **fields})


async def probe(client: GrpcClient, expected: list[int]) -> None:
    """One ordinary request, which must be answered right."""
    ids: list[int] = []
    async for response in client.stub.Generate(request(), timeout=PATIENCE):
        for output in response.outputs:
            ids += output.token_ids
    assert ids == expected


async def end(call: Any) -> str:
    """How many tokens it brings, or else the status."""
    count = 0
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            count += sum(len(output.token_ids) for output in response.outputs)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return f"{count} tokens"


Fault = Callable[[GrpcClient], Coroutine[Any, Any, None]]


def inflict(
    server: ServerProcess,
    expected: list[int],
    fault: Fault,
    rounds: int = 6,
    kept: int = 4 << 20,
) -> None:
    """`fault`, several times, then all that must hold after it. `kept`: see MemoryRecord."""

    async def main() -> None:
        async with GrpcClient(server.address) as client:
            await client.wait_until_serving()
            await probe(client, expected)
            files = server.num_open_files()
            memory = MemoryRecord(server, kept)
            is_flat = False
            while not is_flat:
                await fault(client)
                await client.wait_until_idle()
                await probe(client, expected)
                is_flat = memory.is_flat(rounds)
            # A connection that its client left is closed when the server next looks at it.
            while server.num_open_files() > files:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), timeout=600))


# ---------------------------------------------------------------- clients that vanish


async def streaming(client: GrpcClient, number: int) -> list[Any]:
    """Calls that have had their first tokens, and go on without end."""
    calls = [client.stub.Generate(request(ENDLESS)) for _ in range(number)]
    for call in calls:
        await call.read()
    return calls


def test_cancelled_calls(endless_server: ServerProcess, expected: list[int]) -> None:
    async def fault(client: GrpcClient) -> None:
        for call in await streaming(client, 16):
            call.cancel()
        # Not even read once, and still waiting.
        for call in [client.stub.Generate(request(ENDLESS)) for _ in range(40)]:
            call.cancel()

    inflict(endless_server, expected, fault)


def test_clients_that_close_their_channel(
    endless_server: ServerProcess, expected: list[int]
) -> None:
    async def fault(client: GrpcClient) -> None:
        async with GrpcClient(endless_server.address) as other:
            await streaming(other, 16)

    inflict(endless_server, expected, fault)


CLIENT = """
import sys
import grpc
channel = grpc.insecure_channel(sys.argv[1])
method = channel.unary_stream("/fastpage.v1.Fastpage/Generate")
calls = [method(bytes.fromhex(sys.argv[2])) for _ in range(8)]
[next(call) for call in calls]
print("streaming", flush=True)
[message for call in calls for message in call]
"""


def test_killed_clients(endless_server: ServerProcess, expected: list[int]) -> None:
    async def fault(client: GrpcClient) -> None:
        command = [sys.executable, "-c", CLIENT, endless_server.address]
        process = await asyncio.create_subprocess_exec(
            *command, request(ENDLESS).SerializeToString().hex(), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"streaming\n"
        process.kill()
        await process.wait()

    inflict(endless_server, expected, fault, rounds=3)


GENERATE = "/fastpage.v1.Fastpage/Generate"


def test_connections_that_are_reset(endless_server: ServerProcess, expected: list[int]) -> None:
    async def fault(client: GrpcClient) -> None:
        message = request(ENDLESS).SerializeToString()
        connections = [h2.connect(endless_server.address) for _ in range(8)]
        for connection in connections:
            connection.sendall(h2.PREFACE + h2.settings())
            connection.sendall(h2.call_headers(GENERATE, 1) + h2.call_message(message, 1))
        while (await client.stats()).num_running < 8:
            await asyncio.sleep(0.001)
        for connection in connections:
            h2.reset(connection)

    inflict(endless_server, expected, fault)


def half_sent() -> list[bytes]:
    """The beginnings of what a client sends, cut where it matters."""
    message = request().SerializeToString()
    start = h2.PREFACE + h2.settings()
    headers, data = h2.call_headers(GENERATE, 1), h2.call_message(message, 1)
    return [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS to a server without
        h2.PREFACE[:10],
        h2.PREFACE,
        start,
        start + headers[:15],
        start + h2.call_headers(GENERATE, 1, flags=0),  # CONTINUATION frames should follow
        start + headers,
        start + headers + data[:20],
        start + headers + data[:-1],
        start + headers + h2.call_message(message, 1, flags=0),  # the client may still say more
        start + headers + h2.frame(h2.DATA, 1, 1, b"\0\xff\xff\xff\xff" + message),
        start + headers + h2.frame(h2.DATA, 1, 1, b"\1" + data[10:]),  # compressed, it says
        start + headers + h2.frame(h2.RST_STREAM, 0, 1, bytes(4)) + data,
        start + h2.call_headers(GENERATE, 2) + h2.call_message(message, 2),  # even: not a client's
        start + data,
        start + Random(SEED).randbytes(4000),
    ]


def test_half_sent_calls(server: ServerProcess, expected: list[int]) -> None:
    async def fault(client: GrpcClient) -> None:
        connections = []
        for part in half_sent() * 4:
            connections.append(connection := h2.connect(server.address))
            connection.sendall(part)
        await probe(client, expected)  # while they are open
        for i, connection in enumerate(connections):
            h2.reset(connection) if i % 2 else connection.close()

    inflict(server, expected, fault)


def test_clients_that_do_not_read(server: ServerProcess, expected: list[int]) -> None:
    """No window for a byte of an answer: the server keeps what is new, in one piece a call."""

    async def fault(client: GrpcClient) -> None:
        connection = h2.connect(server.address)
        connection.sendall(h2.PREFACE + h2.settings(initial_window_size=0))
        message = request(200).SerializeToString()
        made = (await client.stats()).num_generated_tokens
        for stream in range(1, 41, 2):
            connection.sendall(h2.call_headers(GENERATE, stream) + h2.call_message(message, stream))
        await probe(client, expected)
        while (await client.stats()).num_generated_tokens < made + 20 * 200 + len(expected):
            await asyncio.sleep(0.001)
        h2.reset(connection)

    inflict(server, expected, fault, rounds=3)


# ---------------------------------------------------------------- deadlines


def test_expired_deadlines(endless_server: ServerProcess, expected: list[int]) -> None:
    async def fault(client: GrpcClient) -> None:
        seconds = [0.0, 0.001, 0.01, 0.05, 0.1] * 8
        calls = [client.stub.Generate(request(ENDLESS), timeout=s) for s in seconds]
        assert set(await asyncio.gather(*map(end, calls))) == {"DEADLINE_EXCEEDED"}

    inflict(endless_server, expected, fault)


# ---------------------------------------------------------------- requests that are none


async def answer(client: GrpcClient, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    endless = method.endswith("/SubscribeKvEvents")
    call = client.channel.unary_stream(method)(data, timeout=0.2 if endless else PATIENCE)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if not (endless and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("service", SERVICES)
def test_malformed_messages(server: ServerProcess, expected: list[int], service: str) -> None:
    rng = Random(SEED)
    methods = {m: MalformedMessages(rng, v) for m, v in valid_messages(service).items()}
    # Half of them to those that generate.
    names = [name for name in methods if name.endswith(("/Generate", "/Chat"))] * len(methods)
    names += [name for name in methods for _ in range(2)]
    statuses: collections.Counter[str] = collections.Counter()

    async def one(client: GrpcClient) -> None:
        method = rng.choice(names)
        data = methods[method].next()
        status, details = await answer(client, method, data)
        statuses[status.name] += 1
        said = f"{method} {data.hex()[:2000]}: {status.name}: {details} (seed {SEED})"
        assert status is grpc.StatusCode.OK or status in REFUSALS, said
        assert details.isprintable(), said
        assert details or status is grpc.StatusCode.OK, said

    async def many(client: GrpcClient, count: int) -> None:
        for _ in range(count):
            await one(client)

    async def fault(client: GrpcClient) -> None:
        await asyncio.gather(*(many(client, NUM_MALFORMED // (9 * 16) + 1) for _ in range(16)))

    inflict(server, expected, fault, rounds=9)
    print(f"{service}, seed {SEED}: {dict(statuses)}")
    assert len(statuses) > 2


def test_huge_prompts(server: ServerProcess, expected: list[int]) -> None:
    """10 MB are more than a message may have; 2 MB are read, one by one, and found too long."""

    async def fault(client: GrpcClient) -> None:
        requests = [
            pb.GenerateRequest(text="x" * 10_000_000),
            pb.GenerateRequest(text="x" * 2_000_000),
            pb.GenerateRequest(text="\U0001f9ff" * 100_000),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 1_000_000)),
        ]
        ends = await asyncio.gather(
            *(answer(client, GENERATE, request.SerializeToString()) for request in requests)
        )
        assert [status.name for status, _ in ends] == ["RESOURCE_EXHAUSTED"] + [
            "INVALID_ARGUMENT"
        ] * 3
        assert all("max_model_len" in details for _, details in ends[1:])

    inflict(server, expected, fault, rounds=3, kept=256 << 20)


def test_names_that_are_huge(server: ServerProcess, expected: list[int]) -> None:
    """They are in the message, which must not be longer than a client takes."""

    async def fault(client: GrpcClient) -> None:
        for name in ("e\u0301" * 500_000, "\U0001f9ff" * 1000):
            data = request(model=name).SerializeToString()
            status, details = await answer(client, GENERATE, data)
            assert status is grpc.StatusCode.NOT_FOUND and details.startswith("model ")
        data = request(request_id="x" * 1_000_000).SerializeToString()
        status, details = await answer(client, GENERATE, data)
        assert status is grpc.StatusCode.INVALID_ARGUMENT and details.startswith("request_id has")

    inflict(server, expected, fault, kept=16 << 20)


# ---------------------------------------------------------------- processes that are killed


Ends = list["asyncio.Task[str]"]


async def fill(client: GrpcClient, waiting: list[pb.GenerateRequest]) -> tuple[Ends, Ends]:
    """The ends of calls: endless ones that take all the places and have had their first tokens, and
    those that wait for a place."""
    running = [asyncio.create_task(end(call)) for call in await streaming(client, 16)]
    calls = [client.stub.Generate(each) for each in waiting]
    while (await client.stats()).num_waiting < len(waiting):
        await asyncio.sleep(0.001)
    return running, [asyncio.create_task(end(call)) for call in calls]


def test_killed_engine(endless_model: Path, expected: list[int], tmp_path: Path) -> None:
    """Calls in progress end at once, health says so, and the service comes back by itself."""
    # As long as it is away, the engine cannot come back.
    model = Path(shutil.copy(endless_model, tmp_path / "model.gguf"))
    away = tmp_path / "away"

    async def main(server: ServerProcess) -> None:
        async with GrpcClient(server.address) as client:
            await client.wait_until_serving()
            await probe(client, expected)
            files = server.num_open_files()
            for _ in range(2):
                front_end, engine = server.pids()
                watch = client.health.Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == SERVING
                running, waiting = await fill(client, [request(ENDLESS)] * 8)
                model.rename(away)
                os.kill(engine, signal.SIGKILL)
                assert set(await asyncio.gather(*running, *waiting)) == {"UNAVAILABLE"}
                assert (await watch.read()).status == NOT_SERVING
                status = await client.health.Check(health_pb2.HealthCheckRequest())
                assert status.status == NOT_SERVING
                assert await end(client.stub.Generate(request())) == "UNAVAILABLE"
                away.rename(model)
                assert (await watch.read()).status == SERVING
                watch.cancel()
                await probe(client, expected)
                await client.wait_until_idle()
                assert server.pids()[0] == front_end and server.pids()[1:] != [engine]
                eventually("no file is left open", lambda: server.num_open_files() <= files)

    with ServerProcess(GRPC, model, *ENDLESS_OPTIONS) as server:
        asyncio.run(asyncio.wait_for(main(server), timeout=PATIENCE))
        assert server.stop() == 0
        assert "SIGKILL" in server.err and "Traceback" not in server.err


def test_killed_front_end(endless_model: Path) -> None:
    """The engine ends with it, in whatever it is doing, and nothing is left."""

    async def main(server: ServerProcess) -> None:
        async with GrpcClient(server.address) as client:
            await client.wait_until_serving()
            await streaming(client, 16)
            pids = server.pids()
            assert len(pids) == 2
            server.process.kill()
            server.process.wait()
            eventually("the engine ends", lambda: not any(map(is_alive, pids)))

    with ServerProcess(GRPC, endless_model, *ENDLESS_OPTIONS) as server:
        asyncio.run(asyncio.wait_for(main(server), timeout=PATIENCE))
        assert "Traceback" not in server.err


@pytest.mark.parametrize("enough_time", [False, True])
def test_sigterm_under_load(endless_model: Path, enough_time: bool) -> None:
    """No new calls; those in progress end well if there is time, or else with UNAVAILABLE."""

    async def main(server: ServerProcess) -> None:
        async with GrpcClient(server.address) as client:
            await client.wait_until_serving()
            length = 400 if enough_time else ENDLESS
            running, waiting = await fill(client, [request(length)] * 8)
            watch = client.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            pids = server.pids()
            server.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING
            assert await end(client.stub.Generate(request())) == "UNAVAILABLE"
            if enough_time:
                for task in running:
                    task.cancel()
                assert await asyncio.gather(*waiting) == ["400 tokens"] * 8
            else:
                assert set(await asyncio.gather(*running, *waiting)) == {"UNAVAILABLE"}
            eventually("both processes end", lambda: not any(map(is_alive, pids)))

    options = (*ENDLESS_OPTIONS, "--drain-timeout", "600" if enough_time else "0.05")
    with ServerProcess(GRPC, endless_model, *options) as server:
        asyncio.run(asyncio.wait_for(main(server), timeout=PATIENCE))
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.err
