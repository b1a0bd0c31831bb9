"""--api-server-count: several front-end processes over one engine, and what happens when one of the
processes dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from server_process import (
    ENDLESS,
    ENDLESS_OPTIONS,
    GRPC,
    HTTP,
    NOT_SERVING,
    GrpcClient,
    ServerProcess,
    event_loop_of,
    is_alive,
    write_endless_model,
    write_tiny_model,
)
from waiting import PATIENCE, eventually, until

from fastpage import LLM, EngineArgs, SamplingParams
from fastpage.engine.process_core import Hello, ProcessCore
from fastpage.errors import FastpageError
from fastpage.serving.front_ends.port import reserve_port
from fastpage.serving.front_ends.supervised import SupervisedFrontEnd
from fastpage.v1 import fastpage_pb2 as pb

PROMPT = "def main"
LONG = 1000  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The tokens after PROMPT. What is asked for less is their beginning."""
    params = SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True)
    return LLM(str(model), max_model_len=2 * LONG).generate(PROMPT, params)[0].outputs[0].token_ids


class Server(ServerProcess):
    """With two front ends, from when it is ready on."""

    def __init__(self, module: str, model: Path, *options: str, own_group: bool = False) -> None:
        # No watchdog: the log is to be empty on a machine that pauses, too.
        own = ("--api-server-count", "2", "--engine-timeout", "0", *ENDLESS_OPTIONS)
        options = (*own, *options)
        super().__init__(module, model, *options, own_group=own_group)
        eventually("the server is ready", self._is_ready)

    def _is_ready(self) -> bool:
        return "is ready" in self.out or self.process.poll() is not None

    def front_ends(self) -> list[int]:
        """Their process ids."""
        match = re.search(r"front ends +2 \(pids (\d+), (\d+)\)", self.out)
        assert match is not None, self.out + self.err
        pids = [int(match[1]), int(match[2])]
        for index, pid in re.findall(r"front end (\d) is back \(pid (\d+)\)", self.err):
            pids[int(index)] = int(pid)
        return pids

    def engine(self) -> int:
        (pid,) = set(self.pids()[1:]) - set(self.front_ends())
        return pid

    def owner(self, client: socket.socket) -> int:
        """Which front end has the other end of the connection."""
        port = client.getsockname()[1]

        def found() -> list[int]:
            lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
            fields = [line.split() for line in lines]
            inodes = [f[9] for f in fields if f[2].endswith(f":{port:04X}") and f[9] != "0"]
            return [pid for pid in self.front_ends() if _holds(pid, inodes)]

        eventually("the connection is accepted", lambda: len(found()) == 1)
        return found()[0]


def _holds(pid: int, inodes: list[str]) -> bool:
    with contextlib.suppress(OSError):
        links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        return any(f"socket:[{inode}]" in links for inode in inodes)
    return False


def request(max_tokens: int, **fields: Any) -> pb.GenerateRequest:
    params = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPT, sampling_params=params, **fields)


async def client_of(server: Server, index: int) -> GrpcClient:
    """Connected to that front end. Which one a connection gets is the kernel's choice."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, f"no connection reaches front end {index}"
        client = GrpcClient(server.address)
        try:
            await client.wait_until_serving()
            response = await client.stub.GenerateUnary(request(1))
        except grpc.aio.AioRpcError:  # it was that of a front end that was killed
            await client.channel.close()
            continue
        if response.request_id.startswith(f"request-{index}-"):
            return client
        await client.channel.close()


class Stream:
    """A call whose first message has come."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._messages = aiter(call)
        self.tokens: list[int] = []
        self.finish_reason = pb.FINISH_REASON_UNSPECIFIED

    @classmethod
    async def start(cls, client: GrpcClient, max_tokens: int, **fields: Any) -> Stream:
        stream = cls(client.stub.Generate(request(max_tokens, **fields)))
        stream._take(await anext(stream._messages))
        return stream

    def _take(self, message: pb.GenerateResponse) -> None:
        for output in message.outputs:
            self.tokens += output.token_ids
            self.finish_reason = output.finish_reason

    async def end(self) -> grpc.StatusCode:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in self._messages:
                self._take(message)
        return await self._call.code()


