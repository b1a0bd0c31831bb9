"""The endpoints, as ASGI applications: one class for those that generate, one for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastpage.engine.async_engine import AsyncEngine
from fastpage.serving.openai.errors import ApiError, to_api_error
from fastpage.serving.openai.exchange import (
    ClientGone,
    Exchange,
    Receive,
    Scope,
    Send,
    encode_json,
)
from fastpage.serving.openai.model import Model
from fastpage.serving.openai.reply import Call, Dialect
from fastpage.serving.openai.state import ServerState
from fastpage.serving.openai.streams import Streams

_logger = logging.getLogger("fastpage.serving.openai")


class GenerationEndpoint:
    def __init__(self, state: ServerState, dialect: Dialect) -> None:
        self._state = state
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._state.limits)
        streams = Streams()
        try:
            engine = self._state.ready_engine()
            body = await exchange.read_json_body()
            with exchange.watching(on_gone=streams.abort):
                call = await self._state.aside(
                    body,
                    self._dialect.understand,
                    self._state.model(),
                    exchange.header(b"x-request-id"),
                )
                if exchange.gone:
                    raise ClientGone
                await streams.submit(engine, call)
                answer = self._stream if call.stream else self._answer
                await answer(exchange, call, streams)
        except ClientGone:
            pass
        except Exception as error:
            await self._fail(exchange, error)
        finally:
            streams.abort()

    async def _answer(self, exchange: Exchange, call: Call, streams: Streams) -> None:
        outputs = await streams.outputs()
        if not exchange.gone:
            answer = self._dialect.reply(call).whole(outputs)
            await exchange.send_json(200, answer, _id_header(exchange, call))

    async def _stream(self, exchange: Exchange, call: Call, streams: Streams) -> None:
        reply = self._dialect.reply(call)
        frame = self._dialect.frame
        await exchange.start_stream(self._dialect.media_type, _id_header(exchange, call))
        async with aclosing(streams.news()) as all_news:
            async for news in all_news:
                parts = [frame(encode_json(chunk)) for chunk in reply.chunks(news)]
                if parts:
                    await exchange.write(b"".join(parts))
        parts = [frame(encode_json(chunk)) for chunk in reply.last_chunks()]
        await exchange.write(b"".join(parts) + self._dialect.end)
        await exchange.end_stream()

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        dialect = self._dialect
        told = to_api_error(error, dialect.fields, dialect.renamed, dialect.prompt_field)
        await fail(exchange, error, told, dialect)


async def fail(
    exchange: Exchange, error: Exception, told: ApiError, dialect: Dialect | None = None
) -> None:
    """`told` is what the client hears; in the middle of a stream, as its last event."""
    if told.status == 500:
        _logger.error("a request failed: %s", told, exc_info=error)
    if not exchange.started:
        await exchange.send_error(told)
    elif dialect is not None:
        await exchange.write(dialect.frame(encode_json(told.body())) + dialect.end)
        await exchange.end_stream()


def _id_header(exchange: Exchange, call: Call) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", (exchange.header(b"x-request-id") or call.id).encode())]


# Body (empty for GET), engine, model -> what is sent.
Handler = Callable[[bytes, AsyncEngine, Model], Any]


class JsonEndpoint:
    """One that answers at once, with a value."""

    def __init__(
        self, state: ServerState, handler: Handler, reads_body: bool, fields: Any = ()
    ) -> None:
        self._state = state
        self._handler = handler
        self._reads_body = reads_body
        self._fields = fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._state.limits)
        try:
            engine = self._state.ready_engine()
            body = await exchange.read_json_body() if self._reads_body else b""
            value = await self._state.aside(body, self._handler, engine, self._state.model())
            await exchange.send_json(200, value)
        except ClientGone:
            pass
        except Exception as error:
            await fail(exchange, error, to_api_error(error, self._fields))
