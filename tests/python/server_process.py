"""A server's processes, seen from outside: what they print, hold and leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import grpc
from checkpoint_files import (
    CORPUS,
    QuantType,
    byte_level_vocabulary,
    model_metadata,
    model_tensors,
    write_gguf,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import PATIENCE, eventually, until_idle

from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

GRPC = "fastpage.serving.grpc.cli"
HTTP = "fastpage.serving.openai.cli"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_LISTENING = r"listening on (?:http://)?([^\s,]+)[\s,]"

# Tokens that take an hour: a request for so many never ends by itself while a test runs.
ENDLESS = 260_000
# Of the KV cache only the blocks that are used take memory.
ENDLESS_OPTIONS = ("--num-kv-blocks", "16384", "--max-num-seqs", "16", "--max-num-waiting", "64")
_LARGE_MAPPING = 128 << 20


def write_tiny_model(path: Path, context_length: int = 4096) -> Path:
    """Random weights: a step takes a fraction of a millisecond."""
    vocabulary = byte_level_vocabulary(CORPUS)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    metadata = model_metadata("llama", context_length=context_length)
    size = len(vocabulary["tokenizer.ggml.tokens"])
    write_gguf(
        path,
        "llama",
        model_tensors("llama", size, [QuantType.F16]),
        {**metadata, **vocabulary, "tokenizer.chat_template": template},
    )
    return path


def write_endless_model(path: Path) -> Path:
    """The same weights, and room for endless requests."""
    return write_tiny_model(path, context_length=1 << 18)


class ServerProcess:
    """`python -m module --model ... --port 0`, until stop() or the end of the with block."""

    def __init__(self, module: str, model: Path, *options: str, own_group: bool = False) -> None:
        self.module = module
        command = [sys.executable, "-m", module, "--model", str(model), "--port", "0"]
        # Files: nobody reads them while the server runs, and a pipe would fill up.
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, *options], stdout=out, stderr=err, start_new_session=own_group
            )
        eventually("the server listens", self._listens)
        listening = re.search(_LISTENING, self.out)
        assert listening is not None, self.out + self.err
        self.address = listening[1]

    def _listens(self) -> bool:
        return re.search(_LISTENING, self.out) is not None or self.process.poll() is not None

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    # ---- its processes

    def pids(self) -> list[int]:
        """The server's own first, then its children's and theirs."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has ended
                    found += map(int, task.read_text().split())
        return found

    def memory(self) -> int:
        """Bytes of memory of their own that all its processes hold, but for a large KV cache, whose
        blocks take memory when they are first used."""
        total = 0
        for pid in self.pids():
            mappings = Path(f"/proc/{pid}/smaps").read_text()
            for size, anonymous in re.findall(
                r"^Size: +(\d+) kB$.*?^Anonymous: +(\d+) kB$", mappings, re.M | re.S
            ):
                total += int(anonymous) << 10 if int(size) << 10 < _LARGE_MAPPING else 0
        return total

    def num_open_files(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())


def event_loop_of(pid: int) -> str:
    """The package that a server's process has it from."""
    return "uvloop" if "/uvloop/" in Path(f"/proc/{pid}/maps").read_text() else "asyncio"


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class MemoryRecord:
    """What a server's processes hold after each of several rounds."""

    def __init__(self, server: ServerProcess, kept: int) -> None:
        """`kept`: bytes that allocators may keep for the next time."""
        self._server = server
        self._kept = kept
        self._memory: list[int] = []

    def is_flat(self, rounds: int) -> bool:
        """After one more round: whether there were enough, and the last third needed no more than
        the third before. What is lost in each round is lost however many there are."""
        self._memory.append(self._server.memory())
        assert len(self._memory) <= 10 * rounds, f"{[m >> 20 for m in self._memory]} MiB"
        third = len(self._memory) // 3
        if len(self._memory) < rounds:
            return False
        return min(self._memory[-third:]) - min(self._memory[third : 2 * third]) < self._kept


class GrpcClient:
    """Channel and stubs of one fastpage-grpc. For one event loop."""

    def __init__(self, address: str) -> None:
        unlimited = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.aio.insecure_channel(address, options=unlimited)
        self.stub = pb_grpc.FastpageStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def __aenter__(self) -> GrpcClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()

    async def wait_until(self, status: int) -> None:
        """Returns when the health check says so."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        async for response in watch:
            if response.status == status:
                watch.cancel()
                return

    async def wait_until_serving(self) -> None:
        await self.wait_until(SERVING)

    async def stats(self) -> pb.GetServerStatsResponse:
        return await self.stub.GetServerStats(pb.GetServerStatsRequest())

    async def wait_until_idle(self) -> None:
        """No request is left in the engine, and all blocks are free."""
        await until_idle(self.stats)