async def assert_cut(stream: Stream, expected: list[int]) -> None:
    assert await stream.end() == grpc.StatusCode.UNAVAILABLE
    assert stream.tokens[:LONG] == expected[: len(stream.tokens)]


async def assert_whole(stream: Stream, expected: list[int]) -> None:
    assert await stream.end() == grpc.StatusCode.OK
    assert stream.tokens == expected


async def assert_answers(client: GrpcClient, expected: list[int]) -> None:
    response = await client.stub.GenerateUnary(request(20))
    assert response.outputs[0].token_ids == expected[:20]


def metric(text: str, name: str) -> float:
    """The sum over its labels."""
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


def get(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


# ---- gRPC


@pytest.fixture(scope="module")
def grpc_server(model: Path) -> Iterator[Server]:
    with Server(GRPC, model, "--metrics-port", "0") as server:
        yield server


def metrics_of(server: Server) -> str:
    match = re.search(r"http://\S+/metrics", server.out)
    assert match is not None
    return get(match[0])


def test_connections_reach_both_front_ends(grpc_server: Server, expected: list[int]) -> None:
    async def main() -> None:
        a, b = await client_of(grpc_server, 0), await client_of(grpc_server, 1)
        async with a, b:
            streams = [await Stream.start(client, LONG) for client in (a, b) * 4]
            for stream in streams:
                await assert_whole(stream, expected)
            # What each of them says of the engine is the engine's.
            await a.wait_until_idle()
            await b.wait_until_idle()
            stats = [await client.stats() for client in (a, b)]
            assert stats[0].num_generated_tokens == stats[1].num_generated_tokens
            assert stats[0].num_generated_tokens >= 8 * LONG

    asyncio.run(main())


def test_metrics_are_those_of_all(grpc_server: Server, expected: list[int]) -> None:
    async def main() -> None:
        a, b = await client_of(grpc_server, 0), await client_of(grpc_server, 1)
        async with a, b:
            for client in (a, b):
                await assert_answers(client, expected)
            await a.wait_until_idle()
            stats = await a.stats()
            name = "vllm:generation_tokens_total"
            eventually(
                "both have reported",
                lambda: metric(metrics_of(grpc_server), name) == stats.num_generated_tokens,
            )
            eventually(
                "the parent has heard of all steps",
                lambda: metric(metrics_of(grpc_server), "fastpage:steps_total") == stats.num_steps,
            )
            text = metrics_of(grpc_server)
            finished = metric(text, "vllm:request_success_total")
            assert finished == metric(text, "vllm:e2e_request_latency_seconds_count")
            assert 0 < metric(text, "fastpage:step_seconds_count") <= stats.num_steps
            assert metric(text, "fastpage:engine_up") == 1
            assert metric(text, "grpc_server_handled_total") >= finished

    asyncio.run(main())


def test_abort_finds_a_request_of_the_other_front_end(grpc_server: Server) -> None:
    async def main() -> None:
        a, b = await client_of(grpc_server, 0), await client_of(grpc_server, 1)
        async with a, b:
            # While the engine stands still the request cannot end by itself.
            stream = await Stream.start(a, ENDLESS, request_id="the one")
            abort = pb.AbortRequest(request_id="the one")
            assert (await b.stub.Abort(abort)).found
            assert await stream.end() == grpc.StatusCode.OK
            assert stream.finish_reason == pb.FINISH_REASON_ABORT
            assert not (await b.stub.Abort(abort)).found
            await b.wait_until_idle()

    asyncio.run(main())


def test_a_request_id_is_that_of_one_request_in_all_front_ends(
    grpc_server: Server, expected: list[int]
) -> None:
    async def main() -> None:
        a, b = await client_of(grpc_server, 0), await client_of(grpc_server, 1)
        async with a, b:
            stream = await Stream.start(a, ENDLESS, request_id="mine")
            for client in (a, b):
                with pytest.raises(grpc.aio.AioRpcError, match="request_id='mine' is in use") as no:
                    await client.stub.GenerateUnary(request(1, request_id="mine"))
                assert no.value.code() == grpc.StatusCode.ALREADY_EXISTS
            for client in (b, a):
                abort = pb.AbortRequest(request_id="mine")
                assert (await client.stub.Abort(abort)).found
                assert await stream.end() == grpc.StatusCode.OK
                stream = await Stream.start(client, ENDLESS, request_id="mine")
            pid = grpc_server.front_ends()[0]
            os.kill(pid, signal.SIGKILL)
            await assert_cut(stream, expected)

            # Free once the engine has seen the end of the socket.
            code = grpc.StatusCode.ALREADY_EXISTS
            while code == grpc.StatusCode.ALREADY_EXISTS:
                call = b.stub.GenerateUnary(request(20, request_id="mine"))
                code = await call.code()
            assert (await call).outputs[0].token_ids == expected[:20]
            eventually("it is back", lambda: grpc_server.front_ends()[0] != pid)

    asyncio.run(main())


def test_a_front_end_that_is_killed(grpc_server: Server, expected: list[int]) -> None:
    async def main() -> None:
        server = grpc_server
        before = metric(metrics_of(server), "vllm:generation_tokens_total")
        engine, pids = server.engine(), server.front_ends()
        a, b = await client_of(server, 0), await client_of(server, 1)
        async with a, b:
            cut, whole = await Stream.start(a, ENDLESS), await Stream.start(b, LONG)
            os.kill(pids[0], signal.SIGKILL)
            await assert_cut(cut, expected)
            await assert_answers(b, expected)
            await assert_whole(whole, expected)
            await b.wait_until_idle()
            eventually("it is back", lambda: server.front_ends()[0] != pids[0])
        async with await client_of(server, 0) as again:
            await assert_answers(again, expected)
            assert (await again.stats()).num_generated_tokens > LONG  # the engine is the same
        assert server.engine() == engine
        assert server.front_ends()[1] == pids[1]
        assert metric(metrics_of(server), "vllm:generation_tokens_total") >= before

    asyncio.run(main())


def test_a_front_end_that_hangs(model: Path, expected: list[int]) -> None:
    async def main() -> None:
        # On a machine that is away for a second others may be killed, too.
        with Server(GRPC, model, "--engine-timeout", "1", "--metrics-port", "0") as server:
            pid = server.front_ends()[0]
            os.kill(pid, signal.SIGSTOP)
            killed = f"front end 0 (pid {pid}) has ended: it got nowhere for 1 s (engine_timeout)"
            eventually("it is killed", lambda: killed in server.err)
            eventually("it is back", lambda: server.front_ends()[0] != pid)
            name = "fastpage:front_end_restarts_total"
            eventually("it is counted", lambda: metric(metrics_of(server), name) >= 1)
            answer = None
            while answer is None:
                async with await client_of(server, 0) as client:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        answer = await client.stub.GenerateUnary(request(20))
            assert answer.outputs[0].token_ids == expected[:20]
            assert server.stop() == 0

    asyncio.run(main())


class ParentOfOne:
    """supervised.Owner, on a clock that stands still: the test looks when it wants to."""

    NEVER = 8e6

    def __init__(self, core: ProcessCore, said: Hello, port: int, model: Path) -> None:
        self._core, self._said = core, said
        self.num_restarts = 0
        argv = ["--model", str(model), "--api-server-count", "2", *ENDLESS_OPTIONS]
        self.front_end = SupervisedFrontEnd(self, 0, port, GRPC, argv, self.NEVER, self.NEVER)
        self.error: FastpageError | None = None
        self.may_hand = True
        self.alive = asyncio.Event()
        hear = self.front_end._on_alive
        self.front_end._on_alive = lambda: (hear(), self.alive.set())  # type: ignore[method-assign]

    async def start(self) -> None:
        self.front_end.start()
        await until(self.front_end.ready.is_set)

    async def look(self) -> None:
        """Once, and waits for the answer if it asked."""
        watchdog = self.front_end._watchdog
        asked = not watchdog.heard
        self.alive.clear()
        watchdog.look()
        if asked:
            await self.alive.wait()

    def hand_engine(self, front_end: SupervisedFrontEnd) -> None:
        if self.may_hand:
            front_end.take_engine(self._core.add_front_end(), self._said)

    def could_not_start(self, error: FastpageError) -> None:
        self.error = error

    def count_restart(self) -> None:
        self.num_restarts += 1

    def __getattr__(self, name: str) -> Any:  # what is nothing to it
        return lambda *_: None


def test_a_front_end_is_looked_at_while_it_is_ready(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        args = EngineArgs(model=str(model), num_kv_blocks=64, max_model_len=512)
        core, said = await ProcessCore.launch_for_others(args)
        with reserve_port("127.0.0.1", 0) as held:
            parent = ParentOfOne(core, said, held.getsockname()[1], model)
            front_end = parent.front_end
            await parent.start()
            for _ in range(30):
                await parent.look()
            pid = front_end.pid
            os.kill(pid, signal.SIGSTOP)
            while not front_end._why:
                front_end._watchdog.look()
            assert front_end._watchdog._timer is None
            await until(lambda: parent.num_restarts == 1)
            assert front_end.pid != pid and not is_alive(pid)
            assert front_end._watchdog._timer is not None
            await parent.look()
            await parent.look()
            front_end.drain()
            assert front_end._watchdog._timer is None
            await front_end.ended.wait()
        await core.stop()

    asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))
    assert "got nowhere for 8e+06 s (engine_timeout), and was killed" in caplog.text


