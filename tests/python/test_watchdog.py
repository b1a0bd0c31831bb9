"""An engine process that hangs is killed and started again; one whose front end was away is not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import Gate, load_alphabet, serve_on_a_thread
from grpc_harness import text_request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import (
    GRPC,
    NOT_SERVING,
    SERVING,
    ServerProcess,
    is_alive,
    write_tiny_model,
)
from waiting import PATIENCE

from fastpage import AsyncEngine, EngineArgs, SamplingParams
from fastpage.engine.channel_core import ChannelCore
from fastpage.engine.core import EngineHung
from fastpage.engine.observer import EngineObserver
from fastpage.engine.process_core import ProcessCore
from fastpage.engine.watchdog import Watchdog
from fastpage.errors import InvalidArgument
from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

# No look comes by itself while a test lasts: the tests look when they want to.
NEVER = 8e6
LOOKS = 8
TINY = {"num_kv_blocks": 64, "max_model_len": 512, "threads": 1}
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test, timeout=2 * PATIENCE)

    asyncio.run(main())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("watchdog") / "tiny.gguf")


# ---------------------------------------------------------------- the rule


class Dog:
    """A Watchdog on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.num_pings = 0
        self.bites = 0
        self.watchdog = Watchdog(NEVER, self._ping, self._hangs, clock=lambda: self.now)
        self.watchdog.start()

        self.ping_error: Exception | None = None

    def _ping(self) -> None:
        self.num_pings += 1
        if self.ping_error is not None:
            raise self.ping_error

    def _hangs(self) -> None:
        self.bites += 1

    def look(self, times: int = 1, late: float = 0.0) -> None:
        """`late`: in intervals."""
        for _ in range(times):
            self.now += (1 + late) * NEVER / LOOKS
            self.watchdog.look()


def test_silence_for_the_whole_time_is_a_hang() -> None:
    async def test() -> None:
        dog = Dog()
        dog.look(LOOKS)
        assert (dog.bites, dog.num_pings) == (0, LOOKS - 1)  # the first look is the start's
        dog.look()
        assert dog.bites == 1
        assert dog.watchdog._timer is None

    run(test())


def test_a_step_is_as_good_as_an_answer_and_costs_no_ping() -> None:
    async def test() -> None:
        dog = Dog()
        for _ in range(3 * LOOKS):
            dog.watchdog.heard = True
            dog.look()
        assert (dog.bites, dog.num_pings) == (0, 0)

    run(test())


def test_an_answer_counts_if_the_engine_got_further_since_the_last_one() -> None:
    async def test() -> None:
        dog = Dog()
        for progress in range(3 * LOOKS):
            dog.look()
            dog.watchdog.answered(progress)
        assert dog.bites == 0
        for _ in range(LOOKS):
            dog.look()
            dog.watchdog.answered(progress)
        dog.look()
        assert dog.bites == 1

    run(test())


def test_a_pause_of_the_front_end_is_no_hang_however_long() -> None:
    async def test() -> None:
        dog = Dog()
        for pause in (2, LOOKS, 1000, 1e9):
            dog.look(LOOKS - 1)  # almost
            dog.look(late=pause)
            assert dog.bites == 0
        dog.look(100, late=1.5)  # stop and go
        assert dog.bites == 0
        dog.look(LOOKS)
        assert dog.bites == 1

    run(test())


def test_who_cannot_ask_learns_nothing_and_goes_on_looking() -> None:
    async def test() -> None:
        dog = Dog()
        dog.ping_error = MemoryError()
        dog.look(3 * LOOKS)
        assert dog.bites == 0
        assert dog.watchdog._timer is not None
        dog.ping_error = None
        dog.look(LOOKS + 1)
        assert dog.bites == 1

    run(test())


def test_options() -> None:
    for value in (0, 0.0, 1, 2.5, 3600):
        assert EngineArgs(model="m", engine_timeout=value).engine_timeout == value
    for value in (-1, 0.5, float("inf"), float("nan"), True, "60", None):
        with pytest.raises(InvalidArgument, match=f"engine_timeout={value!r}"):
            EngineArgs(model="m", engine_timeout=value)  # type: ignore[arg-type]


# ---------------------------------------------------------------- behind a channel


class Listened(ChannelCore):
    """Says when a ping was answered."""

    def __init__(self) -> None:
        super().__init__(NEVER)
        self.answers: asyncio.Queue[int] = asyncio.Queue()
        answered = self._watchdog.answered
        self._watchdog.answered = lambda n: (answered(n), self.answers.put_nowait(n))  # type: ignore[assignment]

    async def look(self) -> None:
        """Once, and waits for the answer if it asked."""
        asked = not self._watchdog.heard
        self._watchdog.look()
        if asked and self.ready:
            await self.answers.get()


def test_an_engine_that_answers_but_is_stuck_in_a_step_hangs() -> None:
    gate = Gate()

    async def test() -> None:
        loaded = load_alphabet(gate)
        with serve_on_a_thread(loaded) as fileno:
            core = Listened()
            core.open(fileno)
            engine = AsyncEngine(loaded, core=core)
            async with engine:
                core.start(engine)
                for _ in range(3 * LOOKS):  # nothing to do: it is well
                    await core.look()
                assert core.ready
                stream = await engine.add_request("abc", SHORT)
                gate.open()
                await anext(stream)
                while core.ready:
                    await core.look()
                with pytest.raises(EngineHung, match="got nowhere"):
                    async for _ in stream:
                        pass
                gate.open(1000)

    run(test())


