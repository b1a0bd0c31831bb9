"""A server from its command line to its exit code: what fastpage-grpc and fastpage-openai share.

It listens at once and loads the model meanwhile, is ready, drains on the first SIGTERM or SIGINT,
and ends: with exit code 0, unless it could not start, or its engine's process could not be started
again. With --api-server-count it is the parent of processes that do so: see front_ends/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from fastpage import logs
from fastpage.serving.argument_parser import OneLineParser

if TYPE_CHECKING:
    from fastpage.engine.args import EngineArgs
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.engine.loading import ModelInfo
    from fastpage.serving.metrics.exposition import Expose
    from fastpage.serving.metrics.shared import SharedMetrics
    from fastpage.serving.observability import Observability

# Of the clients, to take the last messages, when the time to drain is over.
_LAST_SECONDS = 1.0
# After the second signal, before the process ends whatever is left.
_SECONDS_AT_ONCE = 1.0
_MOST_API_SERVERS = 64


class Frontend(Protocol):
    """A way in. One that the model or a health check is asked of follows the engine's process by
    itself, as an observer of the engine."""

    async def start(self) -> str:
        """Listens, and answers that it is not ready. Returns its address, as people write it, or ""
        if it has none. Raises FastpageError if that cannot be had."""
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
    in the options what they need of the engine. `expose` makes metrics seen; None: they are those
    of this process."""

    def __call__(
        self, options: argparse.Namespace, expose: Expose | None
    ) -> Sequence[Frontend]: ...


class Parsed(NamedTuple):
    """A command line."""

    options: argparse.Namespace
    args: EngineArgs
    frontends: Sequence[Frontend]
    observing: Observability
    shared_metrics: SharedMetrics | None  # of a parent's front ends


@dataclass(frozen=True)
class Command:
    program: str
    module: str  # where it is the COMMAND
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    make_frontends: MakeFrontends

    def run(self) -> None:
        """The command's main()."""
        # Until the event loop listens for it, Ctrl-C ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        phases = {"Python": _seconds_since_process_start()}
        start = time.perf_counter()
        # Not at the top: these take a while, and the time is shown.
        from fastpage.errors import FastpageError

        argv = sys.argv[1:]
        parsed = self.parse(argv)
        from fastpage.engine import async_engine as _  # noqa: F401

        server: Any
        if parsed.options.api_server_count == 1:
            server = Server(parsed, _Alone(self.program, phases))
        else:
            from fastpage.serving.front_ends.parent import Parent

            server = Parent(self, argv, parsed, phases)
        phases["imports"] = time.perf_counter() - start
        try:
            run_on_a_loop(server.run())
        except (FastpageError, OSError, MemoryError) as error:
            _exit_with_error(self.program, error)

    def parse(
        self, argv: Sequence[str], port: int | None = None, expose: Expose | None = None
    ) -> Parsed:
        """Ends the process, with a line that says why, if that is no command line. `port`: instead
        of the one that it names. From here on logs are as it says."""
        from fastpage import _C
        from fastpage.engine.args import EngineArgs
        from fastpage.serving import observability

        parser = OneLineParser(
            prog=self.program,
            usage="%(prog)s --model PATH [options]",
            description=self.description,
        )
        parser.add_argument("--version", action="version", version=f"fastpage {_C.__version__}")
        self.add_options(parser)
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
        options = parser.parse_args(argv)
        if port is not None:
            options.port = port
        try:
            if not 0 <= options.drain_timeout < float("inf"):
                raise ValueError(f"--drain-timeout {options.drain_timeout} is not a number >= 0")
            if not 1 <= options.api_server_count <= _MOST_API_SERVERS:
                raise ValueError(
                    f"--api-server-count {options.api_server_count} is not from 1 to "
                    f"{_MOST_API_SERVERS}"
                )
            if options.startup_timeout != 0 and not 1 <= options.startup_timeout < float("inf"):
                raise ValueError(
                    f"--startup-timeout {options.startup_timeout} is neither 0, for none, nor at "
                    "least 1 (second)"
                )
            observing = observability.Observability(options)
            shared_metrics = None
            if expose is None and options.api_server_count > 1:
                from fastpage.serving.metrics.shared import SharedMetrics

                shared_metrics = SharedMetrics()
                expose = shared_metrics.expose
            frontends = self.make_frontends(options, expose)
            args = EngineArgs.from_cli_args(options)
        except ValueError as error:
            parser.error(" ".join(str(error).split()))
        return Parsed(options, args, frontends, observing, shared_metrics)


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
    server.add_argument(
        "--api-server-count",
        type=int,
        default=1,
        metavar="N",
        help="processes that serve clients, over one engine: more than one where one cannot keep "
        "up with the messages (default: %(default)s)",
    )
    server.add_argument(
        "--startup-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="of several such processes, one that takes longer than this to be ready is killed: at "
        "the start that ends the server, later it is started again. Loading the model does not "
        "count. 0: wait for ever (default: %(default)g)",
    )
    return server


def refuse_to_share(options: argparse.Namespace, option: str) -> None:
    """`option` names a Unix socket. Raises ValueError if several processes were to listen there."""
    if options.api_server_count > 1:
        raise ValueError(
            f"{option}: only one process can listen at a Unix socket: leave "
            f"--api-server-count {options.api_server_count} out, or give --host and --port"
        )


