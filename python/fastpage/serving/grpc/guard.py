"""What clients do to a call, for which grpc.aio by itself writes a traceback to the server's log:
bytes that are no message of the method's type, which end the call with INVALID_ARGUMENT instead of
UNKNOWN; and going away while a message or a status is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

# grpc's types of these do not show what they hold.
Handler = Any
Details = Any


class _Undecodable:
    """Instead of a request."""

    def __init__(self, why: str) -> None:
        self.why = " ".join(why.split())


class CallGuard(grpc.aio.ServerInterceptor):
    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], details: Details
    ) -> Handler:
        found = self._handlers.get(details.method)
        if found is None:
            handler = await continuation(details)
            if handler is None or handler.request_streaming:
                return handler
            found = self._handlers[details.method] = _guard(handler)
        return found


def _guard(handler: Handler) -> Handler:
    make = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    decode = handler.request_deserializer
    return make(
        _guarded(handler.unary_stream or handler.unary_unary),
        None if decode is None else _decoder(decode),
        handler.response_serializer,
    )


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return decoded


@contextlib.contextmanager
def _client_may_go() -> Iterator[None]:
    """What is written to a call that is over raises before grpc.aio cancels the handler."""
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _guarded(behavior: Callable[[Any, grpc.aio.ServicerContext], Any]) -> Any:
    async def refuse(request: _Undecodable, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request: {request.why}")

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with _client_may_go():
            if isinstance(request, _Undecodable):
                await refuse(request, context)
            async for response in behavior(request, context):
                yield response

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with _client_may_go():
            if isinstance(request, _Undecodable):
                await refuse(request, context)
            return await behavior(request, context)

    return stream if inspect.isasyncgenfunction(behavior) else call
