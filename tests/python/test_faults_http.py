"""As test_faults.py, over HTTP: clients that vanish or send half, bodies that are no requests."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import raw_http2 as raw
from malformed import PROMPT, malformed_json
from server_process import (
    ENDLESS,
    ENDLESS_OPTIONS,
    HTTP,
    MemoryRecord,
    ServerProcess,
    write_endless_model,
    write_tiny_model,
)
from test_faults import NUM_MALFORMED, OPTIONS, SEED
from waiting import PATIENCE

from fastpage import LLM, SamplingParams

SAMPLING = {"temperature": 0.9, "seed": 11, "ignore_eos": True}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": PROMPT, "max_tokens": 3, **SAMPLING},
        {"prompt": [1, 2, 3], "max_tokens": 3, "n": 2, "logprobs": 2, "echo": True},
        {"prompt": [[1, 2], [3]], "max_tokens": 3, "stream": True, "stop": ["e", " ="]},
        {"prompt": PROMPT, "max_tokens": 4, "beam_width": 3, "n": 2, "temperature": 0},
        {"prompt": PROMPT, "max_tokens": 9, "logit_bias": {"5": 3.0}, "stream_options": None},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, **SAMPLING},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "y"}]},
                {"role": "user", "content": "x"},
            ],
            "max_completion_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {"a": [1, {"b": None}]},
        },
    ],
    "/generate": [{"prompt": PROMPT, "max_tokens": 3, "n": 2, "stream": True, **SAMPLING}],
    "/tokenize": [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": "x"}]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
JSON = {"Content-Type": "application/json"}
REFUSALS = {400, 404, 409, 413, 429}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> str:
    llm = LLM(str(tiny_model), threads=1)
    params = SamplingParams(max_tokens=40, **SAMPLING)
    return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text


def serve(model: Path, *options: str) -> Iterator[ServerProcess]:
    with ServerProcess(HTTP, model, *options) as server:
        yield server
        assert server.stop() == 0, server.err
        assert "Traceback" not in server.err and "rror" not in server.err, server.err


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    yield from serve(tiny_model, *OPTIONS)


@pytest.fixture(scope="module")
def endless_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("model") / "endless.gguf"
    yield from serve(write_endless_model(path), *ENDLESS_OPTIONS)


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while (await client.get("/health")).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def wait_until_idle(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        load = (await client.get("/load")).json()
        if load["server_load"] == 0 and load["kv_cache_usage"] == 0:
            return
        assert time.monotonic() < deadline, f"left over: {load}"
        await asyncio.sleep(0.01)


async def probe(client: httpx.AsyncClient, expected: str) -> None:
    answer = await client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 40, **SAMPLING}
    )
    assert answer.json()["choices"][0]["text"] == expected


Fault = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


def inflict(
    server: ServerProcess, expected: str, fault: Fault, rounds: int = 6, kept: int = 4 << 20
) -> None:
    """See test_faults.py."""

    async def main() -> None:
        url, limits = f"http://{server.address}", httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            await wait_until_ready(client)
            await probe(client, expected)
            files = server.num_open_files()
            memory = MemoryRecord(server, kept)
            is_flat = False
            while not is_flat:
                await fault(client)
                await wait_until_idle(client)
                await probe(client, expected)
                is_flat = memory.is_flat(rounds)
            await client.aclose()
            while server.num_open_files() > files:  # a connection is closed a moment later
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), timeout=600))


def head(path: str, length: int, *more: str) -> bytes:
    json = "Content-Type: application/json"
    lines = (f"POST {path} HTTP/1.1", "Host: x", json, f"Content-Length: {length}", *more)
    return "\r\n".join((*lines, "", "")).encode()


LONG = b'{"prompt": "a", "max_tokens": %d, "ignore_eos": true, "stream": true}' % ENDLESS


def test_clients_that_vanish(endless_server: ServerProcess, expected: str) -> None:
    """Of streams and of answers that come in one piece."""

    async def fault(client: httpx.AsyncClient) -> None:
        whole = LONG.replace(b"true}", b"false}")
        connections = []
        for i in range(8):
            body = LONG if i % 2 else whole
            connections.append(connection := raw.connect(endless_server.address))
            connection.sendall(head("/v1/completions", len(body)) + body)
        while (await client.get("/load")).json()["num_running"] < 8:
            await asyncio.sleep(0.001)
        for i, connection in enumerate(connections):
            raw.reset(connection) if i // 2 % 2 else connection.close()

    inflict(endless_server, expected, fault)


def half_sent() -> list[bytes]:
    start, path = head("/v1/completions", len(LONG)), "/v1/completions"
    return [
        b"",
        b"POST",
        start[:30],
        start,
        start + LONG[:20],
        head(path, 10**15) + LONG,
        head(path, -1) + LONG,
        head(path, 5) + LONG,
        head(path, len(LONG), "Expect: 100-continue"),
        head(path, len(LONG), "Transfer-Encoding: chunked") + b"5\r\nabc",
        head(path, len(LONG)).replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX: ")
        + b"ffffffffffffffffff\r\nabc",
        head("/" + "x" * 100_000, 0),
        head(path, 0, "X: " + "y" * 200_000),
        head(path, 0, *(f"X-{i}: y" for i in range(10_000))),
        start.replace(b"HTTP/1.1", b"HTTP/9.9") + LONG,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        Random(SEED).randbytes(4000),
        start + LONG + start + LONG,  # the next one before the answer
    ]


def test_half_sent_requests(server: ServerProcess, expected: str) -> None:
    async def fault(client: httpx.AsyncClient) -> None:
        connections = []
        for part in half_sent() * 3:
            connections.append(connection := raw.connect(server.address))
            connection.setblocking(False)
            connection.send(part)
        await probe(client, expected)  # while they are open
        for i, connection in enumerate(connections):
            raw.reset(connection) if i % 2 else connection.close()

    inflict(server, expected, fault)


def test_half_sent_requests_are_given_up(tiny_model: Path) -> None:
    async def main(server: ServerProcess) -> None:
        readers = []
        for part in (b"", b"POST", head("/v1/completions", 99), head("/generate", 99) + b"{"):
            reader, writer = await asyncio.open_connection(*server.address.rsplit(":", 1))
            writer.write(part)
            readers.append(reader)
        for reader in readers:
            with contextlib.suppress(ConnectionResetError):
                await reader.read()  # until the server closes it

    for server in serve(tiny_model, *OPTIONS, "--request-timeout", "0.1"):
        asyncio.run(asyncio.wait_for(main(server), timeout=PATIENCE))


def test_malformed_bodies(server: ServerProcess, expected: str) -> None:
    rng = Random(SEED)
    statuses: collections.Counter[int] = collections.Counter()

    async def one(client: httpx.AsyncClient) -> None:
        path = rng.choice(list(BODIES))
        body = malformed_json(rng, BODIES[path])
        answer = await client.post(path, content=body, headers=JSON)
        statuses[answer.status_code] += 1
        said = f"{path} {body[:2000]!r}: {answer.status_code} {answer.text:.500} (seed {SEED})"
        assert answer.status_code == 200 or answer.status_code in REFUSALS, said
        if answer.status_code != 200:
            assert answer.json()["error"]["message"].isprintable(), said

    async def many(client: httpx.AsyncClient, count: int) -> None:
        for _ in range(count):
            await one(client)

    async def fault(client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(many(client, NUM_MALFORMED // (9 * 16) + 1) for _ in range(16)))

    inflict(server, expected, fault, rounds=9, kept=8 << 20)
    print(f"HTTP, seed {SEED}: {dict(statuses)}")
    assert len(statuses) > 2


def test_huge_bodies(server: ServerProcess, expected: str) -> None:
    async def fault(client: httpx.AsyncClient) -> None:
        for text, status in (("x" * 10_000_000, 413), ("x" * 2_000_000, 400)):
            answer = await client.post("/generate", json={"prompt": text})
            assert answer.status_code == status, answer.text[:500]
            assert answer.json()["error"]["message"]

    inflict(server, expected, fault, rounds=3, kept=256 << 20)
