"""A server from its command line to its exit code: what fastpage-grpc and fastpage-openai share.

It listens at once and loads the model meanwhile, is ready, drains on the first SIGTERM or SIGINT,
and ends: with exit code 0, unless it could not start, or its engine's process could not be started
again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from fastpage import logs
from fastpage.serving.argument_parser import OneLineParser

if TYPE_CHECKING:
    from fastpage.engine.args import EngineArgs
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.serving.observability import Observability

# Of the clients, to take the last messages, when the time to drain is over.
_LAST_SECONDS = 1.0
# After the second signal, before the process ends whatever is left.
_SECONDS_AT_ONCE = 1.0


class Frontend(Protocol):
    """A way in. One that the model or a health check is asked of follows the engine's process by
    itself, as an observer of the engine."""

    async def start(self) -> str:
        """Listens, and answers that it is not ready. Returns its address, as people write it.
        Raises FastpageError if that cannot be had."""
        ...

    async def set_engine(self, engine: AsyncEngine) -> None:
        """Ready from now on."""
        ...

    async def drain(self) -> None:
        """The engine is about to refuse new requests: from now on it is not ready. Returns at
        once."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """The engine is shut down. Ends when the calls in progress have, which gets them that long,
        and closes its connections."""
        ...


class MakeFrontends(Protocol):
    """Checks the options (ValueError: one line) and imports what the frontends need. May turn on
    in the options what they need of the engine."""

    def __call__(self, options: argparse.Namespace) -> Sequence[Frontend]: ...


def run(
    program: str,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    make_frontends: MakeFrontends,
) -> None:
    """A command's main()."""
    # Until the event loop listens for it, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    phases = {"Python": _seconds_since_process_start()}
    start = time.perf_counter()
    # Not at the top: these take a while, and the time is shown.
    from fastpage import _C
    from fastpage.engine.args import EngineArgs
    from fastpage.errors import FastpageError
    from fastpage.serving import observability

    parser = OneLineParser(
        prog=program, usage="%(prog)s --model PATH [options]", description=description
    )
    parser.add_argument("--version", action="version", version=f"fastpage {_C.__version__}")
    add_options(parser)
    parser.add_argument_group("Stopping", "on SIGTERM or Ctrl-C").add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long requests in progress may go on; a second signal ends them at once "
        "(default: %(default)g)",
    )
    observability.add_options(parser)
    EngineArgs.add_cli_args(parser)
    options = parser.parse_args()
    try:
        if not 0 <= options.drain_timeout < float("inf"):
            raise ValueError(f"--drain-timeout {options.drain_timeout} is not a number >= 0")
        observing = observability.Observability(options)
        frontends = make_frontends(options)
        args = EngineArgs.from_cli_args(options)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    from fastpage.engine import async_engine as _  # noqa: F401

    phases["imports"] = time.perf_counter() - start
    try:
        server = _Server(program, args, frontends, observing, options.drain_timeout, phases)
        asyncio.run(server.run())
    except (FastpageError, OSError, MemoryError) as error:
        _exit_with_error(program, error)


def add_server_options(parser: argparse.ArgumentParser, port: int) -> argparse._ArgumentGroup:
    """The group of options that says where a server listens, for more of its own."""
    server = parser.add_argument_group("Server", "where it listens, and its limits")
    server.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    server.add_argument(
        "--port",
        type=int,
        default=port,
        help="0: let the system choose, and print it (default: %(default)s)",
    )
    return server


