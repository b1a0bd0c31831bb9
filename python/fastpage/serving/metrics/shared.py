"""Metrics of several front ends over one engine, as those of one.

What a front end counts of its requests and calls is added up; what is the engine's (its statistics,
its steps, whether it is up) the parent hears itself, and counts once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from fastpage.serving.metrics.calls import CallCounts
from fastpage.serving.metrics.exposition import Exposition, serve_metrics
from fastpage.serving.metrics.recorder import EngineMetrics, Histogram, step_phases

if TYPE_CHECKING:
    from fastpage.engine.observer import StepReport

# Of EngineMetrics: what a front end knows of its own requests.
_COUNTS = ("num_prompt_tokens", "num_cached_prompt_tokens", "num_generation_tokens")
_COUNTS_BY_REASON = ("finished", "refused")
_HISTOGRAMS = (
    *("time_to_first_token", "inter_token_latency", "time_per_output_token", "e2e_latency"),
    *("queue_time", "inference_time", "prefill_time", "decode_time", "params_n"),
    *("prompt_tokens", "computed_prompt_tokens", "generation_tokens", "max_generation_tokens"),
    "params_max_tokens",
)
_SEPARATOR = "\x1f"

Snapshot = dict[str, Any]
"""JSON: numbers, in lists and by name."""


def snapshot(metrics: EngineMetrics, calls: CallCounts) -> Snapshot:
    """What a front end has counted since its start."""
    taken: Snapshot = {
        "calls": {_SEPARATOR.join(values): count for values, count in calls.counts.items()}
    }
    if metrics.engine is None:  # histograms have their bounds from then on
        return taken
    taken |= {name: getattr(metrics, name) for name in _COUNTS}
    taken |= {name: dict(getattr(metrics, name)) for name in _COUNTS_BY_REASON}
    for name in _HISTOGRAMS:
        histogram: Histogram = getattr(metrics, name)
        taken[name] = {"counts": list(histogram.counts), "total": histogram.total}
    return taken


def added(a: Any, b: Any) -> Any:
    """The sum of two snapshots, number by number. None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {name: added(a.get(name), b.get(name)) for name in (a | b)}
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return a + b


class EngineOfParent(Protocol):
    """What metrics need of an AsyncEngine."""

    @property
    def phases(self) -> dict[str, float]: ...

    @property
    def info(self) -> Any: ...

    def stats(self) -> Any: ...


class SharedEngineMetrics(EngineMetrics):
    """The parent's: of the engine what it hears, of requests what show() is given."""

    def __init__(self) -> None:
        super().__init__()
        self._num_steps = 0

    def started(self, engine: EngineOfParent) -> None:
        self._num_steps = 0
        self.engine_started(cast("Any", engine))

    def stepped(self, report: StepReport) -> None:
        """It may be of several steps: somebody that nothing is for hears of them now and then.
        Each counts, as their average."""
        self._totals = (self._totals[0], report.stats)
        count = report.stats.num_steps - self._num_steps
        if not report.num_tokens or count <= 0:
            return
        self._num_steps = report.stats.num_steps
        seconds = sum(step_phases(report.stats))
        spent = seconds - self._seconds_in_steps
        self._seconds_in_steps = seconds
        self.iteration_tokens.observe_many(report.num_tokens / count, count)
        self.step_seconds.observe_many(spent / count, count)

    def show(self, total: Snapshot) -> None:
        if "finished" not in total:
            return
        for name in _COUNTS:
            setattr(self, name, total[name])
        for name in _COUNTS_BY_REASON:
            setattr(self, name, total[name])
        for name in _HISTOGRAMS:
            histogram: Histogram = getattr(self, name)
            histogram.counts = total[name]["counts"]
            histogram.total = total[name]["total"]


class SharedMetrics:
    """The parent's view of front ends that come and go: no count is ever less than before."""

    def __init__(self) -> None:
        self.engine = SharedEngineMetrics()
        self._calls: CallCounts | None = None
        self._exposition: Exposition | None = None
        self._latest: dict[int, Snapshot] = {}  # by the front end's index
        self._of_gone: Snapshot = {}

    def expose(self, metrics: EngineMetrics, calls: CallCounts) -> Exposition:
        """Instead of `metrics`, which count nothing here. Raises MissingExtra if prometheus_client
        is not there."""
        self._calls = calls
        self._exposition = Exposition(self.engine, calls, of_process=False)
        return self._exposition

    def listen(self, host: str, port: int | None) -> str:
        """Where metrics have a port of their own. "" if they have none."""
        if port is None or self._exposition is None:
            return ""
        return serve_metrics(self._exposition, host, port)

    def stop_server(self) -> None:
        if self._exposition is not None:
            self._exposition.stop_server()

    def render(self, accept: str) -> tuple[bytes, str]:
        assert self._exposition is not None
        return self._exposition.render(accept)

    def take_in(self, index: int, taken: Snapshot) -> None:
        """What the front end has counted since its start."""
        assert self._calls is not None
        self._latest[index] = taken
        total = self._of_gone
        for each in self._latest.values():
            total = added(total, each)
        self.engine.show(total)
        self._calls.counts = {
            tuple(values.split(_SEPARATOR)): count for values, count in total["calls"].items()
        }

    def forget(self, index: int) -> None:
        """The front end's process has ended; its next one counts from nothing."""
        self._of_gone = added(self._of_gone, self._latest.pop(index, {}))
