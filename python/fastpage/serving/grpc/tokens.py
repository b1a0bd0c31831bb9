"""Calls without a token end with UNAUTHENTICATED."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from fastpage.serving.security import BearerTokens

# Whoever restarts servers asks without credentials.
_OPEN = f"/{health.SERVICE_NAME}/"


class RequireToken(grpc.aio.ServerInterceptor):
    def __init__(self, tokens: BearerTokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if details.method.startswith(_OPEN):
            return await continuation(details)
        for name, value in details.invocation_metadata:
            if name == "authorization" and self._tokens.accept(value):
                return await continuation(details)
        return _REFUSAL


async def _refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "authorization: this server wants metadata 'authorization: Bearer TOKEN'",
    )


# Of this kind, it reads no message before it answers.
_REFUSAL = grpc.stream_stream_rpc_method_handler(_refuse)
