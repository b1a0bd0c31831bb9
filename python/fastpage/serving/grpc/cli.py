"""fastpage-grpc: the server's command line."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from fastpage.serving import lifecycle, security

if TYPE_CHECKING:
    import grpc

    from fastpage.serving.metrics.exposition import Expose
    from fastpage.serving.metrics.server import MetricsFrontend


def main() -> None:
    COMMAND.run()


def _add_options(parser: argparse.ArgumentParser) -> None:
    server = lifecycle.add_server_options(parser, port=50051)
    server.add_argument(
        "--address",
        default="",
        metavar="unix:PATH|unix-abstract:NAME",
        help="a Unix socket instead of --host and --port",
    )
    server.add_argument(
        "--max-message-bytes",
        type=int,
        default=4 << 20,
        metavar="BYTES",
        help="longest request; tokenizing one takes up to 150 times its memory (default: "
        "%(default)s)",
    )
    server.add_argument(
        "--slow-client-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a client that takes nothing of a stream for that long loses the call (default: "
        "%(default)g)",
    )
    server.add_argument(
        "--channelz",
        action="store_true",
        help="serve grpc.channelz.v1, grpc's own statistics (needs the package grpcio-channelz)",
    )
    server.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="Prometheus metrics over HTTP on --host and this port; 0: let the system choose, "
        "and print it (needs fastpage[metrics])",
    )
    security.add_options(parser)


def _make_frontends(options: argparse.Namespace, expose: Expose | None) -> list[lifecycle.Frontend]:
    if not 0 < options.max_message_bytes < 2**31:
        raise ValueError(f"--max-message-bytes {options.max_message_bytes} is not from 1 to 2^31")
    if not 0 < options.slow_client_timeout < float("inf"):
        raise ValueError(f"--slow-client-timeout {options.slow_client_timeout} is not above 0")
    if options.address:
        lifecycle.refuse_to_share(options, f"--address {options.address}")
    if options.channelz and importlib.util.find_spec("grpc_channelz") is None:
        raise ValueError("--channelz: pip install 'fastpage[channelz]'")
    from fastpage.serving.grpc.listening import Address
    from fastpage.serving.grpc.server import GrpcServer, GrpcServerConfig, GrpcService
    from fastpage.serving.grpc.service import FastpageService
    from fastpage.serving.worker import create_worker_service

    interceptors: list[grpc.aio.ServerInterceptor] = []
    metrics = []
    if options.metrics_port is not None:
        from fastpage.serving.metrics.grpc_calls import CountCalls

        metrics.append(_metrics(options.host, options.metrics_port, expose))
        interceptors.append(CountCalls(metrics[0].calls))
    if options.otlp_traces_endpoint:
        from fastpage.serving.tracing import TraceContextInterceptor

        interceptors.append(TraceContextInterceptor())
    services: list[GrpcService] = [FastpageService(options.slow_client_timeout)]
    if worker := create_worker_service(options.slow_client_timeout):
        services.append(worker)
        if options.enable_kv_events is None:
            options.enable_kv_events = True
    config = GrpcServerConfig(
        address=Address(options.host, options.port, options.address),
        tls=security.TlsFiles.from_options(options),
        tokens=security.BearerTokens.from_options(options),
        max_message_bytes=options.max_message_bytes,
        channelz=options.channelz,
        reuse_port=options.api_server_count > 1,
        interceptors=interceptors,
    )
    return [GrpcServer(services, config), *metrics]


def _metrics(host: str, port: int, expose: Expose | None) -> MetricsFrontend:
    if not 0 <= port < 65536:
        raise ValueError(f"--metrics-port {port} is not between 0 and 65535")
    from fastpage.serving.metrics.server import MetricsOfFrontEnd, MetricsServer

    return MetricsServer(host, port) if expose is None else MetricsOfFrontEnd(expose)


COMMAND = lifecycle.Command(
    program="fastpage-grpc",
    module="fastpage.serving.grpc.cli",
    description="Serve a model over gRPC (proto/fastpage/v1/fastpage.proto).",
    add_options=_add_options,
    make_frontends=_make_frontends,
)

if __name__ == "__main__":
    main()
