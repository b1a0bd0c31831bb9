"""HTTP clients that go, stall, send halves, or come all at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import Gate, load_alphabet
from openai_harness import LONG, SAY, TEXT, Client, collect, request_bytes, run, serve, texts_of
from waiting import PATIENCE, until

from fastpage.serving.openai import server as http_server
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.server import HttpOptions

DISCONNECTS = [
    ("/v1/completions", {"prompt": "a", "stream": True, **LONG}),
    ("/v1/completions", {"prompt": "a", **LONG}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 3, "stream": True, **LONG}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 3, **LONG}),
    ("/v1/chat/completions", {**SAY, "n": 2, "stream": True, **LONG}),
    ("/v1/chat/completions", {**SAY, "beam_width": 3, **LONG}),
    ("/generate", {"prompt": "a", "stream": True, **LONG}),
]


@pytest.mark.parametrize(("path", "body"), DISCONNECTS)
def test_a_client_that_goes_frees_its_blocks(path: str, body: Any) -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        _reader, writer = await client.post(path, body)
        gate.open(4)
        await until(lambda: client.engine.stats().num_steps >= 3)
        assert client.scheduler.num_running > 0
        writer.close()
        await until(lambda: not client.engine._streams)
        gate.open(2)  # aborts are taken in between two steps
        await client.wait_until_idle()
        assert client.engine.stats().num_steps <= 6

    run(test, before_step=gate)


def test_a_client_that_goes_while_it_waits_or_sends() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        running = asyncio.create_task(client.complete("a"))
        await until(lambda: client.scheduler.num_running)
        _, writer = await client.post("/v1/completions", {"prompt": "a", **LONG})
        await until(lambda: client.scheduler.num_waiting)
        writer.close()
        await until(lambda: len(client.engine._streams) == 1)
        _, writer = await client.connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        writer.close()
        gate.open(50)
        assert texts_of(await running) == ["bcdef"]

    run(test, before_step=gate, max_num_seqs=1)


def test_requests_sent_ahead_end_the_connection() -> None:
    gate = Gate()

    async def test(client: Client) -> None:
        reader, writer = await client.post("/v1/completions", {"prompt": "a", **LONG})
        await until(lambda: client.scheduler.num_running)
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await until(lambda: not client.engine._streams)
        gate.open(5)

    run(test, before_step=gate)


class LoopClock:
    """The clock of the event loop that it is made on, which can be put forward."""

    def __init__(self) -> None:
        self._ahead = 0.0
        loop = asyncio.get_running_loop()
        loop.time = lambda: time.monotonic() + self._ahead  # type: ignore[method-assign]

    def put_forward(self, seconds: float) -> None:
        self._ahead += seconds


def test_half_sent_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the test puts forward: nothing depends on how fast the two sides are."""
    monkeypatch.setattr(http_server, "_KEEP_ALIVE_SECONDS", 10 * PATIENCE)

    async def test(client: Client) -> None:
        clock = LoopClock()
        too_long = limits.request_timeout_seconds + 1

        async def hangs_up(reader: asyncio.StreamReader) -> bool:
            rest = asyncio.ensure_future(reader.read())
            while not rest.done():
                clock.put_forward(too_long)
                await asyncio.sleep(0.01)
            return isinstance(rest.exception(), ConnectionResetError) or rest.result() == b""

        halves = (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nA: b\r\n")
        for half in halves:
            reader, writer = await client.connect()
            writer.write(half)
            assert await hangs_up(reader)
            writer.close()
        reader, writer = await client.connect()
        writer.write(
            b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n"
        )
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")  # it waits for the body
        writer.write(b"{")
        clock.put_forward(too_long)
        assert b" 408 " in await reader.readline()
        writer.close()
        # Headers without end.
        reader, writer = await client.connect()
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /health HTTP/1.1\r\n")
            for _ in range(100):
                writer.write(b"A: " + b"b" * 10_000 + b"\r\n")
                await writer.drain()
            await reader.read()
        writer.close()
        # A body that nobody waits for, not even after a part of it has come.
        reader, writer = await client.connect()
        writer.write(b"GET /health HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        await reader.readuntil(b'"ready"}')
        writer.write(b"x")
        assert await hangs_up(reader)
        writer.close()
        # A connection that is used goes on, for as long as one likes.
        reader, writer = await client.connect()
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"status":"ready"}'))
            clock.put_forward(2 * too_long)
            await asyncio.sleep(0.01)  # what is due now comes first
        writer.close()

    limits = Limits(request_timeout_seconds=PATIENCE)

    async def main() -> None:
        async with serve(load_alphabet(), HttpOptions(limits=limits)) as client:
            await test(client)

    asyncio.run(main())


@pytest.mark.parametrize("part", [b"A: b\r\n", b"A: b"], ids=["many", "one without end"])
def test_trailers_have_an_end(part: bytes) -> None:
    """Headers behind a body, which are no headers of the request."""

    async def test(client: Client) -> None:
        chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()
        reader, writer = await client.connect()
        writer.write(b"POST /generate HTTP/1.1\r\n" + chunked)
        writer.write(b"%x\r\n%b\r\n0\r\nX-Request-Id: mine\r\n\r\n" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head and b"mine" not in head
        writer.close()
        reader, writer = await client.connect()
        writer.write(b"GET /health HTTP/1.1\r\n" + chunked + b"0\r\n")
        await reader.readuntil(b'"ready"}')
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(part * 10_000)
                await writer.drain()
            assert await reader.read() == b""
        writer.close()

    run(test)


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    path = str(tmp_path / "http.sock")  # what lies between the two is small there

    async def test(client: Client) -> None:
        # Few steps that say much: the log probabilities of all letters.
        body = {"prompt": ["a"] * 8, "n": 2, "logprobs": 29, "stream": True, **LONG}
        stalled = socket.socket(socket.AF_UNIX)
        stalled.connect(path)
        stalled.sendall(request_bytes("/v1/completions", body))
        poll = select.poll()
        poll.register(stalled, select.POLLRDHUP)
        hung_up = await asyncio.to_thread(poll.poll, 1000 * PATIENCE)
        assert hung_up, "the connection is still there"
        await client.wait_until_idle()
        stalled.close()
        client.url = "http://localhost"
        status, _, _ = await client.request("/v1/completions", TEXT, "--unix-socket", path)
        assert status == 200

    limits = Limits(slow_client_timeout_seconds=0.2)
    run(test, http=HttpOptions(uds=path, limits=limits))


def test_many_streams_at_once() -> None:
    async def test(client: Client) -> None:
        async def one(i: int) -> None:
            start = i % 26
            prompt = chr(ord("a") + start)
            stream = await client.complete(prompt, stream=True, max_tokens=20 + i % 7)
            texts, _ = await collect(stream)
            expected = "".join(chr(ord("a") + (start + 1 + k) % 26) for k in range(20 + i % 7))
            assert texts == {0: expected}

        await asyncio.gather(*(one(i) for i in range(100)))

    run(test)
