"""The engine in a process of its own: the same answers, and what happens when a side dies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from server_process import ENDLESS, is_alive, write_endless_model, write_tiny_model
from waiting import PATIENCE, until

from fastpage import _C, LLM, AsyncEngine, EngineArgs, SamplingParams
from fastpage.engine import engine_process as engine_process_module
from fastpage.engine.core import EngineDied
from fastpage.engine.loading import load_model
from fastpage.engine.observer import EngineObserver
from fastpage.engine.process_core import ProcessCore, _Process
from fastpage.errors import CheckpointError, ModelError, ResourceExhausted

SMALL = {"kv_cache_memory": "64MiB", "max_model_len": 512, "threads": 1}
ROOM_FOR_ENDLESS = {"num_kv_blocks": 16384, "threads": 1}
PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG = SamplingParams(temperature=0.0, max_tokens=ENDLESS, ignore_eos=True)


class Watcher(EngineObserver):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.back = asyncio.Event()

    def engine_died(self, error: EngineDied) -> None:
        self.events.append("died")

    def engine_started(self, engine: AsyncEngine) -> None:
        self.events.append("started")
        if "died" in self.events:
            self.back.set()


@contextlib.asynccontextmanager
async def engine_process(
    model: Path, observer: EngineObserver | None = None, **options: Any
) -> AsyncIterator[tuple[AsyncEngine, ProcessCore]]:
    args = EngineArgs(model=str(model), **(options or ROOM_FOR_ENDLESS))
    engine = await AsyncEngine.start_process(args, observer)
    core = engine._core
    assert isinstance(core, ProcessCore)
    async with engine:
        yield engine, core
    await gone(core.pid)


async def gone(pid: int) -> None:
    await until(lambda: not is_alive(pid), f"process {pid} is still there")


async def text_of(engine: AsyncEngine, params: SamplingParams = GREEDY) -> str:
    return [output async for output in engine.generate(PROMPT, params)][-1].outputs[0].text


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("model") / "endless.gguf")


@pytest.fixture(scope="module")
def expected(endless_model: Path) -> str:
    llm = LLM(str(endless_model), **ROOM_FOR_ENDLESS)
    return llm.generate(PROMPT, GREEDY)[0].outputs[0].text


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=PATIENCE))


def test_answers_are_those_of_the_engine_in_process(smollm2_gguf: Path) -> None:
    llm = LLM(str(smollm2_gguf), **SMALL)
    expected = llm.generate(PROMPT, GREEDY)[0].outputs[0].text

    async def main() -> None:
        async with engine_process(smollm2_gguf, **SMALL) as (engine, _):
            assert engine.ready
            # It says so without being asked.
            await until(lambda: engine.stats().scheduler.num_blocks)
            assert await asyncio.gather(*(text_of(engine) for _ in range(4))) == [expected] * 4
            assert engine.info.max_model_len == 512
            assert engine.stats().scheduler.num_blocks == engine.info.num_kv_blocks
            assert engine.stats().scheduler.prefix_cache_queries > 0
            assert await engine.reset_prefix_cache()
            assert "engine weights" in engine.phases

    run(main())


def test_what_the_core_refuses_is_raised_by_add_request(endless_model: Path) -> None:
    async def main() -> None:
        options = {**ROOM_FOR_ENDLESS, "max_num_waiting": 2, "max_num_seqs": 1}
        async with engine_process(endless_model, **options) as (engine, _):
            with pytest.raises(ValueError, match="max_model_len"):
                await engine.add_request([7] * 300_000, GREEDY)
            streams = []
            with pytest.raises(ResourceExhausted, match="max_num_waiting") as refusal:
                while True:
                    streams.append(await engine.add_request(PROMPT, LONG))
            assert refusal.value.retry_after_seconds > 0
            assert len(engine._streams) == len(streams)
            for stream in streams:
                stream.abort()
            assert not engine._streams

    run(main())


def test_the_queue_is_bounded_in_tokens_too(endless_model: Path) -> None:
    async def main() -> None:
        options = {**ROOM_FOR_ENDLESS, "max_num_waiting_tokens": 1000, "max_num_seqs": 1}
        async with engine_process(endless_model, **options) as (engine, _):
            running = await engine.add_request(PROMPT, LONG)
            await anext(running)
            queued = [await engine.add_request([7] * 400, GREEDY) for _ in range(2)]
            with pytest.raises(ResourceExhausted, match="max_num_waiting_tokens"):
                await engine.add_request([7] * 400, GREEDY)
            for stream in [running, *queued]:
                stream.abort()

    run(main())


@pytest.mark.parametrize("blocks", [32, 64])
def test_by_default_16_caches_full_of_prompts_may_wait(tmp_path: Path, blocks: int) -> None:
    tiny = str(write_tiny_model(tmp_path / "tiny.gguf"))
    settings = {"num_kv_blocks": blocks, "max_model_len": 512, "threads": 1}
    params = _C.SamplingParams(max_tokens=2)
    loaded = load_model(EngineArgs(model=tiny, **settings))
    waiting = 0
    with pytest.raises(ResourceExhausted, match="max_num_waiting_tokens"):
        while True:
            loaded.engine.add_request([5] * 256, params)
            waiting += 256
    assert waiting == 16 * blocks * loaded.info.block_size

    # A list of prompts is to be done, however long it is.
    llm = LLM(tiny, **settings)
    for _ in range(2 * waiting // 256):
        llm._core.add_request([5] * 256, params)


def test_a_model_that_cannot_be_loaded_is_an_error_here(tmp_path: Path) -> None:
    async def main() -> None:
        unheard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, error: unheard.append(error))
        missing = EngineArgs(model=str(tmp_path / "missing"))
        with pytest.raises((CheckpointError, ModelError), match="missing"):
            await AsyncEngine.start_process(missing)
        await asyncio.sleep(0)  # the loop still holds what is done
        gc.collect()
        assert not unheard

    run(main())


def test_an_engine_that_is_killed_comes_back(
    endless_model: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        watcher = Watcher()
        async with engine_process(endless_model, watcher) as (engine, core):
            first_pid = core.pid
            stream = await engine.add_request(PROMPT, LONG)
            await anext(stream)
            os.kill(first_pid, signal.SIGKILL)
            with pytest.raises(EngineDied):
                async for _ in stream:
                    pass
            assert not engine.ready
            with pytest.raises(EngineDied, match="started again"):
                await engine.add_request(PROMPT, GREEDY)
            await watcher.back.wait()
            assert engine.ready and core.pid != first_pid
            assert watcher.events == ["started", "died", "started"]
            assert await text_of(engine) == expected
        assert watcher.events == ["started", "died", "started"]

    with caplog.at_level(logging.WARNING, logger="fastpage.engine"):
        run(main())
    assert "SIGKILL" in caplog.text and "is back" in caplog.text


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGKILL, "SIGKILL: out of memory?"),  # not by its supervisor
        (signal.SIGSTOP, "it was killed"),
    ],
)
def test_what_took_long_to_be_gone_is_not_said_to_be_killed(
    number: signal.Signals, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        process = _Process(EngineArgs(model="nothing"))
        os.kill(process.pid, number)
        if number != signal.SIGSTOP:
            await gone(process.pid)
        monkeypatch.setattr(process._popen, "poll", lambda: process._popen.returncode)
        assert await process.end(patience=0) == how
        assert not is_alive(process.pid)

    run(main())


class InPieces:
    """A socket that was interrupted again and again."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def recv(self, size: int, flags: int) -> bytes:
        part, self._data = self._data[: min(size, 3)], self._data[min(size, 3) :]
        return part