# ---------------------------------------------------------------- processes


class Watcher(EngineObserver):
    def __init__(self) -> None:
        self.back = asyncio.Event()
        self.error: Exception | None = None

    def engine_died(self, error: Exception) -> None:
        self.error = error

    def engine_started(self, engine: AsyncEngine) -> None:
        if self.error is not None:
            self.back.set()


def test_a_process_that_hangs_is_killed_and_comes_back(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        watcher = Watcher()
        args = EngineArgs(model=str(tiny), engine_timeout=NEVER, **TINY)
        engine = await AsyncEngine.start_process(args, watcher)
        core = engine._core
        assert isinstance(core, ProcessCore)
        async with engine:
            (expected,) = (await last_of(engine)).outputs
            pid = core.pid
            os.kill(pid, signal.SIGSTOP)
            request = asyncio.create_task(last_of(engine))
            while core.ready:
                core._watchdog.look()
                await asyncio.sleep(0)
            with pytest.raises(EngineHung, match=r"got nowhere for 8e\+06 s"):
                await request
            assert isinstance(watcher.error, EngineHung)
            assert core._watchdog._timer is None  # while it loads, nobody looks
            await watcher.back.wait()
            assert not is_alive(pid)
            assert core._watchdog._timer is not None
            assert (await last_of(engine)).outputs[0].token_ids == expected.token_ids

    with caplog.at_level(logging.WARNING, logger="fastpage.engine"):
        run(test())
    assert "got nowhere for 8e+06 s (engine_timeout): it is killed" in caplog.text
    assert "has ended: it was killed" in caplog.text and "out of memory" not in caplog.text


async def last_of(engine: AsyncEngine) -> Any:
    return [output async for output in engine.generate([5, 6, 7], SHORT)][-1]


def test_without_a_timeout_nobody_looks(tiny: Path) -> None:
    async def test() -> None:
        args = EngineArgs(model=str(tiny), engine_timeout=0, **TINY)
        async with await AsyncEngine.start_process(args) as engine:
            assert isinstance(engine._core, ProcessCore)
            assert engine._core._watchdog._timer is None

    run(test())


# Stopped and continued, it has the event loop run a few times: each may look once, and a hang takes
# eight. The engine is stopped all the while, so that it is the pause alone that must not count.
_FRONT_END = """
import asyncio, os, signal, sys
from fastpage import AsyncEngine, EngineArgs, SamplingParams

async def main():
    args = EngineArgs(
        model=sys.argv[1], engine_timeout=1, num_kv_blocks=64, max_model_len=512, threads=1
    )
    engine = await AsyncEngine.start_process(args)
    core = engine._core
    os.kill(core.pid, signal.SIGSTOP)
    print("stopping", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(5):
        await asyncio.sleep(0)
    print("ready" if engine.ready else "gone", flush=True)
    core._watchdog.stop()
    os.kill(core.pid, signal.SIGCONT)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    outputs = [output async for output in engine.generate([5, 6, 7], params)]
    print(len(outputs[-1].outputs[0].token_ids), flush=True)
    await engine.shutdown()

asyncio.run(main())
"""


def test_a_front_end_that_was_stopped_for_longer_goes_on(tiny: Path) -> None:
    front_end = subprocess.Popen(
        [sys.executable, "-c", _FRONT_END, str(tiny)], stdout=subprocess.PIPE, text=True
    )
    assert front_end.stdout is not None
    assert front_end.stdout.readline() == "stopping\n"
    pid, status = os.waitpid(front_end.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(1.5)  # longer than engine_timeout
    os.kill(pid, signal.SIGCONT)
    assert front_end.communicate(timeout=PATIENCE)[0] == "ready\n3\n"
    assert front_end.returncode == 0


def test_calls_of_a_server_whose_engine_hangs_end(tiny: Path) -> None:
    options = ("--engine-timeout", "1", "--num-kv-blocks", "64", "--max-model-len", "512")
    with (
        ServerProcess(GRPC, tiny, *options) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        statuses = health.Watch(health_pb2.HealthCheckRequest(), timeout=2 * PATIENCE)
        wait_for(statuses, SERVING)
        stub = pb_grpc.FastpageStub(channel)
        stop_the_engine_until_it_counts_as_hung(server, stub)
        wait_for(statuses, NOT_SERVING)
        wait_for(statuses, SERVING)
        # On a machine that is away for a second it may be killed once more.
        request = text_request("the", max_tokens=3)
        answer = until_available(lambda: stub.GenerateUnary(request, timeout=PATIENCE))
        assert answer.outputs
        assert server.stop() == 0
        assert "got nowhere for 1 s (engine_timeout): it is killed" in server.err


def stop_the_engine_until_it_counts_as_hung(server: ServerProcess, stub: Any) -> None:
    """On a machine that is away for a second an engine may count as hung at any moment. What is
    stopped then is the next one, which loads: nobody looks at that."""
    why = ""
    while "got nowhere for 1 s" not in why:
        engines = server.pids()[1:]
        signal_all(engines, signal.SIGSTOP)
        try:
            stub.GenerateUnary(text_request("the"), timeout=PATIENCE)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            why = error.details()
        signal_all(engines, signal.SIGCONT)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for(statuses: Iterator[health_pb2.HealthCheckResponse], wanted: int) -> None:
    while next(statuses).status != wanted:
        pass


def until_available(call: Callable[[], pb.GenerateResponse]) -> pb.GenerateResponse:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() < deadline
            time.sleep(0.05)
