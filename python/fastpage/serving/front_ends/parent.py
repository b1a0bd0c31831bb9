"""The parent of several front ends: it owns the port, the engine's process and its supervisor,
starts the front ends, starts those again that die or hang, and passes signals on. It serves nobody
but who asks for metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from fastpage import _C
from fastpage.engine.core import EngineDied, EngineLost
from fastpage.engine.loading import ModelInfo
from fastpage.engine.observer import StepReport
from fastpage.engine.process_core import Hello, ProcessCore
from fastpage.errors import FastpageError
from fastpage.serving.front_ends.port import reserve_port
from fastpage.serving.front_ends.supervised import SupervisedFrontEnd
from fastpage.serving.lifecycle import Command, Parsed, Signals, exit_now, first_of, say, summary
from fastpage.serving.metrics.shared import SharedMetrics, Snapshot

# Beyond the time to drain: for the last messages, metrics and traces of a front end.
_SECONDS_TO_END = 10.0


class Parent:
    def __init__(
        self, command: Command, argv: Sequence[str], parsed: Parsed, phases: dict[str, float]
    ) -> None:
        assert parsed.shared_metrics is not None
        self._command = command
        self._argv = argv
        self._options = parsed.options
        self._args = parsed.args
        self._phases = phases
        self._metrics: SharedMetrics = parsed.shared_metrics
        self._signals = Signals()
        self._front_ends: list[SupervisedFrontEnd] = []
        self._engine: _Engine | None = None  # once it has started
        self._failure: asyncio.Future[None]
        self._lost = asyncio.Event()
        self._lost_error: EngineLost | None = None

    async def run(self) -> None:
        self._signals.listen()
        self._failure = asyncio.get_running_loop().create_future()
        options = self._options
        with reserve_port(options.host, options.port) as held:
            metrics_address = self._metrics.listen(
                options.host, getattr(options, "metrics_port", None)
            )
            addresses = await self._start(held.getsockname()[1])
            if metrics_address:
                addresses.append(metrics_address)
            self._say(f"listening on {', '.join(addresses)}, loading {self._args.model}")
            await self._until_signal(self._launched.wait())
            await self._all(front_end.ready for front_end in self._front_ends)
            assert self._engine is not None
            self._say_ready(self._engine, addresses)
            await first_of(self._lost.wait(), self._signals.first)
            await self._stop(self._engine)
        if self._lost_error is not None:  # whoever started this process is to start it again
            raise self._lost_error

    async def _start(self, port: int) -> list[str]:
        """Front ends and engine. Returns where the front ends listen, when they do."""
        start = time.perf_counter()
        timeouts = (self._args.engine_timeout, self._options.startup_timeout)
        module = self._command.module
        self._launched = asyncio.Event()
        self._launching = asyncio.create_task(self._launch())
        for index in range(self._options.api_server_count):
            front_end = SupervisedFrontEnd(self, index, port, module, self._argv, *timeouts)
            self._front_ends.append(front_end)
            front_end.start()
        await self._all(front_end.listening for front_end in self._front_ends)
        self._phases["server"] = time.perf_counter() - start
        return list(self._front_ends[0].addresses)

    async def _launch(self) -> None:
        try:
            core, said = await ProcessCore.launch_for_others(self._args)
        except Exception as error:
            self._fail(error)
            return
        self._engine = _Engine(core, said, self._phases)
        core.start(self)
        self.on_started()
        self._launched.set()

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def _all(self, events: Iterable[asyncio.Event]) -> None:
        await self._until_signal(_all_set(events))

    async def _until_signal(self, awaitable: Awaitable[Any]) -> None:
        """Raises what the start failed with. At a signal the process ends: nothing that is half
        loaded needs an orderly end, and the other processes go along."""
        work = asyncio.ensure_future(awaitable)
        both = asyncio.wait([work, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if await first_of(both, self._signals.first) is None:
            self._say("stopped while loading")
            exit_now(0)
        if self._failure.done():
            work.cancel()
            self._failure.result()

    def _say_ready(self, engine: _Engine, addresses: Sequence[str]) -> None:
        pids = ", ".join(str(front_end.pid) for front_end in self._front_ends)
        places = [("front ends", f"{len(self._front_ends)} (pids {pids})")]
        places += (("address", address) for address in addresses)
        say(summary(engine.info, engine.phases, places))

    async def _stop(self, engine: _Engine) -> None:
        timeout = self._options.drain_timeout
        self._say(f"stopping: requests in progress have up to {timeout:g} s")
        for front_end in self._front_ends:
            front_end.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            if await first_of(self._ended(timeout), self._signals.second) is None:
                for front_end in self._front_ends:
                    front_end.end_at_once()
                await self._ended(0)
        for front_end in self._front_ends:
            front_end.kill()
        await engine.core.stop()
        await asyncio.to_thread(self._metrics.stop_server)
        self._say("stopped")

    async def _ended(self, timeout: float) -> bool:
        ended = _all_set(front_end.ended for front_end in self._front_ends)
        await asyncio.wait_for(ended, timeout + _SECONDS_TO_END)
        return True

    def _say(self, text: str) -> None:
        say(f"{self._command.program}: {text}")

    # ---- supervised.Owner

    def hand_engine(self, front_end: SupervisedFrontEnd) -> None:
        engine = self._engine
        if engine is None or not engine.core.ready:
            return
        with contextlib.suppress(OSError):  # it has just ended
            front_end.take_engine(engine.core.add_front_end(), engine.said)

    def could_not_start(self, error: FastpageError) -> None:
        self._fail(error)

    def take_metrics(self, index: int, taken: Snapshot) -> None:
        self._metrics.take_in(index, taken)

    def forget_metrics(self, index: int) -> None:
        self._metrics.forget(index)

    def count_restart(self) -> None:
        self._metrics.engine.num_front_end_restarts += 1

    async def render(self, accept: str) -> tuple[str, str]:
        body, content_type = await asyncio.to_thread(self._metrics.render, accept)
        return body.decode(), content_type

    async def abort(self, request_id: str, asked_by: SupervisedFrontEnd) -> bool:
        others = [each for each in self._front_ends if each is not asked_by]
        return any(await asyncio.gather(*(each.abort(request_id) for each in others)))

    # ---- CoreListener

    def on_step(self, step: _C.StepOutput, stats: _C.EngineStats) -> None:
        self._metrics.engine.stepped(StepReport(stats, step.num_tokens, 0, [], []))

    def on_step_error(self, error: Exception) -> None:
        """The front ends hear of it, too."""

    def on_died(self, error: EngineDied) -> None:
        self._metrics.engine.engine_died(error)

    def on_lost(self, error: EngineLost) -> None:
        """Also of a front end whose new process has other files than the engine."""
        self._lost_error = error
        self._lost.set()

    def on_started(self) -> None:
        assert self._engine is not None
        self._metrics.engine.started(self._engine)
        for front_end in self._front_ends:
            self.hand_engine(front_end)


async def _all_set(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


class _Engine:
    """The engine's process."""

    def __init__(self, core: ProcessCore, said: Hello, phases: dict[str, float]) -> None:
        self.core = core
        self.said = said
        self.info = ModelInfo(**said["info"])
        self._phases = phases  # there may be more to come

    @property
    def phases(self) -> dict[str, float]:
        took = self.said["phases"].items()
        return self._phases | {f"engine {name}": seconds for name, seconds in took}

    def stats(self) -> _C.EngineStats:
        return self.core.stats()