def test_orders_may_come_in_pieces() -> None:
    channel: Any = InPieces(b"0123456789rest")
    assert engine_process_module._read(channel, 10) == b"0123456789"
    assert engine_process_module._read(channel, 4) == b"rest"


def test_it_is_started_again_until_it_starts(
    endless_model: Path, tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(endless_model)

    async def main() -> None:
        watcher = Watcher()
        async with engine_process(model, watcher) as (engine, core):
            model.unlink()
            os.kill(core.pid, signal.SIGKILL)
            await until(lambda: "could not be started again" in caplog.text)
            model.symlink_to(endless_model)
            await watcher.back.wait()
            assert await text_of(engine) == expected

    with caplog.at_level(logging.WARNING, logger="fastpage.engine"):
        run(main())


def test_it_ignores_the_signals_that_are_meant_for_the_front_end(
    endless_model: Path, expected: str
) -> None:
    async def main() -> None:
        async with engine_process(endless_model) as (engine, core):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(core.pid, number)
            assert await text_of(engine) == expected

    run(main())


_FRONT_END = """
import asyncio, sys
from fastpage import AsyncEngine, EngineArgs, SamplingParams
from fastpage.engine import process_core

class Loud(process_core._Process):
    def __init__(self, args):
        super().__init__(args)
        print(self.pid, flush=True)

process_core._Process = Loud

async def main():
    args = EngineArgs(model=sys.argv[1], num_kv_blocks=16384, threads=1)
    engine = await AsyncEngine.start_process(args)
    params = SamplingParams(max_tokens=int(sys.argv[2]), ignore_eos=True)
    async for _ in engine.generate("Once upon a time", params):
        print("token", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["loading", "serving"])
def test_a_front_end_that_dies_takes_the_engine_with_it(
    endless_model: Path, tmp_path: Path, when: str
) -> None:
    # A module of the working directory must not come between the engine and its own.
    (tmp_path / "json.py").write_text("raise SystemExit('this is not json')\n")
    script = tmp_path / "front" / "end.py"
    script.parent.mkdir()
    script.write_text(_FRONT_END)
    front_end = subprocess.Popen(
        [sys.executable, str(script), str(endless_model), str(ENDLESS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert front_end.stdout is not None
    pid = int(front_end.stdout.readline())
    if when == "serving":
        assert front_end.stdout.readline() == "token\n"
    front_end.kill()
    front_end.wait()
    front_end.stdout.close()
    run(gone(pid))
