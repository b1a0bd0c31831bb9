"""The core in a process of its own: starts it, talks to it, starts it again when it dies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from fastpage import _C, logs
from fastpage.checkpoints import open_checkpoint
from fastpage.child_process import how_it_ended, is_exiting, start_child
from fastpage.engine.args import EngineArgs
from fastpage.engine.channel_core import ChannelCore
from fastpage.engine.core import CoreListener, EngineDied, EngineLost
from fastpage.engine.hello import BUILD, LENGTH, other_build
from fastpage.engine.loading import ModelInfo, PhaseTimer, ServedModel, open_tokenizer
from fastpage.engine.model_files import differences, digests, replaced_files
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

_LONGEST_HELLO = 16 << 20
_SECONDS_TO_STOP = 5.0
_MOST_SECONDS_BETWEEN_STARTS = 30.0
# An engine that lived this long may be started again at once.
_SECONDS_TO_BE_TRUSTED = 60.0

# What an engine process says when it has loaded the model.
Hello = dict[str, Any]

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        EngineLost,
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

    def __init__(self, args: EngineArgs, takes_more: bool = False) -> None:
        """`takes_more`: more front ends than this one, see add_front_end()."""
        self._args = args
        self._killed = False
        self._socket, its_socket = socket.socketpair()
        self._door: socket.socket | None = None
        its_sockets = [its_socket]
        if takes_more:
            self._door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            its_sockets.append(its_door)
        filenos = [each.fileno() for each in its_sockets]
        self._popen = start_child("fastpage.engine.engine_process", filenos, filenos)
        for each in its_sockets:
            each.close()
        self._socket.setblocking(False)

    def add_front_end(self) -> socket.socket:
        """The other end of a socket that its EngineServer gets. Raises OSError if the process has
        ended."""
        assert self._door is not None
        ours, its_socket = socket.socketpair()
        with its_socket:
            socket.send_fds(self._door, [b"+"], [its_socket.fileno()])
        return ours

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def hello(self, files: dict[str, str] | None = None) -> Hello:
        """`files`: what the model's files have to be. Raises what load_model() raised there,
        EngineLost or EngineDied."""
        loop = asyncio.get_running_loop()
        try:
            orders = {
                "build": BUILD,
                "files": files,
                "args": dataclasses.asdict(self._args),
                "logs": logs.configured(),
            }
            text = json.dumps(orders).encode()
            await loop.sock_sendall(self._socket, LENGTH.pack(len(text)) + text)
            (length,) = LENGTH.unpack(await self._read(LENGTH.size))
            if length > _LONGEST_HELLO:
                raise EngineDied("the engine process does not talk as this version does")
            hello: Hello = json.loads(await self._read(length))
        except (ConnectionError, EOFError):
            raise EngineDied(
                f"the engine process ended while it loaded the model ({await self.end()})"
            ) from None
        if hello.get("build") != BUILD:
            raise EngineLost(other_build(hello.get("build"), BUILD))
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
        self._close()
        self._killed = True
        self._popen.kill()

    async def end(self, patience: float = 0.5) -> str:
        """How it ended; it is killed if it has not within `patience` seconds."""
        deadline = time.monotonic() + patience
        while self._popen.poll() is None:
            if time.monotonic() > deadline:
                # One that holds much memory takes long to be gone.
                if not is_exiting(self.pid):
                    self.kill()
                await asyncio.to_thread(self._popen.wait)
            else:
                await asyncio.sleep(0.005)
        self._close()
        if self._killed and self._popen.returncode == -signal.SIGKILL:
            return "it was killed"
        return how_it_ended(self._popen.returncode)

    def _close(self) -> None:
        self._socket.close()
        if self._door is not None:
            self._door.close()


class ProcessCore(ChannelCore):
    """A core that is a process, with its supervisor."""

    def __init__(
        self,
        args: EngineArgs,
        process: _Process,
        files: dict[str, str],
        takes_more: bool = False,
    ) -> None:
        super().__init__(args.engine_timeout)
        self._files = files
        self._lost: EngineLost | None = None
        self._args = args
        self._takes_more = takes_more
        self._process = process
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def launch(cls, args: EngineArgs) -> tuple[ProcessCore, ServedModel]:
        """Starts the process, and opens the tokenizer here while it loads the weights. Raises what
        load_model() raises, and EngineDied."""
        phase = PhaseTimer()
        process = _Process(args)
        tokenizer = _in_thread(load_tokenizer, args, phase)
        hello = asyncio.ensure_future(process.hello())
        try:
            # What the engine says comes first: it looks at the model before the tokenizer.
            await hello
            await tokenizer
            check_same(hello.result(), tokenizer.result()[1])
        except BaseException:
            hello.cancel()
            tokenizer.add_done_callback(_hear_its_error)
            process.kill()
            await process.end()
            raise
        said = hello.result()
        core = cls(args, process, said["files"])
        core.open(process.take_socket())
        return core, served_model(said, tokenizer.result()[0], phase)

    @classmethod
    async def launch_for_others(cls, args: EngineArgs) -> tuple[ProcessCore, Hello]:
        """Starts the process for front ends of other processes, see add_front_end(). Raises what
        load_model() raises, and EngineDied."""
        process = _Process(args, takes_more=True)
        try:
            said = await process.hello()
        except BaseException:
            process.kill()
            await process.end()
            raise
        core = cls(args, process, said["files"], takes_more=True)
        core.open(process.take_socket())
        return core, said

    def add_front_end(self) -> socket.socket:
        """A socket for the SharedCore of another process. Raises OSError if the engine's process
        has ended."""
        return self._process.add_front_end()

    def start(self, listener: CoreListener) -> None:
        super().start(listener)
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    @property
    def pid(self) -> int:
        """Of the process that is, or is about to be, the engine."""
        return self._process.pid

    async def stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
        await super().stop()
        # Without its socket it ends by itself.
        await self._process.end(_SECONDS_TO_STOP)

    async def _supervise(self) -> None:
        started, delay = time.monotonic(), 0.0
        while True:
            await self.wait_closed()
            _logger.error("the engine process (pid %d) has ended: %s", self.pid, await self._end())
            if time.monotonic() - started > _SECONDS_TO_BE_TRUSTED:
                delay = 0.0
            try:
                delay = await self._start_again(delay)
            except EngineLost as error:
                self._lost = error
                _logger.error("the engine cannot be started again: %s", error)
                assert self._listener is not None
                return self._listener.on_lost(error)
            started = time.monotonic()

    def _on_hang(self) -> None:
        _logger.error(
            "the engine process (pid %d) got nowhere for %g s (engine_timeout): it is killed",
            self.pid,
            self._timeout,
        )
        self._process.kill()
        super()._on_hang()

    def _ready_client(self) -> _C.EngineClient:
        if self._lost is not None:
            raise EngineLost(str(self._lost))
        return super()._ready_client()

    async def _end(self) -> str:
        # Its socket is closed, so that it is about to end, if it has not.
        return await self._process.end()

    async def _start_again(self, delay: float) -> float:
        """Until it is ready. Returns how long to wait before the next time. Raises EngineLost."""
        assert self._listener is not None
        while True:
            if delay:
                _logger.error("the engine is started again in %.0f s", delay)
            await asyncio.sleep(delay)
            delay = min(max(1.0, 2 * delay), _MOST_SECONDS_BETWEEN_STARTS)
            start = time.monotonic()
            try:
                self._process = self._new_process()
                await self._process.hello(self._files)
                self.open(self._process.take_socket())
            except (asyncio.CancelledError, EngineLost):
                self._process.kill()
                raise
            except Exception as error:
                self._process.kill()
                _logger.error("the engine could not be started again: %s", error)
                continue
            _logger.warning(
                "the engine is back (pid %d) after %.1f s", self.pid, time.monotonic() - start
            )
            self._listener.on_started()
            return delay

    def _new_process(self) -> _Process:
        return _Process(self._args, takes_more=True) if self._takes_more else _Process(self._args)


def check_same(said: Hello, files: dict[str, str]) -> None:
    """`files`: what a front end has of the model. Raises EngineLost if the engine has others."""
    if said["build"] != BUILD:
        raise EngineLost(other_build(said["build"], BUILD))
    if changed := differences(said["files"], files):
        raise EngineLost(replaced_files(changed))


def served_model(said: Hello, tokenizer: Tokenizer, phase: PhaseTimer) -> ServedModel:
    return ServedModel(
        tokenizer=tokenizer,
        info=ModelInfo(**said["info"]),
        sampling_defaults=said["sampling_defaults"],
        phases={f"engine {name}": seconds for name, seconds in said["phases"].items()}
        | phase.seconds,
    )


def load_tokenizer(args: EngineArgs, phase: PhaseTimer) -> tuple[Tokenizer, dict[str, str]]:
    """And the files that it belongs to."""
    with phase("tokenizer"):
        checkpoint = open_checkpoint(args.model, args.revision, args.load_format)
        return open_tokenizer(args, checkpoint), digests(args, checkpoint)


def _in_thread(call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(asyncio.to_thread(call, *arguments))


def _hear_its_error(future: asyncio.Future[Any]) -> None:
    """Nobody else will: asyncio would log it."""
    if not future.cancelled():
        future.exception()
