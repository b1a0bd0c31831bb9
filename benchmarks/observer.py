"""What metrics, a line in the log and a span for each request cost the event loop: in a step, at a
request's first token and at its end.

The model is the alphabet of the tests, so that only the engine and the front end work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "python"))

from fakes import load_alphabet
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastpage import AsyncEngine, SamplingParams, logs
from fastpage.engine.observer import EngineObserver, StepReport
from fastpage.engine.output_processor import RequestState
from fastpage.serving.metrics import EngineMetrics
from fastpage.serving.request_log import RequestLog
from fastpage.serving.tracing import Tracing


class Timed(EngineObserver):
    """Keeps the seconds that each call of an observer took."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self.engine_started = observer.engine_started  # type: ignore[method-assign]
        self.request_added = observer.request_added  # type: ignore[method-assign]
        self.steps: dict[int, list[float]] = {}  # by outputs that got another token
        self.first_tokens: list[float] = []  # for each first token in the step
        self.ends: list[float] = []

    def stepped(self, report: StepReport) -> None:
        start = time.perf_counter()
        self._observer.stepped(report)
        seconds = time.perf_counter() - start
        if report.first_tokens:
            self.first_tokens.append(seconds / len(report.first_tokens))
        else:
            self.steps.setdefault(len(report.token_gaps), []).append(seconds)

    def request_finished(self, request: RequestState) -> None:
        start = time.perf_counter()
        self._observer.request_finished(request)
        self.ends.append(time.perf_counter() - start)


async def measure(observer: EngineObserver, num_requests: int, num_tokens: int) -> Timed:
    timed = Timed(observer)
    loaded = load_alphabet(
        max_num_seqs=num_requests,
        num_blocks=num_requests * (num_tokens + 8),
        max_num_batched_tokens=8 * num_requests,
        max_model_len=num_tokens + 8,
    )
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    async with AsyncEngine(loaded, timed) as engine:

        async def one() -> None:
            async for _ in engine.generate("abc", params):
                pass

        await asyncio.gather(*[one() for _ in range(num_requests)])
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64, help="in a step")
    parser.add_argument("--tokens", type=int, default=500, help="of each request")
    options = parser.parse_args()
    logs.configure(logs.LogConfig(format="json"))
    # Lines are made and written, to nowhere.
    logging.getLogger().handlers[0].setStream(open(os.devnull, "w"))  # type: ignore[attr-defined]  # noqa: SIM115
    observers: dict[str, Callable[[], EngineObserver]] = {
        "metrics": EngineMetrics,
        "log": lambda: RequestLog(at_info=True),
        "traces": lambda: Tracing(InMemorySpanExporter()),
    }
    columns = ("step", "step p99", "first token", "end")
    print(f"microseconds, {options.requests} requests in a step")
    print(f"{'':<10}" + "".join(f"{column:>13}" for column in columns))
    results = {}
    for name, make in observers.items():
        timed = asyncio.run(measure(make(), options.requests, options.tokens))
        steps = sorted(timed.steps[options.requests])
        seconds = (
            median(steps),
            steps[int(0.99 * len(steps))],
            median(timed.first_tokens),
            median(timed.ends),
        )
        results[name] = {
            column: round(1e6 * s, 2) for column, s in zip(columns, seconds, strict=True)
        }
        print(f"{name:<10}" + "".join(f"{value:>13}" for value in results[name].values()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
