"""The core in a process of its own: starts it, talks to it, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from fastpage import _C
from fastpage.checkpoints import open_checkpoint
from fastpage.engine.args import EngineArgs
from fastpage.engine.core import CoreListener, EngineDied
from fastpage.engine.engine_thread import SchedulerWatch
from fastpage.engine.loading import ModelInfo, PhaseTimer, ServedModel, open_tokenizer
from fastpage.errors import (
    CheckpointError,
    FastpageError,
    InvalidArgument,
    ModelError,
    ResourceExhausted,
    UnsupportedArchitecture,
)
from fastpage.tokenizer import Tokenizer

_logger = logging.getLogger("fastpage.engine")

# The process is given the caller's own way to find modules, and none to find others.
_COMMAND = (
    "import sys; sys.path[:] = {path!r}; from fastpage.engine.engine_process import main; main()"
)
_LENGTH = struct.Struct("=Q")
_LONGEST_HELLO = 16 << 20
# What the front end may have waiting for an engine that does not read.
_MOST_UNSENT_BYTES = 256 << 20
_SECONDS_TO_STOP = 5.0
_MOST_SECONDS_BETWEEN_STARTS = 30.0
# An engine that lived this long may be started again at once.
_SECONDS_TO_BE_TRUSTED = 60.0

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        FastpageError,
        InvalidArgument,
        MemoryError,
        ModelError,
        OSError,
        ResourceExhausted,
        UnsupportedArchitecture,
    )
}


class _Process:
    """An engine process, and the front end's end of its socket."""

    def __init__(self, args: EngineArgs) -> None:
        self._socket, its_socket = socket.socketpair()
        with its_socket:
            command = _COMMAND.format(path=sys.path)
            # Not start_new_session: whoever ends the whole group means the engine too.
            self._popen = subprocess.Popen(
                [sys.executable, "-c", command, str(its_socket.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                pass_fds=[its_socket.fileno()],
            )
        self._socket.setblocking(False)
        self._args = args

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def hello(self) -> dict[str, Any]:
        """What it says when it has loaded the model. Raises what load_model() raised there, or
        EngineDied."""
        loop = asyncio.get_running_loop()
        try:
            text = json.dumps(dataclasses.asdict(self._args)).encode()
            await loop.sock_sendall(self._socket, _LENGTH.pack(len(text)) + text)
            (length,) = _LENGTH.unpack(await self._read(_LENGTH.size))
            if length > _LONGEST_HELLO:
                raise EngineDied("the engine process does not talk as this version does")
            hello: dict[str, Any] = json.loads(await self._read(length))
        except (ConnectionError, EOFError):
            raise EngineDied(
                f"the engine process ended while it loaded the model ({await self.end()})"
            ) from None
        if "error" in hello:
            await self.end()
            raise _ERRORS.get(hello["error"], FastpageError)(hello["message"])
        return hello

    async def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = await asyncio.get_running_loop().sock_recv(self._socket, size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def take_socket(self) -> int:
        return self._socket.detach()

    def kill(self) -> None:
        self._socket.close()
        self._popen.kill()

    async def end(self, patience: float = 0.5) -> str:
        """How it ended; it is killed if it has not within `patience` seconds."""
        deadline = time.monotonic() + patience
        while self._popen.poll() is None:
            if time.monotonic() > deadline:
                self._popen.kill()
                await asyncio.to_thread(self._popen.wait)
            else:
                await asyncio.sleep(0.005)
        self._socket.close()
        return _how_it_ended(self._popen.returncode)


class ProcessCore:
    """A core that is a process."""

    def __init__(self, args: EngineArgs, process: _Process) -> None:
        self._args = args
        self._process = process
        self._listener: CoreListener | None = None
        self._loop = asyncio.get_running_loop()
        self._client: _C.EngineClient | None = None
        self._fileno = -1
        self._stats = _C.EngineStats()
        self._watch = SchedulerWatch()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._resets: list[asyncio.Future[bool]] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._stopping = False

    @classmethod
    async def launch(cls, args: EngineArgs) -> tuple[ProcessCore, ServedModel]:
        """Starts the process, and opens the tokenizer here while it loads the weights. Raises what
        load_model() raises, and EngineDied."""
        phase = PhaseTimer()
        process = _Process(args)
        tokenizer = _in_thread(_load_tokenizer, args, phase)
        hello = asyncio.ensure_future(process.hello())
        try:
            await asyncio.gather(hello, tokenizer)
        except BaseException:
            hello.cancel()
            process.kill()
            await process.end()
            raise
        said = hello.result()
        core = cls(args, process)
        core._open_channel()
        model = ServedModel(
            tokenizer=tokenizer.result(),
            info=ModelInfo(**said["info"]),
            sampling_defaults=said["sampling_defaults"],
            phases={f"engine {name}": seconds for name, seconds in said["phases"].items()}
            | phase.seconds,
        )
        return core, model

    # ---- Core

    def start(self, listener: CoreListener) -> None:
        if self._supervisor is None:
            self._listener = listener
            self._supervisor = asyncio.create_task(self._supervise())

    @property
    def ready(self) -> bool:
        return self._client is not None

    @property
    def pid(self) -> int:
        """Of the process that is, or is about to be, the engine."""
        return self._process.pid

    def add_request(
        self, token_ids: list[int], params: _C.SamplingParams, *, priority: int, cache_salt: str
    ) -> int:
        client = self._ready_client()
        if client.num_unsent_bytes > _MOST_UNSENT_BYTES:
            raise ResourceExhausted(
                "the engine is behind with reading requests: try again in a few seconds"
            )
        core_id = client.add_request(token_ids, params, priority=priority, cache_salt=cache_salt)
        self._waiting[core_id] = self._loop.create_future()
        self._flush()
        return core_id

    async def accepted(self, core_id: int) -> None:
        await self._waiting[core_id]

    def abort(self, core_id: int, index: int | None = None) -> None:
        if self._client is None:
            return
        if index is None:
            self._answer(core_id, None)
            self._client.abort(core_id)
        else:
            self._client.abort(core_id, index)
        self._flush()

    def stats(self) -> _C.EngineStats:
        return self._stats

    @property
    def peak_used_blocks(self) -> int:
        return self._watch.peak_used_blocks

    async def reset_prefix_cache(self) -> bool:
        client = self._ready_client()
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._resets.append(answer)
        client.reset_prefix_cache()
        self._flush()
        return await answer

    async def stop(self) -> None:
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        self._close_channel(EngineDied("the engine was shut down"))
        # Without its socket it ends by itself.
        await self._process.end(_SECONDS_TO_STOP)

    # ---- the channel

    def _ready_client(self) -> _C.EngineClient:
        if self._client is None:
            raise EngineDied("the engine is being started again: try again in a few seconds")
        return self._client

    def _open_channel(self) -> None:
        self._closed.clear()
        self._fileno = self._process.take_socket()
        self._client = _C.EngineClient(self._fileno)
        self._loop.add_reader(self._fileno, self._on_readable)

    def _close_channel(self, error: EngineDied) -> None:
        if self._client is None:
            return
        self._loop.remove_reader(self._fileno)
        self._loop.remove_writer(self._fileno)
        self._client = None  # closes the socket
        lost = itertools.chain(self._waiting.values(), self._resets)
        for future in lost:
            if not future.done():
                future.set_exception(EngineDied(str(error)))
                future.exception()  # there may be nobody left who asks
        self._waiting.clear()
        self._resets.clear()
        self._closed.set()

    def _flush(self) -> None:
        """The rest goes when the socket takes it."""
        if self._client is not None and self._client.has_unsent:
            self._loop.add_writer(self._fileno, self._on_writable)

    def _on_writable(self) -> None:
        assert self._client is not None
        self._client.flush()
        if not self._client.has_unsent:
            self._loop.remove_writer(self._fileno)

    def _on_readable(self) -> None:
        client = self._client
        assert client is not None and self._listener is not None
        for news in client.receive():
            self._take_in(news, self._listener)
        if client.closed and client is self._client:
            error = EngineDied("the engine's process has ended: try again in a few seconds")
            self._close_channel(error)
            self._listener.on_died(error)

    def _take_in(self, news: _C.EngineNews, listener: CoreListener) -> None:
        kind = news.kind
        if kind == _C.EngineNews.Kind.STEP:
            self._stats = news.stats
            self._watch.look_at(news.stats.scheduler)
            listener.on_step(news.step, news.stats)
        elif kind == _C.EngineNews.Kind.ACCEPTED:
            self._answer(news.request_id, None)
        elif kind == _C.EngineNews.Kind.REFUSED:
            refusal = ResourceExhausted if news.out_of_resources else InvalidArgument
            self._answer(news.request_id, refusal(news.error))
        elif kind == _C.EngineNews.Kind.STEP_FAILED:
            listener.on_step_error(FastpageError(news.error))
        elif self._resets:
            answer = self._resets.pop(0)
            if not answer.done():
                answer.set_result(news.done)

    def _answer(self, core_id: int, error: Exception | None) -> None:
        future = self._waiting.pop(core_id, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    # ---- the supervisor

    async def _supervise(self) -> None:
        started, delay = time.monotonic(), 0.0
        while True:
            await self._closed.wait()
            _logger.error("the engine process (pid %d) has ended: %s", self.pid, await self._end())
            if time.monotonic() - started > _SECONDS_TO_BE_TRUSTED:
                delay = 0.0
            delay = await self._start_again(delay)
            started = time.monotonic()

    async def _end(self) -> str:
        # Its socket is closed, so that it is about to end, if it has not.
        return await self._process.end()

    async def _start_again(self, delay: float) -> float:
        """Until it is ready. Returns how long to wait before the next time."""
        assert self._listener is not None
        while True:
            if delay:
                _logger.error("the engine is started again in %.0f s", delay)
            await asyncio.sleep(delay)
            delay = min(max(1.0, 2 * delay), _MOST_SECONDS_BETWEEN_STARTS)
            start = time.monotonic()
            try:
                self._process = _Process(self._args)
                await self._process.hello()
            except asyncio.CancelledError:
                self._process.kill()
                raise
            except Exception as error:
                _logger.error("the engine could not be started again: %s", error)
                continue
            self._open_channel()
            _logger.warning(
                "the engine is back (pid %d) after %.1f s", self.pid, time.monotonic() - start
            )
            self._listener.on_started()
            return delay


def _load_tokenizer(args: EngineArgs, phase: PhaseTimer) -> Tokenizer:
    with phase("tokenizer"):
        return open_tokenizer(args, open_checkpoint(args.model, args.revision, args.load_format))


def _in_thread(call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(asyncio.to_thread(call, *arguments))


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-returncode).name
        hint = ": out of memory?" if name == "SIGKILL" else ""
        return f"{name}{hint}"
    return f"signal {-returncode}"


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