class Home(Protocol):
    """Where a server runs: who stops it, whose engine it has, who hears of it."""

    @property
    def signals(self) -> Signals: ...

    async def start_engine(self, args: EngineArgs) -> AsyncEngine: ...

    def say(self, text: str) -> None: ...

    def listening(self, addresses: Sequence[str], model: str) -> None: ...

    def ready(self, engine: AsyncEngine, addresses: Sequence[str]) -> None: ...


class _Alone:
    """One process that serves, and its engine's."""

    def __init__(self, program: str, phases: dict[str, float]) -> None:
        self._program = program
        self._phases = phases
        self._start = time.perf_counter()
        self.signals = Signals()

    async def start_engine(self, args: EngineArgs) -> AsyncEngine:
        from fastpage.engine.async_engine import AsyncEngine

        engine = await AsyncEngine.start_process(args)
        engine.phases = self._phases | engine.phases
        return engine

    def say(self, text: str) -> None:
        say(f"{self._program}: {text}")

    def listening(self, addresses: Sequence[str], model: str) -> None:
        self._phases["server"] = time.perf_counter() - self._start
        self.say(f"listening on {', '.join(addresses)}, loading {model}")

    def ready(self, engine: AsyncEngine, addresses: Sequence[str]) -> None:
        say(summary(engine.info, engine.phases, [("address", each) for each in addresses]))


class Server:
    def __init__(self, parsed: Parsed, home: Home) -> None:
        self._args = parsed.args
        self._frontends = parsed.frontends
        self._observing = parsed.observing
        self._drain_timeout = parsed.options.drain_timeout
        self._home = home
        self._signals = home.signals

    async def run(self) -> None:
        self._signals.listen()
        found = [await frontend.start() for frontend in self._frontends]
        addresses = [address for address in found if address]
        self._home.listening(addresses, self._args.model)
        engine = await first_of(self._home.start_engine(self._args), self._signals.first)
        if engine is None:
            self._home.say("stopped while loading")
            # Nothing that is half loaded needs an orderly end; the engine's process goes along.
            exit_now(0)
        for observer in self._observing.observers:
            engine.add_observer(observer)
        for frontend in self._frontends:
            await frontend.set_engine(engine)
        # What is there now stays. A garbage collection that goes through all of it again takes 20
        # ms, in which every stream stands still.
        gc.collect()
        gc.freeze()
        self._home.ready(engine, addresses)
        lost = await first_of(engine.wait_lost(), self._signals.first)
        await self._stop(engine)
        if lost is not None:  # whoever started this process is to start it again
            raise lost

    async def _stop(self, engine: AsyncEngine) -> None:
        deadline = time.monotonic() + self._drain_timeout
        self._home.say(f"stopping: requests in progress have up to {self._drain_timeout:g} s")
        for frontend in self._frontends:
            await frontend.drain()
        await first_of(engine.drain(self._drain_timeout), self._signals.second)
        await engine.shutdown()
        await self._stop_frontends(max(_LAST_SECONDS, deadline - time.monotonic()))
        await first_of(self._observing.close(), self._signals.second)
        self._home.say("stopped")

    async def _stop_frontends(self, grace: float) -> None:
        async def stop(seconds: float) -> bool:
            await asyncio.gather(*(frontend.stop(seconds) for frontend in self._frontends))
            return True

        second = self._signals.second
        if second.is_set() or not await first_of(stop(grace), second):
            await stop(_SECONDS_AT_ONCE / 2)


def run_on_a_loop(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run(), on uvloop if that is installed."""
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


async def first_of(awaitable: Any, event: asyncio.Event) -> Any:
    """What `awaitable` returns, or None if `event` is set before, which cancels it."""
    work = asyncio.ensure_future(awaitable)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        waiting.cancel()


class Signals:
    """The first SIGTERM or SIGINT sets `first`, the next one `second` too, and ends the process
    soon after, whatever it is at."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        if not self.first.is_set():
            self.first.set()
        elif not self.second.is_set():
            self.second.set()
            asyncio.get_running_loop().call_later(_SECONDS_AT_ONCE, exit_now, 0)
        else:
            exit_now(0)


def summary(info: ModelInfo, phases: Mapping[str, float], places: Sequence[tuple[str, str]]) -> str:
    """`places`: where it runs and listens, each with its name."""
    from fastpage._C import __version__
    from fastpage.engine.memory import format_bytes

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
        *places,
    ]
    if info.num_host_kv_blocks:
        text = f"{format_bytes(info.host_cache_bytes)}: {info.num_host_kv_blocks} blocks"
        rows.insert(3, ("host cache", text))
    lines = [f"fastpage {__version__} is ready"]
    lines += [f"  {name:<12} {value}" for name, value in rows]
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


def say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        logs.announce(text)


def _exit_with_error(program: str, error: BaseException) -> NoReturn:
    message = " ".join(str(error).split()) or type(error).__name__
    logs.announce(f"{program}: error: {message}", logging.ERROR)
    # A thread that loads may still be busy.
    exit_now(1)


def exit_now(status: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
