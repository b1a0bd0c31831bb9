"""An engine is started again only for what it was started for: the same files, the same build."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
from collections.abc import Awaitable
from pathlib import Path

import grpc
import pytest
from checkpoint_files import write_safetensors
from grpc_harness import text_request
from server_process import GRPC, GrpcClient, ServerProcess, write_tiny_model
from waiting import PATIENCE

from fastpage import _C, AsyncEngine, EngineArgs, SamplingParams
from fastpage.checkpoints import open_checkpoint
from fastpage.engine import engine_process, process_core
from fastpage.engine.core import EngineLost
from fastpage.engine.hello import BUILD
from fastpage.engine.model_files import differences, digests
from fastpage.engine.observer import EngineObserver
from fastpage.engine.process_core import ProcessCore

TINY = {"num_kv_blocks": 64, "max_model_len": 512, "threads": 1}


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test, timeout=PATIENCE)

    asyncio.run(main())


def flip(path: Path, offset: int, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(num_bytes)
        file.seek(offset)
        file.write(bytes(byte ^ 1 for byte in old))


def change_a_weight(path: Path) -> None:
    """As somebody would who wants it unnoticed: neither size nor times change."""
    times = path.stat()
    flip(path, times.st_size - 1000, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def ids_of(engine: AsyncEngine) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    return [out async for out in engine.generate([5, 6, 7], params)][-1].outputs[0].token_ids


class Back(EngineObserver):
    def __init__(self) -> None:
        self.times = asyncio.Queue[None]()

    def engine_started(self, engine: AsyncEngine) -> None:
        self.times.put_nowait(None)


async def start(model: Path) -> tuple[AsyncEngine, ProcessCore, Back]:
    back = Back()
    engine = await AsyncEngine.start_process(EngineArgs(model=str(model), **TINY), back)
    await back.times.get()
    core = engine._core
    assert isinstance(core, ProcessCore)
    return engine, core, back


# ---------------------------------------------------------------- the model's files


def test_the_same_file_may_come_again(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")

    async def test() -> None:
        engine, core, back = await start(model)
        async with engine:
            expected = await ids_of(engine)
            shutil.copy(model, tmp_path / "copy")
            (tmp_path / "copy").rename(model)
            os.utime(model, (1, 1))
            os.kill(core.pid, signal.SIGKILL)
            await back.times.get()
            assert await ids_of(engine) == expected

    run(test())


def test_an_engine_is_not_started_again_from_other_files(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")

    async def test() -> None:
        engine, core, _ = await start(model)
        async with engine:
            change_a_weight(model)
            await ids_of(engine)  # what runs goes on
            os.kill(core.pid, signal.SIGKILL)
            lost = await engine.wait_lost()
            assert str(lost).startswith("model.gguf of the model was replaced")
            assert "start the server again" in str(lost)
            assert not engine.ready
            with pytest.raises(EngineLost, match=r"model.gguf of the model was replaced"):
                await ids_of(engine)

    run(test())


def test_files_that_change_while_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    hello = process_core._Process.hello

    async def change_then_hear(self: process_core._Process) -> object:
        said = await hello(self)
        said["files"]["model.gguf"] = "0"
        return said

    monkeypatch.setattr(process_core._Process, "hello", change_then_hear)

    async def test() -> None:
        with pytest.raises(EngineLost, match=r"model.gguf of the model was replaced"):
            await AsyncEngine.start_process(EngineArgs(model=str(model), **TINY))

    run(test())


def test_a_server_without_its_model_ends(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    with ServerProcess(GRPC, model, "--num-kv-blocks", "64", "--max-model-len", "512") as server:

        async def test() -> None:
            async with GrpcClient(server.address) as client:
                await client.wait_until_serving()
                change_a_weight(model)
                os.kill(server.pids()[1], signal.SIGKILL)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await client.stub.GenerateUnary(text_request("the"))
                assert error.value.code() == grpc.StatusCode.UNAVAILABLE

        run(test())
        assert server.process.wait(PATIENCE) == 1
        last = server.err.splitlines()[-1]
        assert "fastpage-grpc: error: model.gguf of the model was replaced" in last


def test_what_counts_as_the_same_model(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "large.gguf")
    args, checkpoint = EngineArgs(model=str(model)), open_checkpoint(model)
    small = model.stat().st_size
    os.truncate(model, 40 << 20)  # sparse
    before = digests(args, checkpoint)
    assert list(before) == ["large.gguf"] and differences(before, before) == []

    def changes(offset: int, num_bytes: int) -> bool:
        flip(model, offset, num_bytes)
        changed = differences(before, digests(args, checkpoint)) == ["large.gguf"]
        flip(model, offset, num_bytes)
        return changed

    assert changes(small // 2, 1) and changes((40 << 20) - 1, 1)
    assert all(changes(place << 20, 2 << 20) for place in range(0, 38, 5))
    os.truncate(model, (40 << 20) + 1)
    assert differences(before, digests(args, checkpoint)) == ["large.gguf"]


def test_the_files_of_a_directory_that_are_read(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / "tokenizer"
    for path in (folder, other):
        path.mkdir()
        for name in ("tokenizer.json", "chat_template.jinja", "config.json", "notes.txt"):
            (path / name).write_text("{}")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates/chat_template.jinja").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a": ("F32", (2, 2), bytes(16))})
    args = EngineArgs(model=str(folder), tokenizer=str(other))
    checkpoint = open_checkpoint(folder)
    before = digests(args, checkpoint)
    assert set(before) >= {"model.safetensors", "config.json", "chat_template.jinja"}
    for path, name in (
        (folder / "model.safetensors", "model.safetensors"),
        (folder / "tokenizer.json", "tokenizer.json"),
        (folder / "chat_template.jinja", "chat_template.jinja"),
        (
            folder / "additional_chat_templates/chat_template.jinja",
            "additional_chat_templates/chat_template.jinja",
        ),
        (other / "tokenizer.json", f"{other} tokenizer.json"),
        (other / "chat_template.jinja", f"{other} chat_template.jinja"),
    ):
        flip(path, 0, 1)
        assert differences(before, digests(args, checkpoint)) == [name]
        flip(path, 0, 1)
    (folder / "notes.txt").write_text("new")
    (folder / "pytorch_model.bin").write_text("not read")
    assert differences(before, digests(args, checkpoint)) == []
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert differences(before, digests(args, checkpoint)) == [
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors.index.json",
    ]


# ---------------------------------------------------------------- the package


def test_an_engine_of_another_build_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package was replaced under a running server."""
    model = write_tiny_model(tmp_path / "model.gguf")

    async def test() -> None:
        engine, core, _ = await start(model)
        async with engine:
            monkeypatch.setattr(process_core, "BUILD", "fastpage 0.0.1, channel 1")
            os.kill(core.pid, signal.SIGKILL)
            lost = str(await engine.wait_lost())
            assert f"process is of [{BUILD}], and the server of [fastpage 0.0.1, channel 1]" in lost
            assert "start the server again" in lost

    run(test())


def test_the_engines_process_refuses_another_front_end_before_it_loads() -> None:
    ours, theirs = socket.socketpair()
    orders = {"build": "fastpage 0.0.1, channel 1", "what": "an option that nobody knows"}
    text = json.dumps(orders).encode()
    with ours, theirs:
        ours.sendall(struct.pack("=Q", len(text)) + text)
        assert engine_process._load(theirs, {}) is None
        (length,) = struct.unpack("=Q", ours.recv(8, socket.MSG_WAITALL))
        said = json.loads(ours.recv(length, socket.MSG_WAITALL))
    assert said["error"] == "EngineLost" and said["build"] == BUILD
    assert "[fastpage 0.0.1, channel 1]" in said["message"]
    assert f"fastpage {_C.__version__}, channel {_C.__channel_version__}" == BUILD
