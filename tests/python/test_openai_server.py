"""fastpage-openai's other endpoints, its security, its life, and errors of the engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from pathlib import Path

import openai
import pytest
import trustme
from fakes import EOS_ID, Gate, load_alphabet
from openai_harness import SAY, TEXT, Client, collect, run, serve, texts_of
from waiting import PATIENCE

from fastpage import AsyncEngine
from fastpage.errors import FastpageError
from fastpage.serving.openai.server import HttpOptions, HttpServer
from fastpage.serving.security import BearerTokens, TlsFiles

# ---------------------------------------------------------------- errors of the engine


def test_a_step_that_fails_costs_its_requests_alone() -> None:
    failing = [False]
    gate = Gate()

    def before_step() -> None:
        gate()
        if failing[0]:
            failing[0] = False
            raise RuntimeError("the model is on fire")

    async def test(client: Client) -> None:
        failing[0] = True
        gate.open()
        with pytest.raises(openai.InternalServerError, match="on fire") as error:
            await client.complete("a", max_tokens=50)
        assert (error.value.status_code, error.value.code) == (500, "internal_error")

        stream = await client.complete("a", max_tokens=100, stream=True)
        gate.open()
        await anext(stream)
        failing[0] = True
        gate.open()
        with pytest.raises(openai.APIError, match="on fire") as in_stream:
            await collect(stream)
        assert in_stream.value.code == "internal_error"
        gate.open(5)
        assert texts_of(await client.complete("abc")) == ["defgh"]

    run(test, before_step=before_step)


def test_not_ready_before_the_model_is_loaded_nor_when_stopping() -> None:
    gate = Gate()

    async def main() -> None:
        server = HttpServer()
        client = Client(await server.start(), None)  # type: ignore[arg-type]
        assert (await client.request("/health"))[0] == 503
        assert (await client.request("/version"))[0] == 200
        for path, body in (("/v1/models", None), ("/v1/completions", TEXT), ("/tokenize", TEXT)):
            status, answer, headers = await client.request(path, body)
            assert (status, answer["error"]["code"]) == (503, "loading")
            assert "retry-after: 2" in headers

        engine = AsyncEngine(load_alphabet(gate))
        await server.set_engine(engine)
        assert (await client.request("/health"))[0] == 200
        stream = await client.complete("a", max_tokens=100, stream=True)
        gate.open()
        await anext(stream)
        await server.drain()
        assert (await client.request("/health"))[0] == 503
        status, answer, _ = await client.request("/v1/completions", TEXT)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        gate.open()
        await anext(stream)
        ending = asyncio.create_task(engine.shutdown())
        with pytest.raises(openai.APIError) as error:
            await collect(stream)
        assert error.value.code == "shutting_down"
        gate.open()  # the step in progress may end
        await ending
        await server.stop(5)
        with pytest.raises(OSError):
            await client.connect()
        await client.openai.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


# ---------------------------------------------------------------- the other endpoints


def test_generate() -> None:
    async def test(client: Client) -> None:
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 3, "n": 2}
        status, answer, _ = await client.request("/generate", body)
        assert status == 200
        assert answer == {"text": ["abcdef"] * 2, "finish_reason": ["length"] * 2}
        _, answer, _ = await client.request("/generate", {**body, "prompt": [0, 1, 2]})
        assert answer["text"] == ["abcdef"] * 2
        _, lines, headers = await client.request("/generate", {**body, "stream": True})
        assert "application/x-ndjson" in headers
        last = lines if isinstance(lines, dict) else json.loads(lines.splitlines()[-1])
        assert last == {"text": ["abcdef"] * 2, "finish_reason": ["length"] * 2}
        _, answer, _ = await client.request("/generate", {"prompt": "a"})
        assert len(answer["text"][0]) == 1 + 16

    run(test)


def test_tokenize_models_load_and_version() -> None:
    async def test(client: Client) -> None:
        _, answer, _ = await client.request(
            "/tokenize", {"prompt": "ab", "return_token_strs": True}
        )
        expected = {"count": 2, "max_model_len": 128, "tokens": [0, 1], "token_strs": ["a", "b"]}
        assert answer == expected
        _, answer, _ = await client.request("/tokenize", SAY)
        assert answer["tokens"] == [0, 1, 2]
        _, answer, _ = await client.request("/detokenize", {"tokens": [0, 1, EOS_ID]})
        assert answer == {"prompt": "ab<end>"}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {**TEXT, **SAY}, "prompt"),
            ("/tokenize", {"prompt": 3}, "prompt"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [99]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": [2**70]}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
        ):
            status, answer, _ = await client.request(path, body)
            assert (status, answer["error"]["param"]) == (400, param), answer

        models = [model async for model in await client.openai.models.list()]
        assert [model.id for model in models] == ["alphabet"]
        assert models[0].max_model_len == 128
        assert (await client.openai.models.retrieve("alphabet")).id == "alphabet"
        with pytest.raises(openai.NotFoundError):
            await client.openai.models.retrieve("owner/other")
        _, answer, _ = await client.request("/load")
        assert answer["server_load"] == 0
        _, answer, _ = await client.request("/version")
        assert set(answer) == {"version"}

    run(test)


def test_metrics() -> None:
    async def test(client: Client) -> None:
        await client.complete("abc", n=2)
        status, text, headers = await client.request("/metrics")
        assert status == 200 and "content-type: text/plain" in headers
        assert 'vllm:generation_tokens_total{engine="0",model_name="alphabet"} 10.0' in text
        assert "vllm:time_to_first_token_seconds_bucket" in text

    run(test)


def test_tokens() -> None:
    async def test(client: Client) -> None:
        assert (await client.request("/health"))[0] == 200
        for path in ("/v1/models", "/load", "/version", "/nothing"):
            for options in ((), ("-H", "Authorization: Bearer wrong"), ("-H", "Authorization: k1")):
                status, answer, headers = await client.request(path, None, *options)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert "www-authenticate: bearer" in headers
        with pytest.raises(openai.AuthenticationError):
            await client.complete("a")
        for key in ("k1", "k2"):
            authorized = client.openai.with_options(api_key=key)
            answer = await authorized.completions.create(
                model="alphabet", prompt="abc", max_tokens=1
            )
            assert texts_of(answer) == ["d"]

    run(test, http=HttpOptions(tokens=BearerTokens(["k1", "k2"])))


def test_cross_origin() -> None:
    async def test(client: Client) -> None:
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            _, _, headers = await client.request("/v1/models", None, "-H", f"Origin: {origin}")
            assert (f"access-control-allow-origin: {origin}" in headers) == allowed

    run(test, http=HttpOptions(cors_origins=["https://a.example"]))


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"

    async def main() -> None:
        for _ in range(2):
            async with serve(load_alphabet(), HttpOptions(uds=str(path))) as client:
                client.url = "http://localhost"
                status, answer, _ = await client.request(
                    "/v1/models", None, "--unix-socket", str(path)
                )
                assert (status, answer["data"][0]["id"]) == (200, "alphabet")
                with pytest.raises(FastpageError, match="address already in use"):
                    await HttpServer(HttpOptions(uds=str(path))).start()
            assert not path.exists()

        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
        async with serve(load_alphabet(), HttpOptions(uds=str(path))):
            pass
        path.write_text("somebody's")
        with pytest.raises(FastpageError, match="address already in use"):
            await HttpServer(HttpOptions(uds=str(path))).start()
        assert path.read_text() == "somebody's"

    asyncio.run(main())


def test_tls_and_its_renewal(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    files = TlsFiles(*(tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")))
    client_files = {
        name: tmp_path / f"client-{name}.pem" for name in ("authority", "stranger", "cert")
    }

    times = itertools.count(1)

    def write(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        # Two writes in one tick of the file system's clock would look like one.
        os.utime(path, (now := next(times), now))

    def renew(ca: trustme.CA) -> None:
        issued = ca.issue_cert("localhost", "127.0.0.1")
        write(files.cert, issued.cert_chain_pems[0].bytes())
        write(files.key, issued.private_key_pem.bytes())

    renew(authority)
    authority.cert_pem.write_to_path(str(files.client_ca))
    authority.cert_pem.write_to_path(str(client_files["authority"]))
    stranger.cert_pem.write_to_path(str(client_files["stranger"]))
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(
        str(client_files["cert"])
    )
    certificate = ("--cert", str(client_files["cert"]))

    async def test(client: Client) -> None:
        async def status(ca: str, *options: str) -> int:
            ca_file = str(client_files[ca])
            return (await client.request("/v1/models", None, "--cacert", ca_file, *options))[0]

        assert client.url.startswith("https://")
        assert await status("authority", *certificate) == 200
        assert await status("authority") == 0  # without a certificate
        assert await status("stranger", *certificate) == 0
        write(files.cert, b"half a file")
        assert await status("authority", *certificate) == 200
        renew(stranger)
        assert await status("stranger", *certificate) == 200
        assert await status("stranger") == 0

    run(test, http=HttpOptions(tls=files))