@pytest.mark.parametrize("listens", [False, True])
def test_a_front_end_that_is_never_ready(
    model: Path, listens: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it listens, or once it has got the engine's socket."""

    async def hang(parent: ParentOfOne) -> str:
        """Its new process. Returns what is said of it."""
        front_end = parent.front_end
        if listens:
            await until(lambda: front_end._is_listening)
            for _ in range(30):  # it waits for the engine
                front_end._startup.look()
        os.kill(front_end.pid, signal.SIGSTOP)
        if listens:
            parent.may_hand = True
            parent.hand_engine(front_end)
        while not front_end._why:
            front_end._startup.look()
        assert front_end._startup._timer is None
        return f"front end 0 (pid {front_end.pid}) has ended: it was not ready after 8e+06 s"

    async def main() -> None:
        args = EngineArgs(model=str(model), num_kv_blocks=64, max_model_len=512)
        core, said = await ProcessCore.launch_for_others(args)
        with reserve_port("127.0.0.1", 0) as held:
            parent = ParentOfOne(core, said, held.getsockname()[1], model)
            front_end = parent.front_end
            parent.may_hand = False
            front_end.start()
            expected = await hang(parent)
            await until(lambda: parent.error is not None)
            assert str(parent.error) == f"{expected} (--startup-timeout), and was killed"

            # One that has been there is started again.
            parent.may_hand = True
            await parent.start()
            assert front_end._startup._timer is None
            parent.may_hand = False
            pid = front_end.pid
            front_end.kill()
            await until(lambda: front_end.pid != pid)
            expected = await hang(parent)
            parent.may_hand = True
            await until(lambda: parent.num_restarts == 1)
            assert expected in caplog.text
            front_end.drain()
            await front_end.ended.wait()
        await core.stop()

    asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))


