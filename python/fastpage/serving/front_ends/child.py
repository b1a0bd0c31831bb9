"""A front end: a process that its parent starts, hands the engine's sockets, and tells when to
stop.

It gets no signals: those of a terminal or a service manager, which reach all processes of a server,
are the parent's, which passes them on.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastpage.child_process import end_with
from fastpage.engine.args import EngineArgs
from fastpage.engine.async_engine import AsyncEngine
from fastpage.engine.core import EngineLost
from fastpage.engine.loading import PhaseTimer
from fastpage.engine.process_core import Hello, check_same, load_tokenizer, served_model
from fastpage.engine.shared_core import SharedCore
from fastpage.errors import FastpageError
from fastpage.serving.front_ends.control import Control
from fastpage.serving.lifecycle import Command, Server, Signals, exit_now, run_on_a_loop
from fastpage.serving.metrics.calls import CallCounts
from fastpage.serving.metrics.recorder import EngineMetrics
from fastpage.serving.metrics.shared import Snapshot, snapshot

# What a front end that is killed has counted since then is lost.
_SECONDS_BETWEEN_REPORTS = 1.0


def main() -> None:
    """sys.argv: the parent's process id, when it started this process, the descriptor of the
    control socket, the module of the command, this front end's index, the port, and the command
    line that the parent got."""
    parent, fileno, module = int(sys.argv[1]), int(sys.argv[3]), sys.argv[4]
    index, port, argv = int(sys.argv[5]), int(sys.argv[6]), sys.argv[7:]
    end_with(parent)
    command: Command = importlib.import_module(module).COMMAND
    control = socket.socket(fileno=fileno)
    run_on_a_loop(_serve(command, control, index, port, argv))


async def _serve(
    command: Command, control: socket.socket, index: int, port: int, argv: Sequence[str]
) -> None:
    parent = ParentLink(control, index)
    try:
        parsed = command.parse(argv, port, parent.expose)
        await Server(parsed, parent).run()
        await parent.report_last()
    except (FastpageError, OSError, MemoryError) as error:
        await parent.fail(error)


class ParentLink:
    """The lifecycle.Home of a front end, its way to the others, and its metrics' way out."""

    def __init__(self, control: socket.socket, index: int) -> None:
        self.index = index
        self.signals = OrdersInsteadOfSignals()
        self._control = Control(
            control,
            {
                "engine": self._take_engine,
                "drain": self.signals.drain,
                "end": self.signals.end,
                "abort": self._abort,
                "ping": lambda: self._control.tell("alive"),
            },
            on_end=lambda: exit_now(1),  # nobody is left to serve for
        )
        self._loop = asyncio.get_running_loop()
        self._handed = asyncio.Event()
        self._said: Hello
        self._engine_socket: socket.socket | None = None  # until the core takes it
        self._core: SharedCore
        self._is_ready = False
        self._engine: AsyncEngine | None = None
        self._metrics: tuple[EngineMetrics, CallCounts] | None = None
        self._reported: Snapshot = {}
        self._reporting: asyncio.Task[None] | None = None

    # ---- lifecycle.Home

    async def start_engine(self, args: EngineArgs) -> AsyncEngine:
        phase = PhaseTimer()
        tokenizer, files = await asyncio.to_thread(load_tokenizer, args, phase)
        await self._handed.wait()
        check_same(self._said, files)
        model = served_model(self._said, tokenizer, phase)
        core = SharedCore()
        self._engine = AsyncEngine(model, core=core, siblings=self)
        core.start(self._engine)
        self._core = core
        return self._engine

    def say(self, text: str) -> None:
        """The parent says it for all."""

    def listening(self, addresses: Sequence[str], model: str) -> None:
        self._control.tell("listening", addresses=list(addresses))

    def ready(self, engine: AsyncEngine, addresses: Sequence[str]) -> None:
        # Not before: the engine tells first what is cached, and everybody is to hear of it.
        self._is_ready = True
        if self._engine_socket is not None:
            self._core.take(self._engine_socket.detach())
        self._control.tell("ready")
        if self._metrics is not None:
            self._reporting = asyncio.create_task(self._report_now_and_then())

    async def fail(self, error: BaseException) -> NoReturn:
        message = str(error) or type(error).__name__
        await self._control.ask("failed", message=message, lost=isinstance(error, EngineLost))
        exit_now(1)

    # ---- async_engine.Siblings

    async def abort(self, request_id: str) -> bool:
        return bool(await self._control.ask("abort", request_id=request_id))

    # ---- metrics

    def expose(self, metrics: EngineMetrics, calls: CallCounts) -> SharedExposition:
        self._metrics = (metrics, calls)
        return SharedExposition(self, self._loop)

    async def render(self, accept: str) -> tuple[bytes, str]:
        self._report()
        body, content_type = await self._control.ask("render", accept=accept)
        return body.encode(), content_type

    async def report_last(self) -> None:
        """Returns when the parent has all that was counted."""
        self._report()
        await self._control.ask("reported")

    async def _report_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_REPORTS)
            self._report()

    def _report(self) -> None:
        if self._metrics is None:
            return
        taken = snapshot(*self._metrics)
        if taken != self._reported:
            self._reported = taken
            self._control.tell("metrics", taken=taken)

    # ---- what the parent says

    def _take_engine(self, said: Hello, sock: socket.socket) -> None:
        if self._is_ready:
            self._core.take(sock.detach())
            return
        if self._engine_socket is not None:  # it has been started again meanwhile
            self._engine_socket.close()
        self._said, self._engine_socket = said, sock
        self._handed.set()

    async def _abort(self, request_id: str) -> bool:
        return self._engine is not None and self._engine.abort(request_id)


class OrdersInsteadOfSignals(Signals):
    """The parent's."""

    def listen(self) -> None:
        pass

    def drain(self) -> None:
        if not self.first.is_set():
            self.on_signal()

    def end(self) -> None:
        self.drain()
        if not self.second.is_set():
            self.on_signal()


class SharedExposition:
    """Of all front ends, by way of the parent. For another thread than the event loop's."""

    def __init__(self, parent: ParentLink, loop: asyncio.AbstractEventLoop) -> None:
        self._parent = parent
        self._loop = loop

    def render(self, accept: str = "") -> tuple[bytes, str]:
        rendering = asyncio.run_coroutine_threadsafe(self._parent.render(accept), self._loop)
        return rendering.result()
