"""EngineMetrics in the formats that Prometheus reads, and a small HTTP server for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from fastpage.errors import FastpageError
from fastpage.serving.metrics.calls import CallCounts
from fastpage.serving.metrics.catalogue import METRICS, Metric
from fastpage.serving.metrics.recorder import EngineMetrics, Histogram

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

_MISSING = 'metrics need the package prometheus_client: pip install "fastpage[metrics]"'


class MissingExtra(FastpageError, ValueError):
    """prometheus_client is not installed."""


class Renderer(Protocol):
    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body and its content type, which follows the request's Accept header. Not on the
        event loop: it may take a while."""
        ...


Expose = Callable[[EngineMetrics, CallCounts], Renderer]


class Exposition:
    """Raises MissingExtra if prometheus_client is not there."""

    def __init__(
        self, metrics: EngineMetrics, calls: CallCounts | None = None, of_process: bool = True
    ) -> None:
        """`of_process`: with what every program with this client shows: CPU seconds, memory, open
        files, Python's own."""
        try:
            import prometheus_client
        except ImportError:
            raise MissingExtra(_MISSING) from None
        self._client = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        if of_process:
            prometheus_client.ProcessCollector(registry=self._registry)
            prometheus_client.PlatformCollector(registry=self._registry)
            prometheus_client.GCCollector(registry=self._registry)
        self._registry.register(_EngineCollector(metrics))
        if calls is not None:
            self._registry.register(_CallCollector(calls))
        self._server: tuple[Any, threading.Thread] | None = None

    def render(self, accept: str = "") -> tuple[bytes, str]:
        encode, content_type = self._client.exposition.choose_encoder(accept)
        return encode(self._registry), content_type

    def start_server(self, host: str, port: int) -> int:
        """GET /metrics, on threads of its own. Returns the port, which is the system's choice if 0
        was asked for. Raises FastpageError if it cannot be had."""
        try:
            server, thread = self._client.start_http_server(port, host, self._registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FastpageError(
                f"cannot listen on {host}:{port} for metrics: {reason.lower()}"
            ) from None
        self._server = server, thread
        return int(server.server_port)

    def stop_server(self) -> None:
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None


def serve_metrics(exposition: Exposition, host: str, port: int) -> str:
    """start_server(). Returns the address, as people write it."""
    chosen = exposition.start_server(host, port)
    return f"http://{f'[{host}]' if ':' in host else host}:{chosen}/metrics"


class _EngineCollector:
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Family]:
        """Nothing: the registry need not collect to learn the names."""
        return []

    def collect(self) -> Iterator[Family]:
        metrics = self._metrics
        if metrics.engine is None:
            return
        labels = {"model_name": metrics.engine.info.served_model_name, "engine": "0"}
        for metric in METRICS:
            if metric.exists(metrics):
                yield _family(metric, metrics, labels)


class _CallCollector:
    def __init__(self, calls: CallCounts) -> None:
        self._calls = calls

    def describe(self) -> list[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        from prometheus_client.core import CounterMetricFamily

        calls = self._calls
        family = CounterMetricFamily(calls.name, calls.meaning, labels=calls.labels)
        for values, count in list(calls.counts.items()):
            family.add_metric(values, count)
        yield family


def _family(metric: Metric, metrics: EngineMetrics, labels: Mapping[str, str]) -> Family:
    from prometheus_client.core import Metric as Family

    kind = "gauge" if metric.kind == "info" else metric.kind
    family = Family(metric.name, metric.meaning, kind)
    reading = metric.read(metrics)
    if isinstance(reading, Histogram):
        _add_histogram(family, reading, labels)
    elif not isinstance(reading, Mapping):
        family.add_sample(metric.exposed_name, dict(labels), reading)
    elif metric.label is None:
        family.add_sample(metric.exposed_name, {**labels, **reading}, 1)
    else:
        for key, value in reading.items():
            family.add_sample(metric.exposed_name, {**labels, metric.label: key}, value)
    return family


def _add_histogram(family: Family, histogram: Histogram, labels: Mapping[str, str]) -> None:
    from prometheus_client.utils import floatToGoString

    total = histogram.total
    running = list(accumulate(histogram.counts))
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, running, strict=True):
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
    family.add_sample(f"{family.name}_count", dict(labels), running[-1])
    family.add_sample(f"{family.name}_sum", dict(labels), total)
