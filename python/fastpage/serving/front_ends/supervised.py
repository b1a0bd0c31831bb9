"""A front end as its parent sees it: its process, and the next one when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fastpage.child_process import how_it_ended, start_child
from fastpage.engine.core import EngineLost
from fastpage.engine.process_core import Hello
from fastpage.engine.watchdog import Watchdog
from fastpage.errors import FastpageError
from fastpage.serving.front_ends.control import Control, ControlClosed, Handler

_logger = logging.getLogger("fastpage.serving")

_MODULE = "fastpage.serving.front_ends.child"
_MOST_SECONDS_BETWEEN_STARTS = 30.0
# A front end that lived this long may be started again at once.
_SECONDS_TO_BE_TRUSTED = 60.0


class Owner(Protocol):
    def hand_engine(self, front_end: SupervisedFrontEnd) -> None:
        """Its process is new: gives it a socket of the engine, now or once there is one."""

    def could_not_start(self, error: FastpageError) -> None:
        """It was never ready, and is not started again."""

    def on_lost(self, error: EngineLost) -> None:
        """Its new process has other files than the engine: all are to be started again."""

    def take_metrics(self, index: int, taken: Any) -> None: ...

    def forget_metrics(self, index: int) -> None:
        """Its process has ended."""

    def count_restart(self) -> None:
        """Its next process is ready."""

    async def render(self, accept: str) -> tuple[str, str]: ...

    async def abort(self, request_id: str, asked_by: SupervisedFrontEnd) -> bool: ...


class SupervisedFrontEnd:
    def __init__(
        self,
        owner: Owner,
        index: int,
        port: int,
        module: str,
        argv: Sequence[str],
        timeout: float,
        startup_timeout: float,
    ) -> None:
        """One whose event loop says nothing for `timeout` seconds is killed, and so is one that
        takes `startup_timeout` seconds to be ready, not counted those in which it waits for the
        engine; 0: never."""
        self.index = index
        self.addresses: list[str] = []
        self.listening = asyncio.Event()
        self.ready = asyncio.Event()  # for the first time
        self.ended = asyncio.Event()  # for good
        self.control: Control
        self._owner = owner
        self._arguments = (module, index, port, *argv)
        self._popen: subprocess.Popen[bytes]
        self._started = 0.0
        self._delay = 0.0
        self._failure = ""  # what it said itself
        self._why = ""  # it was killed
        self._stopping = False
        self._end: asyncio.Task[None]
        self._has_engine = self._is_listening = False  # this process
        self._timeout = timeout
        self._watchdog = Watchdog(timeout, self._ping, self._on_hang)
        self._startup_timeout = startup_timeout
        self._startup = Watchdog(startup_timeout, self._look_at_startup, self._on_slow_startup)

    def start(self) -> None:
        ours, its_socket = socket.socketpair()
        with its_socket:
            fileno = its_socket.fileno()
            self._popen = start_child(_MODULE, (fileno, *self._arguments), [fileno])
        self._started = time.monotonic()
        handlers: dict[str, Handler] = {
            "listening": self._on_listening,
            "ready": self._on_ready,
            "alive": self._on_alive,
            "failed": self._on_failed,
            "metrics": lambda taken: self._owner.take_metrics(self.index, taken),
            "reported": lambda: None,
            "render": self._owner.render,
            "abort": lambda request_id: self._owner.abort(request_id, self),
        }
        self.control = Control(ours, handlers, self._on_end)
        self._failure = self._why = ""
        self._has_engine = self._is_listening = False
        if self._startup_timeout:
            self._startup.start()
        self._owner.hand_engine(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def take_engine(self, sock: socket.socket, said: Hello) -> None:
        """Hands it a socket of the engine, which has said that."""
        self._has_engine = True
        self.control.tell("engine", sock, said=said)

    def drain(self) -> None:
        self._stopping = True
        self._stop_looking()  # its end has a limit of its own
        if self.control.closed:  # it is about to be started again
            self.ended.set()
        self.control.tell("drain")

    def end_at_once(self) -> None:
        self.control.tell("end")

    def kill(self) -> None:
        self._popen.kill()

    async def abort(self, request_id: str) -> bool:
        try:
            return bool(await self.control.ask("abort", request_id=request_id))
        except ControlClosed:
            return False

    # ---- what it says

    def _on_listening(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._is_listening = True
        self.listening.set()

    def _on_ready(self) -> None:
        if self.ready.is_set():
            seconds = time.monotonic() - self._started
            _logger.warning(
                "front end %d is back (pid %d) after %.1f s", self.index, self.pid, seconds
            )
            self._owner.count_restart()
        self.ready.set()
        self._startup.stop()
        if self._timeout and not self._stopping:
            self._watchdog.start()

    def _on_alive(self) -> None:
        self._watchdog.heard = True

    def _on_failed(self, message: str, lost: bool) -> None:
        self._failure = message
        if lost and self.ready.is_set():
            self._stopping = True
            self._owner.on_lost(EngineLost(message))

    # ---- what it does not say

    def _ping(self) -> None:
        self.control.tell("ping")

    def _on_hang(self) -> None:
        self._why = f"it got nowhere for {self._timeout:g} s (engine_timeout), and was killed"
        self.kill()

    def _look_at_startup(self) -> None:
        if self._is_listening and not self._has_engine:
            self._startup.heard = True  # all that it could do so far is done

    def _on_slow_startup(self) -> None:
        seconds = f"{self._startup_timeout:g} s (--startup-timeout)"
        self._why = f"it was not ready after {seconds}, and was killed"
        self.kill()

    def _stop_looking(self) -> None:
        self._startup.stop()
        self._watchdog.stop()

    # ---- its end

    def _on_end(self) -> None:
        self._stop_looking()
        self._end = asyncio.create_task(self._see_to_its_end())

    async def _see_to_its_end(self) -> None:
        self._popen.kill()
        how = how_it_ended(await asyncio.to_thread(self._popen.wait))
        self._owner.forget_metrics(self.index)
        if not self._stopping:
            ended = f"front end {self.index} (pid {self.pid}) has ended"
            why = self._failure or self._why or how
            if not self.ready.is_set():
                self._owner.could_not_start(FastpageError(self._failure or f"{ended}: {why}"))
                return
            _logger.error("%s: %s", ended, why)
            await self._wait_before_the_next()
        if self._stopping:
            self.ended.set()
        else:
            self.start()

    async def _wait_before_the_next(self) -> None:
        if time.monotonic() - self._started > _SECONDS_TO_BE_TRUSTED:
            self._delay = 0.0
        if self._delay:
            _logger.error("front end %d is started again in %.0f s", self.index, self._delay)
        await asyncio.sleep(self._delay)
        self._delay = min(max(1.0, 2 * self._delay), _MOST_SECONDS_BETWEEN_STARTS)
