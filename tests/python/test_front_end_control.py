"""What a parent and its front ends say to one another, and what comes of their metrics."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from fastpage.serving.front_ends.control import Control, ControlClosed
from fastpage.serving.metrics.calls import http_requests
from fastpage.serving.metrics.recorder import EngineMetrics
from fastpage.serving.metrics.shared import SharedMetrics, snapshot


class End:
    """A Control, and what has come to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.told: list[Any] = []
        self.news = asyncio.Event()
        self.ended = asyncio.Event()
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        handlers = {"tell": self._tell, "double": lambda n: 2 * n, "later": self._later}
        self.control = Control(sock, handlers, self.ended.set)

    def _tell(self, **fields: Any) -> None:
        self.told.append(fields)
        self.news.set()

    async def _later(self, n: int) -> int:
        self.asked.set()
        await self.may_answer.wait()
        return n


def ends() -> tuple[End, End]:
    a, b = socket.socketpair()
    return End(a), End(b)


def test_questions_are_answered_in_any_order() -> None:
    async def main() -> None:
        a, b = ends()
        later = asyncio.ensure_future(a.control.ask("later", n=1))
        await b.asked.wait()
        assert await a.control.ask("double", n=3) == 6
        assert await b.control.ask("double", n=4) == 8
        b.may_answer.set()
        assert await later == 1
        a.control.close()
        await b.ended.wait()

    asyncio.run(main())


def test_long_messages_and_sockets_come_in_order() -> None:
    async def main() -> None:
        a, b = ends()
        pairs = [socket.socketpair() for _ in range(20)]
        for i, (_, theirs) in enumerate(pairs):
            a.control.tell("tell", theirs, number=i)
            a.control.tell("tell", text="x" * 300_000)  # more than a socket's buffer
        while len(b.told) < 40:
            b.news.clear()
            await b.news.wait()
        for i, (ours, _) in enumerate(pairs):
            told, long = b.told[2 * i : 2 * i + 2]
            assert told["number"] == i and len(long["text"]) == 300_000
            with ours, told["sock"] as theirs:
                theirs.sendall(bytes([i]))
                assert ours.recv(1) == bytes([i])
        a.control.close()
        await b.ended.wait()

    asyncio.run(main())


def test_who_asks_hears_of_the_end() -> None:
    async def main() -> None:
        a, b = ends()
        asking = asyncio.ensure_future(a.control.ask("later", n=1))
        await b.asked.wait()
        b.control.close()
        await a.ended.wait()
        with pytest.raises(ControlClosed):
            await asking
        with pytest.raises(ControlClosed):
            await a.control.ask("double", n=1)
        ours, theirs = socket.socketpair()
        a.control.tell("tell", theirs)
        assert ours.recv(1) == b""  # it is closed, not lost

    asyncio.run(main())


class FrontEnd:
    def __init__(self) -> None:
        self.metrics, self.calls = EngineMetrics(), http_requests()

    def counted(self, tokens: int, calls: int) -> Any:
        self.metrics.engine = object()  # type: ignore[assignment]
        self.metrics.num_generation_tokens += tokens
        self.metrics.finished["stop"] += 1
        self.metrics.time_to_first_token.observe(0.03)
        for _ in range(calls):
            self.calls.add("/generate", "POST", "2xx")
        return snapshot(self.metrics, self.calls)


def test_counts_are_added_up_and_outlive_their_front_end() -> None:
    shared, calls = SharedMetrics(), http_requests()
    shared.expose(EngineMetrics(), calls)
    a, b = FrontEnd(), FrontEnd()
    shared.take_in(0, snapshot(a.metrics, a.calls))  # before there is an engine
    shared.take_in(0, a.counted(5, calls=1))
    shared.take_in(1, b.counted(7, calls=2))
    shared.take_in(0, a.counted(1, calls=0))
    assert shared.engine.num_generation_tokens == 13
    shared.forget(0)
    shared.take_in(0, FrontEnd().counted(100, calls=1))
    shared.forget(1)
    assert shared.engine.num_generation_tokens == 113
    assert shared.engine.finished["stop"] == 4
    assert sum(shared.engine.time_to_first_token.counts) == 4
    assert shared.engine.time_to_first_token.total == pytest.approx(0.12)
    assert calls.counts == {("/generate", "POST", "2xx"): 4}
