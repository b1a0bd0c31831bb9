"""fastpage-openai in this process, with a fake model, and clients of it: the openai package, curl,
and bare sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import openai
from fakes import Gate, load_alphabet
from waiting import PATIENCE, is_idle, until

from fastpage import AsyncEngine
from fastpage.engine.loading import LoadedModel
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.server import HttpOptions, HttpServer

TEXT = {"prompt": "abc"}
SAY = {"messages": [{"role": "user", "content": "abc"}]}
LONG = {"max_tokens": 100, "temperature": 0}

# No test depends on the limits of time unless it says so.
_PATIENT = Limits(request_timeout_seconds=PATIENCE, slow_client_timeout_seconds=PATIENCE)


class Client:
    """`openai` is the real client; request() is curl; connect() a socket."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url = url
        self.engine = engine
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        )

    async def complete(self, prompt: Any, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 5, **options}
        return await self.openai.completions.create(model="alphabet", prompt=prompt, **options)

    async def chat(self, text: str, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 5, **options}
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return await self.openai.chat.completions.create(
            model="alphabet", messages=messages, **options
        )

    async def request(self, path: str, body: Any = None, *options: str) -> tuple[int, Any, str]:
        """Status, JSON (or text), and the headers."""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            options += ("-H", "Content-Type: application/json", "--data-binary", "@-")
        else:
            data = b""
        process = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "-D", "/dev/stderr", "-w", "\n%{http_code}"),
            *("--expect100-timeout", str(PATIENCE), *options),
            self.url + path,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, headers = await process.communicate(data)
        text, _, status = out.decode().rpartition("\n")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        return int(status), value, headers.decode().lower()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.url.rpartition("/")[2].rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def post(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends it and does not wait for the answer."""
        reader, writer = await self.connect()
        writer.write(request_bytes(path, body))
        return reader, writer

    @property
    def scheduler(self) -> Any:
        return self.engine.stats().scheduler

    async def wait_until_idle(self) -> None:
        await until(lambda: is_idle(self.scheduler))


def request_bytes(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
    )


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel, options: HttpOptions | None = None) -> AsyncIterator[Client]:
    options = options or HttpOptions()
    if options.limits == Limits():
        options = dataclasses.replace(options, limits=_PATIENT)
    server = HttpServer(options)
    url = await server.start()
    engine = AsyncEngine(loaded)
    await server.set_engine(engine)
    client = Client(url, engine)
    try:
        yield client
    finally:
        await client.openai.close()
        await engine.shutdown()
        await server.stop(5)


def run(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before_step: Callable[[], None] | None = None,
    http: HttpOptions | None = None,
    **options: Any,
) -> None:
    """Runs `test(client)` against the alphabet; afterwards every block must be free."""

    async def main() -> None:
        async with serve(load_alphabet(before_step, **options), http) as client:
            with Gate.opened_at_the_end(before_step):
                await asyncio.wait_for(test(client), PATIENCE)
                await client.wait_until_idle()

    asyncio.run(main())


async def collect(stream: Any) -> tuple[dict[int, str], list[Any]]:
    """The texts by index, and the chunks."""
    texts: dict[int, str] = {}
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts, chunks


def texts_of(answer: Any) -> list[str]:
    return [c.text if hasattr(c, "text") else c.message.content for c in answer.choices]
