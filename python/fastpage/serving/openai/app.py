"""The ASGI application: which path is what, and who may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from fastpage.serving.metrics.calls import CountRequests
from fastpage.serving.openai import info
from fastpage.serving.openai.chat import Chat
from fastpage.serving.openai.completions import Completions
from fastpage.serving.openai.endpoints import GenerationEndpoint, JsonEndpoint
from fastpage.serving.openai.errors import ApiError
from fastpage.serving.openai.exchange import Receive, Scope, Send, encode_json
from fastpage.serving.openai.plain import Plain
from fastpage.serving.openai.state import ServerState
from fastpage.serving.security import BearerTokens


def build_app(
    state: ServerState, tokens: BearerTokens | None = None, cors_origins: Sequence[str] = ()
) -> Any:
    routes = _routes(state)
    paths = {route.path for route in routes if isinstance(route, Route)}
    middleware = [Middleware(CountRequests, counts=state.requests, paths=paths)]
    if cors_origins:
        options: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, allow_origins=cors_origins, **options))
    if tokens is not None:
        middleware.append(Middleware(RequireToken, tokens=tokens))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
    )


def _routes(state: ServerState) -> list[BaseRoute]:
    async def health(request: Request) -> Response:
        return _json({"status": "ready"} if state.ready else {"status": "not ready"}, state.ready)

    async def version(request: Request) -> Response:
        return _json(info.version())

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        body, content_type = await asyncio.to_thread(state.exposition.render, accept)
        return Response(body, headers={"content-type": content_type})

    def models(body: bytes, engine: Any, model: Any) -> Any:
        return info.list_models(model, state.started)

    def post(path: str, endpoint: Any) -> Route:
        return Route(path, endpoint, methods=["POST"])

    def get(path: str, endpoint: Any) -> Route:
        return Route(path, endpoint, methods=["GET"])

    return [
        get("/health", health),
        get("/version", version),
        get("/metrics", metrics),
        get("/load", JsonEndpoint(state, info.load, reads_body=False)),
        get("/v1/models", JsonEndpoint(state, models, reads_body=False)),
        get("/v1/models/{name:path}", _ModelEndpoint(state)),
        post("/v1/completions", GenerationEndpoint(state, Completions())),
        post("/v1/chat/completions", GenerationEndpoint(state, Chat())),
        post("/generate", GenerationEndpoint(state, Plain())),
        post("/tokenize", JsonEndpoint(state, info.tokenize, True, info.TOKENIZE_FIELDS)),
        post("/detokenize", JsonEndpoint(state, info.detokenize, True, info.DETOKENIZE_FIELDS)),
    ]


class _ModelEndpoint:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]

        def describe(body: bytes, engine: Any, model: Any) -> Any:
            return info.describe_model(model, self._state.started, name)

        await JsonEndpoint(self._state, describe, reads_body=False)(scope, receive, send)


class RequireToken:
    """Lets in who brings a token; /health is open."""

    def __init__(self, app: Callable[..., Any], tokens: BearerTokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health" or self._tokens.accept(_authorization(scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server wants a token: Authorization: Bearer TOKEN",
            kind="authentication_error",
            code="invalid_api_key",
            close=True,
        )
        await _error_response(error)(scope, receive, send)


def _authorization(scope: Scope) -> bytes | None:
    return dict(scope["headers"]).get(b"authorization")


def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message = (
            f"there is no {path!r:.200} here: see /v1/models, /v1/completions, /v1/chat/completions"
        )
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}"
    else:
        message = error.detail
    told = ApiError(error.status_code, message, code=error.detail.lower().replace(" ", "_"))
    return _error_response(told, dict(error.headers or {}))


def _error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    own = {name.decode(): value.decode() for name, value in error.headers()}
    return _json(error.body(), status=error.status, headers=own | (headers or {}))


def _json(
    value: Any, ok: bool = True, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        encode_json(value),
        status_code=status or (200 if ok else 503),
        headers=headers,
        media_type="application/json",
    )
