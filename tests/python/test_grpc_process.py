"""fastpage-grpc and fastpage-chat as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_harness import NOT_SERVING, SERVING, text_request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import (
    ENDLESS,
    ENDLESS_OPTIONS,
    GRPC,
    ServerProcess,
    event_loop_of,
    write_endless_model,
)
from waiting import PATIENCE, eventually

from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("model") / "endless.gguf")


def wait_until_serving(channel: grpc.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=PATIENCE
    )
    while next(watch).status != SERVING:
        pass
    watch.cancel()


def endless_request() -> pb.GenerateRequest:
    return text_request("Once upon a time", max_tokens=ENDLESS, ignore_eos=True)


def end_of(call: grpc.Call) -> tuple[grpc.StatusCode, int]:
    """And the tokens until then."""
    tokens = 0
    try:
        for response in call:
            tokens += sum(len(output.token_ids) for output in response.outputs)
    except grpc.RpcError as error:
        return error.code(), tokens
    return grpc.StatusCode.OK, tokens


def until_end(call: grpc.Call) -> Iterator[Any]:
    with contextlib.suppress(grpc.RpcError):
        yield from call


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_when_the_time_to_drain_is_over(
    endless_model: Path, number: signal.Signals
) -> None:
    options = [*ENDLESS_OPTIONS, "--served-model-name", "tiny"]
    # A step is under way most of the time then.
    options += ["--async-scheduling", "--host-cache-memory", "8MiB", "--drain-timeout", "0"]
    with (
        ServerProcess(GRPC, endless_model, *options) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor() as pool,
    ):
        wait_until_serving(channel)
        stub = pb_grpc.FastpageStub(channel)
        assert stub.GetModelInfo(pb.GetModelInfoRequest()).model == "tiny"
        call = stub.Generate(endless_request())
        next(call)
        end = pool.submit(end_of, call)
        assert server.stop(number) == 0
        assert end.result(PATIENCE)[0] == grpc.StatusCode.UNAVAILABLE
        assert server.err == ""
        for words in ("tiny", "16384 blocks of 16 tokens", "host cache", "start-up", "in all"):
            assert words in server.out


def test_a_signal_lets_requests_finish_and_a_second_one_does_not(
    endless_model: Path, server_loop: str
) -> None:
    options = [*ENDLESS_OPTIONS, "--drain-timeout", "600"]
    with (
        ServerProcess(GRPC, endless_model, *options) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor() as pool,
    ):
        wait_until_serving(channel)
        assert event_loop_of(server.process.pid) == server_loop
        stub, health = pb_grpc.FastpageStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        long = stub.Generate(endless_request())
        short = stub.Generate(text_request("Once", max_tokens=400, ignore_eos=True))
        next(long)
        tokens = len(next(short).outputs[0].token_ids)
        end = pool.submit(end_of, long)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        refused = stub.Generate(text_request("Once"))
        assert end_of(refused)[0] == grpc.StatusCode.UNAVAILABLE
        assert not stub.GetServerStats(pb.GetServerStatsRequest()).ready
        assert end_of(short) == (grpc.StatusCode.OK, 400 - tokens)

        assert not end.done() and server.process.poll() is None
        assert server.stop() == 0
        assert end.result(PATIENCE)[0] == grpc.StatusCode.UNAVAILABLE
        assert end_of(watch)[0] == grpc.StatusCode.UNAVAILABLE
        assert server.err == ""


def test_a_signal_while_loading_ends_the_process(smollm2_gguf: Path) -> None:
    with ServerProcess(GRPC, smollm2_gguf) as server:
        assert (server.stop(), server.err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_for_all_its_processes_while_loading(
    smollm2_gguf: Path, number: signal.Signals
) -> None:
    """As a terminal's Ctrl-C and a service manager send it."""
    with ServerProcess(GRPC, smollm2_gguf, own_group=True) as server:
        eventually("there is an engine process", lambda: len(server.pids()) > 1)
        os.killpg(server.process.pid, number)
        assert (server.process.wait(PATIENCE), server.err) == (0, "")


def test_a_unix_socket_a_token_and_health(smollm2_gguf: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    options = ["--address", f"unix:{tmp_path}/socket", "--auth-token-file", str(token)]
    options += ["--drain-timeout", "600"]
    with ServerProcess(GRPC, smollm2_gguf, "--max-model-len", "512", *options) as server:
        assert server.address == f"unix:{tmp_path}/socket"
        channel = grpc.insecure_channel(server.address)
        wait_until_serving(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        chat = [sys.executable, "-m", "fastpage.serving.chat", "--address", server.address]
        chat += ["--auth-token-file", str(token), "--max-tokens", "8", "--temperature", "0"]
        answer = subprocess.run(
            [*chat, "What is the capital of France?"], capture_output=True, timeout=PATIENCE
        )
        assert (answer.returncode, answer.stderr) == (0, b"")
        assert b"Paris" in answer.stdout
        # Who only watches does not keep the server.
        assert server.stop() == 0
        assert [response.status for response in until_end(watch)] == [NOT_SERVING]
        channel.close()
    assert not (tmp_path / "socket").exists()


def test_chat_client(smollm2_gguf: Path) -> None:
    chat = [sys.executable, "-m", "fastpage.serving.chat"]
    with ServerProcess(GRPC, smollm2_gguf, "--max-model-len", "512") as server:
        address = server.address
        with grpc.insecure_channel(address) as channel:
            wait_until_serving(channel)
        options = ["--address", address, "--temperature", "0", "--max-tokens", "8", "--verbose"]
        once = subprocess.run(
            [*chat, *options, "What is the capital of France?"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert once.returncode == 0
        assert "Paris" in once.stdout
        assert "prompt tokens" in once.stderr
        piped = subprocess.run(
            [*chat, *options], input="Say hello.", capture_output=True, text=True, timeout=PATIENCE
        )
        assert piped.returncode == 0 and piped.stdout.strip()
        # Nobody reads what it writes.
        reader, writer = os.pipe()
        os.close(reader)
        unread = subprocess.run(
            [*chat, "--address", address, "--max-tokens", "60", "Count to one hundred."],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
        )
        os.close(writer)
        assert (unread.returncode, unread.stderr) == (1, b"")

    # A port that is taken, and at which nobody answers.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        nobody = subprocess.run(
            [*chat, "--address", address, "hello"], capture_output=True, text=True, timeout=PATIENCE
        )
    assert nobody.returncode == 1
    assert nobody.stderr.count("\n") == 1
    assert f"no server answers at {address}" in nobody.stderr
