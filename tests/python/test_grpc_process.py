"""fastpage-grpc and fastpage-chat as processes, with the real model."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_harness import SERVING, text_request
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastpage.v1 import fastpage_pb2 as pb
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc


@contextlib.contextmanager
def server_process(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [
        sys.executable,
        "-m",
        "fastpage.serving.grpc.cli",
        "--model",
        str(model),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        match = re.search(r"listening on (\S+:\d+)", line)
        assert match, line + process.stderr.read()
        yield process, match[1]
    finally:
        process.kill()
        process.wait()


def wait_until_serving(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + 60
    while health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True).status != SERVING:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(smollm2_gguf: Path, number: signal.Signals) -> None:
    options = ["--max-model-len", "2048", "--num-kv-blocks", "128", "--served-model-name", "smol"]
    # A step is under way most of the time then.
    options += ["--async-scheduling", "--host-cache-memory", "8MiB", "--drain-timeout", "0"]
    with (
        server_process(smollm2_gguf, *options) as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        wait_until_serving(channel)
        stub = pb_grpc.FastpageStub(channel)
        assert stub.GetModelInfo(pb.GetModelInfoRequest()).model == "smol"
        request = text_request("Once upon a time", max_tokens=1500, ignore_eos=True)
        call = stub.Generate(request)
        next(call)
        process.send_signal(number)
        with pytest.raises(grpc.RpcError) as error:
            for _ in call:
                pass
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert err == ""
        for words in ("smol", "128 blocks of 16 tokens", "host cache", "start-up", "in all"):
            assert words in out


def test_a_signal_while_loading_ends_the_process(smollm2_gguf: Path) -> None:
    with server_process(smollm2_gguf) as (process, _):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")


def test_chat_client(smollm2_gguf: Path) -> None:
    chat = [sys.executable, "-m", "fastpage.serving.chat"]
    with server_process(smollm2_gguf, "--max-model-len", "512") as (_, address):
        with grpc.insecure_channel(address) as channel:
            wait_until_serving(channel)
        options = ["--address", address, "--temperature", "0", "--max-tokens", "8", "--verbose"]
        once = subprocess.run(
            [*chat, *options, "What is the capital of France?"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert once.returncode == 0
        assert "Paris" in once.stdout
        assert "prompt tokens" in once.stderr
        piped = subprocess.run(
            [*chat, *options], input="Say hello.", capture_output=True, text=True, timeout=60
        )
        assert piped.returncode == 0 and piped.stdout.strip()
        process = subprocess.Popen(
            [*chat, "--address", address, "--max-tokens", "60", "Count to one hundred."],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 1)

    nobody = subprocess.run([*chat, *options, "hello"], capture_output=True, text=True, timeout=60)
    assert nobody.returncode == 1
    assert nobody.stderr.count("\n") == 1
    assert f"no server answers at {address}" in nobody.stderr