def test_an_engine_that_is_killed(grpc_server: Server, expected: list[int]) -> None:
    async def main() -> None:
        server = grpc_server
        engine, pids = server.engine(), server.front_ends()
        restarts = metric(metrics_of(server), "fastpage:engine_restarts_total")
        a, b = await client_of(server, 0), await client_of(server, 1)
        async with a, b:
            streams = [await Stream.start(client, ENDLESS) for client in (a, b)]
            os.kill(engine, signal.SIGKILL)
            for stream in streams:
                await assert_cut(stream, expected)
            for client in (a, b):
                await client.wait_until_serving()
            eventually("another engine runs", lambda: "the engine is back" in server.err)
            for client in (a, b):
                await client.wait_until_serving()
                await assert_answers(client, expected)
        assert server.engine() != engine
        assert server.front_ends() == pids
        text = metrics_of(server)
        assert metric(text, "fastpage:engine_restarts_total") == restarts + 1

    asyncio.run(main())


def test_a_signal_lets_requests_of_both_finish(
    model: Path, expected: list[int], server_loop: str
) -> None:
    async def main() -> None:
        with Server(GRPC, model, "--drain-timeout", "600") as server:
            assert {event_loop_of(pid) for pid in server.front_ends()} == {server_loop}
            a, b = await client_of(server, 0), await client_of(server, 1)
            async with a, b:
                streams = [await Stream.start(client, LONG) for client in (a, b)]
                pids = server.pids()
                server.process.send_signal(signal.SIGTERM)
                for stream in streams:
                    await assert_whole(stream, expected)
                assert server.process.wait(PATIENCE) == 0
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await a.stub.GenerateUnary(request(1))
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            assert not any(map(is_alive, pids))
            assert server.err == ""

    asyncio.run(main())


