"""fastpage-grpc: the server's command line, from start to exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastpage.serving.argument_parser import OneLineParser

if TYPE_CHECKING:
    from fastpage.engine.args import EngineArgs
    from fastpage.engine.loading import LoadedModel

PROGRAM = "fastpage-grpc"


def main() -> None:
    # Until the event loop listens for it, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    phases = {"Python": _seconds_since_process_start()}
    start = time.perf_counter()
    # Not at the top: these take a while, and the time is shown.
    from fastpage import _C
    from fastpage.engine.args import EngineArgs

    parser = OneLineParser(
        prog=PROGRAM,
        usage="%(prog)s --model PATH [options]",
        description="Serve a model over gRPC (proto/fastpage/v1/fastpage.proto).",
    )
    parser.add_argument("--version", action="version", version=f"fastpage {_C.__version__}")
    server = parser.add_argument_group("Server", "where it listens")
    server.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    server.add_argument(
        "--port",
        type=int,
        default=50051,
        help="0: let the system choose, and print it (default: %(default)s)",
    )
    EngineArgs.add_cli_args(parser)
    options = parser.parse_args()
    if not 0 <= options.port < 65536:
        parser.error(f"--port {options.port} is not between 0 and 65535")
    try:
        args = EngineArgs.from_cli_args(options)
    except ValueError as error:
        parser.error(str(error))

    from fastpage.errors import FastpageError
    from fastpage.serving.grpc import service as _  # noqa: F401

    phases["imports"] = time.perf_counter() - start
    try:
        asyncio.run(_serve(args, options.host, options.port, phases))
    except (FastpageError, OSError, MemoryError) as error:
        _exit_with_error(error)


async def _serve(args: EngineArgs, host: str, port: int, phases: dict[str, float]) -> None:
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.serving.grpc.server import GrpcServer
    from fastpage.serving.grpc.service import FastpageService

    stop = _stop_event()
    start = time.perf_counter()
    server = GrpcServer([FastpageService()])
    port = await server.start(host, port)
    phases["server"] = time.perf_counter() - start
    _say(f"{PROGRAM}: listening on {host}:{port}, loading {args.model}")

    loading = _load_in_thread(args)
    stopping = asyncio.create_task(stop.wait())
    first: list[asyncio.Future[Any]] = [loading, stopping]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # The loading thread is deep inside the weights: nothing that it has needs an orderly end.
        _say(f"{PROGRAM}: stopped while loading")
        os._exit(0)
    loaded = loading.result()
    engine = AsyncEngine(loaded)
    await server.set_engine(engine)
    _say(_summary(loaded, phases | loaded.phases, f"{host}:{port}"))

    await stopping
    _say(f"{PROGRAM}: stopping")
    await server.stop()


def _stop_event() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def _load_in_thread(args: EngineArgs) -> asyncio.Future[LoadedModel]:
    """On a daemon thread, unlike asyncio.to_thread, so that an error or a signal need not wait."""
    from fastpage.engine.loading import load_model

    loop = asyncio.get_running_loop()
    future: asyncio.Future[LoadedModel] = loop.create_future()

    def load() -> None:
        try:
            loaded = load_model(args)
        except BaseException as error:
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, loaded)

    threading.Thread(target=load, name="fastpage-load", daemon=True).start()
    return future


def _summary(loaded: LoadedModel, phases: dict[str, float], address: str) -> str:
    from fastpage._C import __version__
    from fastpage.engine.memory import format_bytes

    info = loaded.info
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
        ("address", address),
    ]
    if info.num_host_kv_blocks:
        text = f"{format_bytes(info.host_cache_bytes)}: {info.num_host_kv_blocks} blocks"
        rows.insert(3, ("host cache", text))
    lines = [f"fastpage {__version__} is ready"]
    lines += [f"  {name:<12} {value}" for name, value in rows]
    lines.append("  start-up     seconds")
    lines += [f"    {name:<10} {seconds:6.2f}" for name, seconds in phases.items()]
    lines.append(f"    {'in all':<10} {_seconds_since_process_start():6.2f}")
    return "\n".join(lines)


def _seconds_since_process_start() -> float:
    """Before main() runs, the interpreter has started and found its modules: that counts too."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    return time.process_time()


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def _exit_with_error(error: BaseException) -> NoReturn:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)
    # The loading thread may still be busy.
    os._exit(1)


if __name__ == "__main__":
    main()
