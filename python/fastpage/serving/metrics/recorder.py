"""Counts what an AsyncEngine does. Cheap: it runs on the event loop in every step."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING

from fastpage.engine.core import EngineDied, EngineHung, EngineStopped
from fastpage.engine.observer import EngineObserver, StepReport
from fastpage.errors import InvalidArgument, ResourceExhausted

if TYPE_CHECKING:
    from fastpage import _C
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.engine.output_processor import RequestState

# vLLM's buckets, so that quantiles mean the same.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = tuple(float(n) for n in (1, *(2**k for k in range(3, 15))))
_N = (1.0, 2.0, 5.0, 10.0, 20.0)
# Ours.
_STEP_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)

# What a step's time goes to, and the total of it in EngineStats.
STEP_PHASES = {
    phase: f"{phase}_seconds" for phase in ("schedule", "prepare", "model", "sample", "output")
}
# Of EngineStats: what only grows, until an engine process begins anew.
_TOTALS = (
    "num_steps",
    "num_computed_tokens",
    *STEP_PHASES.values(),
    "scheduler.num_preemptions",
    "scheduler.num_preemptions_swap",
    "scheduler.prefix_cache_queries",
    "scheduler.prefix_cache_hits",
    "scheduler.preempted_cache_queries",
    "scheduler.preempted_cache_hits",
    "scheduler.num_blocks_swapped_out",
    "scheduler.num_blocks_swapped_in",
    "scheduler.num_blocks_copied",
    "scheduler.num_draft_tokens",
    "scheduler.num_accepted_tokens",
)
_GETTERS = {name: attrgetter(name) for name in _TOTALS}
step_phases = attrgetter(*STEP_PHASES.values())

FINISH_REASONS = ("stop", "length", "abort", "error")
# The first class that fits gives the reason.
_REFUSALS = (
    (ResourceExhausted, "resource_exhausted"),
    (EngineStopped, "unavailable"),
    (InvalidArgument, "invalid_argument"),
    (Exception, "internal"),
)


class Histogram:
    """Counts by bucket; the last one has no upper bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_many(self, value: float, count: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def observe_all(self, values: list[float]) -> None:
        first = bisect_left(self.bounds, min(values))
        if first == bisect_left(self.bounds, max(values)):  # as in nearly every step
            self.counts[first] += len(values)
            self.total += sum(values)
            return
        for value in values:
            self.observe(value)


def token_buckets(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    steps = (float(m * 10**e) for e in range(len(str(largest))) for m in (1, 2, 5))
    return tuple(step for step in steps if step <= largest)


class EngineMetrics(EngineObserver):
    """Metrics of one AsyncEngine. May be read from another thread: each number is right, if not
    all of the same moment."""

    def __init__(self) -> None:
        self.engine: AsyncEngine | None = None  # once it has started
        self.engine_up = False
        self.num_restarts = 0
        self.num_hangs = 0
        self.num_front_end_restarts = 0
        self.finished = dict.fromkeys(FINISH_REASONS, 0)  # outputs, by reason
        self.refused = dict.fromkeys((reason for _, reason in _REFUSALS), 0)
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.iteration_tokens = Histogram(_STEP_TOKENS)
        self.step_seconds = Histogram(_STEP_SECONDS)
        self.time_to_first_token = Histogram(_FIRST_TOKEN_SECONDS)
        self.inter_token_latency = Histogram(_TOKEN_SECONDS)
        self.time_per_output_token = Histogram(_TOKEN_SECONDS)
        self.e2e_latency = Histogram(_REQUEST_SECONDS)
        self.queue_time = Histogram(_REQUEST_SECONDS)
        self.inference_time = Histogram(_REQUEST_SECONDS)
        self.prefill_time = Histogram(_REQUEST_SECONDS)
        self.decode_time = Histogram(_REQUEST_SECONDS)
        self.params_n = Histogram(_N)
        self._size_by_tokens(1)
        # The totals of engine processes that have ended, and the stats of the one that runs. One
        # attribute: a reader on another thread must not count a process twice.
        self._totals: tuple[dict[str, float], _C.EngineStats | None]
        self._totals = (dict.fromkeys(_TOTALS, 0), None)
        self._seconds_in_steps = 0.0

    def _size_by_tokens(self, max_model_len: int) -> None:
        bounds = token_buckets(max_model_len)
        self.prompt_tokens = Histogram(bounds)
        self.computed_prompt_tokens = Histogram(bounds)
        self.generation_tokens = Histogram(bounds)
        self.max_generation_tokens = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)

    # ---- for readers

    def total(self, name: str) -> float:
        """A total of EngineStats, over all engine processes there were."""
        before, stats = self._totals
        return before[name] + (0 if stats is None else _GETTERS[name](stats))

    def scheduler_stats(self) -> _C.SchedulerStats | None:
        """As of now. None while there is no engine."""
        if self.engine is None or not self.engine_up:
            return None
        return self.engine.stats().scheduler

    # ---- EngineObserver

    def engine_started(self, engine: AsyncEngine) -> None:
        if self.engine is None:
            self._size_by_tokens(engine.info.max_model_len)
        else:
            self.num_restarts += 1
        self.engine = engine
        self.engine_up = True

    def engine_died(self, error: EngineDied) -> None:
        self.engine_up = False
        self.num_hangs += isinstance(error, EngineHung)
        self._totals = ({name: self.total(name) for name in _TOTALS}, None)
        self._seconds_in_steps = 0.0

    def stepped(self, report: StepReport) -> None:
        self._totals = (self._totals[0], report.stats)
        if report.num_tokens:
            self.iteration_tokens.observe(report.num_tokens)
            seconds = sum(step_phases(report.stats))
            self.step_seconds.observe(seconds - self._seconds_in_steps)
            self._seconds_in_steps = seconds
        self.num_generation_tokens += report.num_new_tokens
        if report.token_gaps:
            self.inter_token_latency.observe_all(report.token_gaps)
        for request in report.first_tokens:
            self.num_prompt_tokens += len(request.prompt.token_ids)
            self.num_cached_prompt_tokens += request.num_cached_tokens
            metrics = request.metrics
            if metrics.first_token_time is not None:
                self.time_to_first_token.observe(metrics.first_token_time - metrics.arrival_time)

    def request_refused(self, request_id: str, error: Exception) -> None:
        self.refused[next(reason for kind, reason in _REFUSALS if isinstance(error, kind))] += 1

    def request_finished(self, request: RequestState) -> None:
        reasons = [sample.output.finish_reason or "error" for sample in request.samples]
        for reason in reasons:
            self.finished[reason] += 1
        if "error" in reasons or "abort" in reasons:
            return
        self._observe_sizes(request)
        self._observe_times(request)

    def _observe_sizes(self, request: RequestState) -> None:
        num_prompt_tokens = len(request.prompt.token_ids)
        self.prompt_tokens.observe(num_prompt_tokens)
        self.computed_prompt_tokens.observe(num_prompt_tokens - request.num_cached_tokens)
        lengths = [len(sample.output.token_ids) for sample in request.samples]
        for length in lengths:
            self.generation_tokens.observe(length)
        self.max_generation_tokens.observe(max(lengths))
        self.params_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            self.params_max_tokens.observe(request.params.max_tokens)

    def _observe_times(self, request: RequestState) -> None:
        times = request.metrics
        if times.first_token_time is None or times.last_token_time is None:
            return
        self.e2e_latency.observe(times.last_token_time - times.arrival_time)
        if times.queue_seconds is not None:
            # It began when the engine took the request, which may be before arrival_time.
            queued_until = times.arrival_time + times.queue_seconds
            scheduled = min(queued_until, times.first_token_time)
            self.queue_time.observe(times.queue_seconds)
            self.inference_time.observe(times.last_token_time - scheduled)
            if not request.ranked:
                self.prefill_time.observe(times.first_token_time - scheduled)
        if request.ranked:  # its tokens came all at once, at the end
            return
        self.decode_time.observe(times.last_token_time - times.first_token_time)
        for sample in request.samples:
            num_later = len(sample.output.token_ids) - 1
            if num_later > 0 and sample.last_token_time is not None:
                seconds = sample.last_token_time - times.first_token_time
                self.time_per_output_token.observe(seconds / num_later)