def test_a_second_signal_ends_them_at_once(
    model: Path, expected: list[int], server_loop: str
) -> None:
    async def main() -> None:
        with Server(GRPC, model, "--drain-timeout", "600") as server:
            a, b = await client_of(server, 0), await client_of(server, 1)
            async with a, b:
                streams = [await Stream.start(client, ENDLESS) for client in (a, b)]
                pids = server.pids()
                server.process.send_signal(signal.SIGTERM)
                for client in (a, b):
                    await client.wait_until(NOT_SERVING)
                assert (server.stop(), server.err) == (0, "")
                for stream in streams:
                    await assert_cut(stream, expected)
            for pid in pids:
                eventually("nothing is left behind", lambda pid=pid: not is_alive(pid))

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_parent_is_that_of_all(model: Path, number: signal.Signals) -> None:
    """SIGINT for all processes, as a terminal's Ctrl-C sends it; SIGKILL for the parent alone."""
    with Server(GRPC, model, own_group=True) as server:
        pids = server.pids()
        assert len(pids) == 4
        if number == signal.SIGINT:
            os.killpg(server.process.pid, number)
            assert (server.process.wait(PATIENCE), server.err) == (0, "")
        else:
            server.process.kill()
            server.process.wait(PATIENCE)
        for pid in pids:
            eventually("nothing is left behind", lambda pid=pid: not is_alive(pid))


@pytest.mark.parametrize("whose", ["front end", "engine"])
def test_a_process_that_would_not_be_the_same_again_ends_the_server(
    tmp_path: Path, whose: str
) -> None:
    path = write_endless_model(tmp_path / "model.gguf")
    with Server(GRPC, path) as server:
        pids = server.pids()
        write_tiny_model(tmp_path / "other.gguf").replace(path)
        os.kill(server.engine() if whose == "engine" else server.front_ends()[0], signal.SIGKILL)
        assert server.process.wait(PATIENCE) == 1
        last = server.err.strip().splitlines()[-1]
        assert "fastpage-grpc: error: model.gguf of the model was replaced" in last
        for pid in pids:
            eventually("nothing is left behind", lambda pid=pid: not is_alive(pid))


def test_a_signal_while_loading(model: Path) -> None:
    with ServerProcess(GRPC, model, "--api-server-count", "2") as server:
        pids = server.pids()
        assert (server.stop(), server.err) == (0, "")
        for pid in pids:
            eventually("nothing is left behind", lambda pid=pid: not is_alive(pid))


def serve(module: str, model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, "--model", str(model), "--api-server-count", "2"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE)


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    for module, option, value in (
        (GRPC, "--address", f"unix:{tmp_path}/socket"),
        (HTTP, "--uds", f"{tmp_path}/socket"),
        (GRPC, "--api-server-count", "0"),
    ):
        done = serve(module, model, option, value)
        assert done.returncode == 2
        assert option in done.stderr and "--api-server-count" in done.stderr
        assert done.stderr.count("\n") == 1
    done = serve(GRPC, model, "--startup-timeout", "0.5")
    assert done.returncode == 2
    assert "--startup-timeout 0.5 is neither 0, for none, nor at least 1" in done.stderr
    done = serve(GRPC, tmp_path / "nothing.gguf", "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nothing.gguf" in done.stderr


def test_another_server_does_not_share_the_port(grpc_server: Server, model: Path) -> None:
    port = grpc_server.address.rpartition(":")[2]
    for module in (GRPC, HTTP):
        done = serve(module, model, "--port", port)
        assert done.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}: address already in use" in done.stderr


