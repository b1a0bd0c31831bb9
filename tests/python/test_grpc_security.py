"""TLS, client certificates, bearer tokens, Unix sockets, channelz, and fastpage-chat."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fakes import load_alphabet
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_harness import SERVING, text_request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from waiting import PATIENCE

from fastpage import AsyncEngine
from fastpage.errors import FastpageError
from fastpage.serving import security
from fastpage.serving.grpc.listening import Address
from fastpage.serving.grpc.server import GrpcServer, GrpcServerConfig
from fastpage.serving.grpc.service import FastpageService
from fastpage.serving.security import BearerTokens, TlsFiles
from fastpage.v1 import fastpage_pb2_grpc as pb_grpc

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


@contextlib.asynccontextmanager
async def serve(**config: Any) -> AsyncIterator[str]:
    server = GrpcServer([FastpageService()], GrpcServerConfig(**config))
    address = await server.start()
    engine = AsyncEngine(load_alphabet())
    await server.set_engine(engine)
    try:
        yield address
    finally:
        await server.drain()
        await engine.shutdown()
        await server.stop(0)


async def ask(channel: grpc.aio.Channel, **options: Any) -> str:
    """What comes after "a", or the status instead."""
    try:
        stub = pb_grpc.FastpageStub(channel)
        answer = await stub.GenerateUnary(text_request("a"), timeout=PATIENCE, **options)
        return answer.outputs[0].text
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        await channel.close()


def plain(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, OWN_CONNECTION)


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    security.add_options(parser)
    return parser.parse_args(options)


# ---------------------------------------------------------------- TLS


class Authority:
    """A certificate authority, and what it vouches for as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._ca = trustme.CA()
        self._folder = folder
        self.pem = self._ca.cert_pem.bytes()
        self.file = folder / "ca.pem"
        self.file.write_bytes(self.pem)

    def issue(self, name: str) -> tuple[Path, Path]:
        leaf = self._ca.issue_cert("localhost", "127.0.0.1", common_name=name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return cert, key

    def trusting_channel(
        self, address: str, client: tuple[Path, Path] | None = None
    ) -> grpc.aio.Channel:
        cert, key = (path.read_bytes() for path in client) if client else (None, None)
        credentials = grpc.ssl_channel_credentials(self.pem, key, cert)
        return grpc.aio.secure_channel(address, credentials, OWN_CONNECTION)


def test_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
        cert, key = ours.issue("server")
        async with serve(tls=TlsFiles(cert, key)) as address:
            assert await ask(ours.trusting_channel(address)) == "bcdef"
            assert await ask(other.trusting_channel(address)) == "UNAVAILABLE"
            assert await ask(plain(address)) == "UNAVAILABLE"

            # Half of a renewal changes nothing, the whole of it counts for new connections, and
            # both are said.
            old = ours.trusting_channel(address)
            assert (await pb_grpc.FastpageStub(old).GenerateUnary(text_request("a"))).outputs
            later = time.time_ns() + 10**9
            new_cert, new_key = other.issue("server")
            for file in new_cert, new_key:
                os.utime(file, ns=(later, later))
            new_cert.replace(cert)
            assert caplog.messages == []
            assert await ask(ours.trusting_channel(address)) == "bcdef"
            assert set(caplog.messages) == {
                f"the new TLS files are not used: --tls-cert {cert} and --tls-key {key} are no "
                "certificate and its key in PEM (the key without a password)"
            }
            caplog.clear()
            new_key.replace(key)
            assert await ask(other.trusting_channel(address)) == "bcdef"
            assert await ask(ours.trusting_channel(address)) == "UNAVAILABLE"
            assert await ask(old) == "bcdef"
            assert caplog.messages == ["TLS certificates read again"]

            caplog.clear()
            cert.unlink()
            assert await ask(other.trusting_channel(address)) == "bcdef"
            assert caplog.messages and "not used" in caplog.messages[0]

    with caplog.at_level(logging.INFO, logger="fastpage.serving.grpc"):
        asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_files_that_are_replaced_while_they_are_first_read(tmp_path: Path) -> None:
    class Replaced(TlsFiles):
        def _context(self) -> ssl.SSLContext:
            context = super()._context()
            contexts.append(context)
            if len(contexts) == 1:
                authority.issue("server")
                later = time.time_ns() + 10**9
                os.utime(self.cert, ns=(later, later))
            return context

    class Connection:
        context: ssl.SSLContext

    contexts: list[ssl.SSLContext] = []
    authority = Authority(tmp_path)
    first = Replaced(*authority.issue("server")).server_context()
    connection = Connection()
    assert first.sni_callback is not None
    first.sni_callback(connection, None, first)  # type: ignore[arg-type]
    assert contexts[1:] == [connection.context]


def test_client_certificates(tmp_path: Path) -> None:
    async def main() -> None:
        ours, clients = Authority(tmp_path / "ours"), Authority(tmp_path / "clients")
        tls = TlsFiles(*ours.issue("server"), client_ca=clients.file)
        async with serve(tls=tls) as address:
            known, unknown = clients.issue("client"), ours.issue("client")
            assert await ask(ours.trusting_channel(address, known)) == "bcdef"
            assert await ask(ours.trusting_channel(address, unknown)) == "UNAVAILABLE"
            assert await ask(ours.trusting_channel(address)) == "UNAVAILABLE"

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_options_of_tls(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    cert, key = ours.issue("server")
    other_key = ours.issue("other")[1]
    empty = tmp_path / "empty"
    empty.touch()
    assert TlsFiles.from_options(parse()) is None
    good = ("--tls-cert", str(cert), "--tls-key", str(key))
    assert TlsFiles.from_options(parse(*good)) == TlsFiles(cert, key)
    for options, message in (
        (("--tls-cert", str(cert)), "--tls-key is missing"),
        (("--tls-key", str(key)), "--tls-cert is missing"),
        (("--tls-client-ca", str(cert)), "--tls-cert is missing"),
        ((*good, "--tls-client-ca", str(empty)), "--tls-client-ca .* has no certificates"),
        ((*good, "--tls-client-ca", "/no"), "--tls-client-ca /no cannot be read: no such file"),
        (("--tls-cert", "/no", "--tls-key", str(key)), "--tls-cert /no cannot be read"),
        (("--tls-cert", str(cert), "--tls-key", str(other_key)), "no certificate and its key"),
        (("--tls-cert", str(empty), "--tls-key", str(key)), "no certificate and its key"),
    ):
        with pytest.raises(ValueError, match=message):
            TlsFiles.from_options(parse(*options))


# ---------------------------------------------------------------- tokens


def test_bearer_tokens() -> None:
    async def main() -> None:
        async with serve(tokens=BearerTokens(["one", "two"])) as address:
            for header, answer in (
                ((), "UNAUTHENTICATED"),
                (("Bearer one",), "bcdef"),
                (("bearer two",), "bcdef"),
                (("Bearer three",), "UNAUTHENTICATED"),
                (("Bearer on",), "UNAUTHENTICATED"),
                (("Bearer",), "UNAUTHENTICATED"),
                (("one",), "UNAUTHENTICATED"),
                (("Basic one",), "UNAUTHENTICATED"),
            ):
                metadata = [("authorization", value) for value in header]
                assert await ask(plain(address), metadata=metadata) == answer, header

            async with plain(address) as channel:
                health = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest()
                )
                assert health.status == SERVING
                # Whatever else there is, and whatever there is not.
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                for call in (
                    stub.ServerReflectionInfo(iter([request])).read(),
                    channel.unary_unary("/fastpage.v1.Fastpage/Nothing")(b""),
                    channel.unary_stream("/fastpage.v1.Fastpage/Generate")(b"\xff").read(),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await call
                    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_token_files(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    options = parse("--auth-token-file", str(file))
    assert BearerTokens.from_options(parse()) is None
    with pytest.raises(ValueError, match=r"--auth-token-file .* cannot be read: no such file"):
        BearerTokens.from_options(options)
    for content in (b"", b" \n\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"--auth-token-file .* has no token"):
            BearerTokens.from_options(options)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--auth-token-file .* is not a text file"):
        BearerTokens.from_options(options)
    file.write_text("  first \nsecond\n\n")
    tokens = BearerTokens.from_options(options)
    assert tokens is not None
    accepted = [tokens.accept(f"Bearer {t}") for t in ("first", "second", "", "first second")]
    assert accepted == [True, True, False, False]
    assert not tokens.accept(None)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("scheme", ["unix", "unix-abstract"])
def test_unix_sockets(scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    name = str(path) if scheme == "unix" else f"fastpage-test-{os.getpid()}"

    async def main() -> None:
        for _ in range(2):
            async with serve(address=Address(unix=f"{scheme}:{name}")) as address:
                assert address == f"{scheme}:{name}"
                assert await ask(plain(address)) == "bcdef"
                with pytest.raises(FastpageError, match=r"another server does|already in use"):
                    async with serve(address=Address(unix=f"{scheme}:{name}")):
                        pass
                assert await ask(plain(address)) == "bcdef"
            # What a server leaves behind that was killed does not keep the next one away.
            if scheme == "unix":
                assert not path.exists()
                with socket.socket(socket.AF_UNIX) as left_behind:
                    left_behind.bind(name)

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_a_server_that_takes_no_connection_for_now_is_one_too(tmp_path: Path) -> None:
    name = str(tmp_path / "socket")

    async def main() -> None:
        with (
            socket.socket(socket.AF_UNIX) as stopped,
            socket.socket(socket.AF_UNIX) as first,
            socket.socket(socket.AF_UNIX) as second,
        ):
            stopped.bind(name)
            stopped.listen(0)
            first.connect(name)
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.connect(name)
            with pytest.raises(FastpageError, match="another server does"):
                async with serve(address=Address(unix=f"unix:{name}")):
                    pass

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_addresses_that_cannot_be_had(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")

    async def main() -> None:
        async with serve() as address:
            port = int(address.rpartition(":")[2])
            assert port > 0
            for wanted, why in (
                (Address(port=port), f"127.0.0.1:{port}: address already in use"),
                (Address(host="203.0.113.1"), "203.0.113.1:0: cannot assign"),
                (Address(host="no.such.host.invalid"), "no.such.host.invalid"),
                (Address(unix=f"unix:{file}"), "not a socket"),
                (Address(unix=f"unix:{tmp_path}/no/socket"), "no such file"),
                (Address(unix=f"unix:{tmp_path}/{'x' * 200}"), "too long"),
            ):
                with pytest.raises(FastpageError, match=f"cannot listen on .*{why}"):
                    async with serve(address=wanted):
                        pass

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))
    assert file.read_text() == "precious"
    for unix in ("tcp:1", "unix:", "/run/socket"):
        with pytest.raises(ValueError, match="--address"):
            Address(unix=unix)
    assert str(Address("::1", 5)) == "[::1]:5"


def test_channelz() -> None:
    async def main() -> None:
        async with serve(channelz=True) as address, plain(address) as channel:
            stub = channelz_pb2_grpc.ChannelzStub(channel)
            servers = await stub.GetServers(channelz_pb2.GetServersRequest())
            assert any(server.data.calls_started for server in servers.server)
        async with serve() as address, plain(address) as channel:
            stub = channelz_pb2_grpc.ChannelzStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.GetServers(channelz_pb2.GetServersRequest())
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


# ---------------------------------------------------------------- fastpage-chat


def test_the_chat_client_knows_them(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    token = tmp_path / "token"
    token.write_text("secret\n")

    async def chat(address: str, *options: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "fastpage.serving.chat", "--address", address, *options]
        done = await asyncio.to_thread(
            subprocess.run,
            [*command, "--temperature", "0", "--max-tokens", "3", "ab"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return done.stdout, done.stderr

    async def main() -> None:
        tls = TlsFiles(*ours.issue("server"))
        async with serve(tls=tls, tokens=BearerTokens(["secret"])) as address:
            trust = ("--tls-ca", str(ours.file))
            assert await chat(address, *trust, "--auth-token-file", str(token)) == ("cde\n", "")
            _, error = await chat(address, *trust)
            assert "UNAUTHENTICATED" in error and error.count("\n") == 1
            _, error = await chat(address, "--tls-ca", "/no")
            assert "--tls-ca /no cannot be read" in error and error.count("\n") == 1
        async with serve(address=Address(unix=f"unix:{tmp_path}/socket")) as address:
            assert await chat(address) == ("cde\n", "")

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))