class _Server:
    def __init__(
        self,
        program: str,
        args: EngineArgs,
        frontends: Sequence[Frontend],
        observing: Observability,
        drain_timeout: float,
        phases: dict[str, float],
    ) -> None:
        self._program = program
        self._args = args
        self._frontends = frontends
        self._observing = observing
        self._drain_timeout = drain_timeout
        self._phases = phases
        self._signals = _Signals()

    async def run(self) -> None:
        from fastpage.engine.async_engine import AsyncEngine

        self._signals.listen()
        start = time.perf_counter()
        addresses = [await frontend.start() for frontend in self._frontends]
        self._phases["server"] = time.perf_counter() - start
        self._say(f"listening on {', '.join(addresses)}, loading {self._args.model}")
        engine = await self._first(AsyncEngine.start_process(self._args), self._signals.first)
        if engine is None:
            self._say("stopped while loading")
            # Nothing that is half loaded needs an orderly end; the engine's process goes along.
            _exit(0)
        engine.phases = self._phases | engine.phases
        for observer in self._observing.observers:
            engine.add_observer(observer)
        for frontend in self._frontends:
            await frontend.set_engine(engine)
        _print(_summary(engine, addresses))
        lost = await self._first(engine.wait_lost(), self._signals.first)
        await self._stop(engine)
        if lost is not None:  # whoever started this process is to start it again
            raise lost

    async def _stop(self, engine: AsyncEngine) -> None:
        deadline = time.monotonic() + self._drain_timeout
        self._say(f"stopping: requests in progress have up to {self._drain_timeout:g} s")
        for frontend in self._frontends:
            await frontend.drain()
        await self._first(engine.drain(self._drain_timeout), self._signals.second)
        await engine.shutdown()
        await self._stop_frontends(max(_LAST_SECONDS, deadline - time.monotonic()))
        await self._first(self._observing.close(), self._signals.second)
        self._say("stopped")

    async def _stop_frontends(self, grace: float) -> None:
        async def stop(seconds: float) -> bool:
            await asyncio.gather(*(frontend.stop(seconds) for frontend in self._frontends))
            return True

        second = self._signals.second
        if second.is_set() or not await self._first(stop(grace), second):
            await stop(_SECONDS_AT_ONCE / 2)

    async def _first(self, awaitable: Any, event: asyncio.Event) -> Any:
        """What `awaitable` returns, or None if `event` is set before, which cancels it."""
        work = asyncio.ensure_future(awaitable)
        waiting = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            work.cancel()
            waiting.cancel()

    def _say(self, text: str) -> None:
        _print(f"{self._program}: {text}")


class _Signals:
    """The first SIGTERM or SIGINT sets `first`, the next one `second` too, and ends the process
    soon after, whatever it is at."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if not self.first.is_set():
            self.first.set()
        elif not self.second.is_set():
            self.second.set()
            asyncio.get_running_loop().call_later(_SECONDS_AT_ONCE, _exit, 0)
        else:
            _exit(0)


def _summary(engine: AsyncEngine, addresses: Sequence[str]) -> str:
    from fastpage._C import __version__
    from fastpage.engine.memory import format_bytes

    info = engine.info
    weights = info.dtype if info.quantization == "none" else info.quantization
    rows = [
        ("model", f"{info.served_model_name} ({info.architecture})"),
        ("weights", f"{weights}, {format_bytes(info.weight_bytes)}"),
        (
            "KV cache",
            f"{info.kv_cache_dtype}, {format_bytes(info.kv_cache_bytes)}: {info.num_kv_blocks} "
            f"blocks of {info.block_size} tokens",
        ),
        (
            "concurrency",
            f"{info.max_concurrency:.4g} requests of full length ({info.max_model_len} tokens); "
            f"at most {info.max_num_seqs} sequences",
        ),
        (
            "a step",
            f"at most {info.max_num_batched_tokens} tokens, on {info.num_threads} threads",
        ),
        *(("address", address) for address in addresses),
    ]
    if info.num_host_kv_blocks:
        text = f"{format_bytes(info.host_cache_bytes)}: {info.num_host_kv_blocks} blocks"
        rows.insert(3, ("host cache", text))
    lines = [f"fastpage {__version__} is ready"]
    lines += [f"  {name:<12} {value}" for name, value in rows]
    phases = engine.phases
    width = max(10, *map(len, phases))
    lines.append("  start-up     seconds")
    lines += [f"    {name:<{width}} {seconds:6.2f}" for name, seconds in phases.items()]
    lines.append(f"    {'in all':<{width}} {_seconds_since_process_start():6.2f}")
    return "\n".join(lines)


def _seconds_since_process_start() -> float:
    """Before main() runs, the interpreter has started and found its modules: that counts too."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    return time.process_time()


def _print(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        logs.announce(text)


def _exit_with_error(program: str, error: BaseException) -> NoReturn:
    message = " ".join(str(error).split()) or type(error).__name__
    logs.announce(f"{program}: error: {message}", logging.ERROR)
    # A thread that loads may still be busy.
    _exit(1)


def _exit(status: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
