"""How busy the engine is, for routers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import NamedTuple

from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from fastpage._C import __version__
from fastpage.engine.async_engine import AsyncEngine
from fastpage.engine.core import EngineDied
from fastpage.engine.observer import EngineObserver
from fastpage.engine.output_processor import RequestState

# Rates are of this long, and of no less than the second time.
_WINDOW_SECONDS = 10.0
_SECONDS_BETWEEN_SAMPLES = 0.5


@dataclass(frozen=True)
class Load:
    """Of one moment. `token_usage`: the share of the KV cache that running requests hold; cached
    prefixes that make room for others when it is needed do not count."""

    num_running: int
    num_waiting: int
    num_waiting_uncached_tokens: int  # an estimate, from the cache's hit rate
    token_usage: float
    num_used_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    gen_throughput: float  # tokens a second
    cache_hit_rate: float

    def to_scheduler_load(self) -> pb.SchedulerLoad:
        return pb.SchedulerLoad(
            num_running_reqs=self.num_running,
            num_waiting_reqs=self.num_waiting,
            num_total_reqs=self.num_running + self.num_waiting,
            num_used_tokens=self.num_used_tokens,
            max_total_num_tokens=self.max_total_num_tokens,
            token_usage=self.token_usage,
            gen_throughput=self.gen_throughput,
            cache_hit_rate=self.cache_hit_rate,
            utilization=self.token_usage,
            max_running_requests=self.max_running_requests,
            num_waiting_uncached_tokens=self.num_waiting_uncached_tokens,
        )

    def to_engine_load(self, sample: int) -> common.EngineLoad:
        """`sample`: a number that grows with each record of a stream."""
        return common.EngineLoad(
            running_requests=self.num_running,
            waiting_requests=self.num_waiting,
            waiting_uncached_tokens=self.num_waiting_uncached_tokens,
            token_usage=self.token_usage,
            active_token_usage=self.token_usage,
            gen_throughput=self.gen_throughput,
            max_running_requests=self.max_running_requests,
            sample=sample,
            cache_hit_rate=self.cache_hit_rate,
            num_used_tokens=self.num_used_tokens,
            max_total_num_tokens=self.max_total_num_tokens,
        )

    def differs(self, other: Load | None) -> bool:
        """By enough to be told at once."""
        if other is None:
            return True
        return (
            (self.num_running, self.num_waiting) != (other.num_running, other.num_waiting)
            or abs(self.token_usage - other.token_usage) > 0.005
            or abs(self.gen_throughput - other.gen_throughput) > 0.05 * other.gen_throughput
        )


class _Sample(NamedTuple):
    time: float
    num_generated: int
    cache_queries: int
    cache_hits: int


class LoadMeter(EngineObserver):
    """Sees every request of the engine, whichever server it came by."""

    def __init__(self, engine: AsyncEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._samples: deque[_Sample] = deque()
        self._cache_hit_rate = 0.0
        self._requests: dict[int, RequestState] = {}  # in the order of their arrival
        engine.add_observer(self)

    def request_added(self, request: RequestState) -> None:
        self._requests[request.core_id] = request

    def request_finished(self, request: RequestState) -> None:
        self._requests.pop(request.core_id, None)

    def engine_died(self, error: EngineDied) -> None:
        self._samples.clear()  # its totals begin anew

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def read(self) -> Load:
        stats = self._engine.stats()
        scheduler = stats.scheduler
        info = self._engine.info
        sample = _Sample(
            self._clock(),
            stats.num_generated_tokens,
            scheduler.prefix_cache_queries,
            scheduler.prefix_cache_hits,
        )
        past = self._past(sample)
        seconds = sample.time - past.time
        num_generated = sample.num_generated - past.num_generated
        num_queries = sample.cache_queries - past.cache_queries
        if num_queries > 0:
            self._cache_hit_rate = (sample.cache_hits - past.cache_hits) / num_queries
        num_used = scheduler.num_blocks - scheduler.num_free_blocks
        return Load(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_uncached_tokens=self._num_waiting_tokens(scheduler.num_waiting),
            token_usage=num_used / max(scheduler.num_blocks, 1),
            num_used_tokens=num_used * info.block_size,
            max_total_num_tokens=scheduler.num_blocks * info.block_size,
            max_running_requests=info.max_num_seqs,
            gen_throughput=num_generated / seconds if seconds > 0 else 0.0,
            cache_hit_rate=self._cache_hit_rate,
        )

    def to_response(self) -> pb.GetLoadsResponse:
        return pb.GetLoadsResponse(
            timestamp=datetime.now(timezone.utc).isoformat(),
            version=__version__,
            dp_rank_count=1,
            loads=[self.read().to_scheduler_load()],
        )

    def _past(self, now: _Sample) -> _Sample:
        """The sample to compare with: the oldest of the window, which is the next older one if
        nobody asked for longer than that."""
        samples = self._samples
        if samples and now.num_generated < samples[-1].num_generated:
            samples.clear()
        if not samples or now.time - samples[-1].time >= _SECONDS_BETWEEN_SAMPLES:
            samples.append(now)
        while len(samples) > 2 and samples[1].time <= now.time - _WINDOW_SECONDS:
            samples.popleft()
        return samples[0]

    def _num_waiting_tokens(self, num_waiting: int) -> int:
        """Of the requests without a first token, those that came last are the ones that wait."""
        latest = (
            len(request.prompt.token_ids)
            for request in reversed(self._requests.values())
            if request.metrics.first_token_time is None
        )
        return round(sum(islice(latest, num_waiting)) * (1.0 - self._cache_hit_rate))
