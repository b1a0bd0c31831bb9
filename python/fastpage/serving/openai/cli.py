"""fastpage-openai: the server's command line."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from fastpage.serving import lifecycle, security

if TYPE_CHECKING:
    from fastpage.serving.metrics.exposition import Expose

_EXTRA = ("httptools", "msgspec", "prometheus_client", "starlette", "uvicorn")


def main() -> None:
    COMMAND.run()


def _add_options(parser: argparse.ArgumentParser) -> None:
    server = lifecycle.add_server_options(parser, port=8000)
    server.add_argument("--uds", metavar="PATH", help="a Unix socket, instead of --host and --port")
    server.add_argument(
        "--max-body-bytes",
        type=int,
        default=4 << 20,
        metavar="BYTES",
        help="longest request; tokenizing one takes up to 150 times its memory (default: "
        "%(default)s)",
    )
    server.add_argument(
        "--request-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="until a request has come in whole (default: %(default)g)",
    )
    server.add_argument(
        "--slow-client-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a client that takes nothing of its answer for that long loses the connection "
        "(default: %(default)g)",
    )
    server.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this site ask, such as https://chat.example; * is any. May be given "
        "several times",
    )
    security.add_options(parser)


def _make_frontends(options: argparse.Namespace, expose: Expose | None) -> list[lifecycle.Frontend]:
    if not 0 < options.max_body_bytes < 2**31:
        raise ValueError(f"--max-body-bytes {options.max_body_bytes} is not from 1 to 2^31")
    for name in ("request_timeout", "slow_client_timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)} is not above 0")
    if options.uds:
        lifecycle.refuse_to_share(options, f"--uds {options.uds}")
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be there: pip install 'fastpage[openai]'")
    from fastpage.serving.openai.exchange import Limits
    from fastpage.serving.openai.server import HttpOptions, HttpServer

    limits = Limits(options.max_body_bytes, options.request_timeout, options.slow_client_timeout)
    http = HttpOptions(
        host=options.host,
        port=options.port,
        uds=options.uds,
        tls=security.TlsFiles.from_options(options),
        tokens=security.BearerTokens.from_options(options),
        cors_origins=options.cors_origin,
        limits=limits,
        trace_context=bool(options.otlp_traces_endpoint),
        reuse_port=options.api_server_count > 1,
    )
    return [HttpServer(http, expose)]


COMMAND = lifecycle.Command(
    program="fastpage-openai",
    module="fastpage.serving.openai.cli",
    description="Serve a model over HTTP, with OpenAI's API.",
    add_options=_add_options,
    make_frontends=_make_frontends,
)

if __name__ == "__main__":
    main()
