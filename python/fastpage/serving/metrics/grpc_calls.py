"""Counts the calls of a gRPC server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from fastpage.serving.metrics.calls import CallCounts

# grpcio's word, and go-grpc-prometheus's.
_KINDS = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def grpc_calls() -> CallCounts:
    labels = ("grpc_type", "grpc_service", "grpc_method", "grpc_code")
    return CallCounts("grpc_server_handled", "Calls that ended, by status.", labels)


class CountCalls(grpc.aio.ServerInterceptor):
    """Behind the one that asks for a token: who has none could make up names without end."""

    def __init__(self, counts: CallCounts) -> None:
        self._counts = counts
        # A method's handler is always the same one; kept here, its id is nobody else's.
        self._handlers: dict[tuple[str, int], tuple[Any, Any]] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None:  # of any name that a client may think of
            self._counts.add("unknown", "unknown", "unknown", "UNIMPLEMENTED")
            return None
        key = (details.method, id(handler))
        if key not in self._handlers:
            self._handlers[key] = handler, self._counted(handler, details.method)
        return self._handlers[key][1]

    def _counted(self, handler: Any, method: str) -> Any:
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        service, _, name = method.strip("/").rpartition("/")

        def ended(context: grpc.aio.ServicerContext, error: BaseException | None) -> None:
            self._counts.add(_KINDS[kind], service, name, _code(context, error))

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            _watched(getattr(handler, kind), ended),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _watched(
    behavior: Callable[[Any, Any], Any],
    ended: Callable[[grpc.aio.ServicerContext, BaseException | None], None],
) -> Callable[[Any, Any], Any]:
    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            async for response in behavior(request, context):
                yield response
        except BaseException as error:
            ended(context, error)
            raise
        ended(context, None)

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            response = await behavior(request, context)
        except BaseException as error:
            ended(context, error)
            raise
        ended(context, None)
        return response

    return stream if inspect.isasyncgenfunction(behavior) else call


def _code(context: grpc.aio.ServicerContext, error: BaseException | None) -> str:
    """What the client is told, or would be."""
    if isinstance(error, asyncio.CancelledError):
        left = context.time_remaining()
        return "CANCELLED" if left is None or left > 0 else "DEADLINE_EXCEEDED"
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code or 0
    if number == 0 and error is not None:
        return "UNKNOWN"
    return _CODES[number]