def test_a_port_that_is_reserved_is_nobody_elses() -> None:
    with reserve_port("127.0.0.1", 0) as held:
        address = held.getsockname()
        with pytest.raises(OSError):
            socket.create_server(address)
        with pytest.raises(FastpageError, match="already in use"):
            reserve_port(*address)
        with (
            socket.create_server(address, reuse_port=True) as one,
            socket.create_server(address, reuse_port=True) as other,
        ):
            assert one.getsockname() == other.getsockname() == address
        with pytest.raises(OSError):
            socket.create_server(address)


# ---- HTTP


class Connection:
    """An HTTP connection that stays."""

    def __init__(self, server: Server) -> None:
        host, _, port = server.address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self.front_end = server.owner(self._socket)

    def post(self, path: str, body: Any) -> Any:
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        with self._socket.makefile("rb") as answer:
            length = 0
            while (line := answer.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            return json.loads(answer.read(length))

    def close(self) -> None:
        self._socket.close()


def connection_to(server: Server, pid: int) -> Connection:
    found: list[Connection] = []

    def connects() -> bool:
        found.append(Connection(server))
        return found[-1].front_end == pid

    eventually("a connection reaches it", connects)
    for other in found[:-1]:
        other.close()
    return found[-1]


def test_http(model: Path, expected: list[int], server_loop: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    with Server(HTTP, model) as server:
        url = f"http://{server.address}"
        first, second = server.front_ends()
        for pid in (first, second):
            connection = connection_to(server, pid)
            answer = connection.post("/v1/completions", body)
            assert answer["choices"][0]["token_ids"] == expected[:20]
            connection.close()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream)

        # Whichever front end is asked for them, metrics are those of both.
        name = "vllm:request_success_total"
        eventually("both have reported", lambda: metric(get(f"{url}/metrics"), name) == 3)

        os.kill(first, signal.SIGKILL)
        eventually("it is back", lambda: server.front_ends()[0] != first)
        connection = connection_to(server, server.front_ends()[0])
        answer = connection.post("/v1/completions", body)
        assert answer["choices"][0]["token_ids"] == expected[:20]
        connection.close()
        eventually("nothing is forgotten", lambda: metric(get(f"{url}/metrics"), name) == 4)

        os.kill(server.engine(), signal.SIGKILL)
        eventually("another engine runs", lambda: "the engine is back" in server.err)
        for pid in server.front_ends():
            connection = connection_to(server, pid)

            def answers(connection: Connection = connection) -> bool:
                answer = connection.post("/v1/completions", body)
                return "choices" in answer and answer["choices"][0]["token_ids"] == expected[:20]

            eventually("it answers again", answers)
            connection.close()
        assert server.stop() == 0


# ---- KV events


def test_kv_events_of_a_front_end_that_comes_later(model: Path) -> None:
    pytest.importorskip("smg_grpc_proto")
    from smg_grpc_proto.generated import common_pb2 as common
    from smg_grpc_proto.generated import vllm_engine_pb2_grpc as worker_grpc

    async def snapshot(client: GrpcClient) -> set[int]:
        """Hashes of the blocks that are cached."""
        stub = worker_grpc.VllmEngineStub(client.channel)
        call = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(), timeout=PATIENCE)
        found: set[int] = set()
        async for batch in call:
            for event in batch.events:
                found.update(block.block_hash for block in event.stored.blocks)
            if batch.snapshot.index + 1 == batch.snapshot.count:
                break
        call.cancel()
        return found

    async def main() -> None:
        with Server(GRPC, model) as server:
            async with await client_of(server, 1) as b:
                await b.stub.GenerateUnary(request(100))
                cached = await snapshot(b)
                assert len(cached) >= 6
                pid = server.front_ends()[0]
                os.kill(pid, signal.SIGKILL)
                eventually("it is back", lambda: server.front_ends()[0] != pid)
                async with await client_of(server, 0) as a:
                    assert await snapshot(a) >= cached

    asyncio.run(main())
