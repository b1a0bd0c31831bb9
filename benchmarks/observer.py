"""What keeping metrics costs the event loop: in a step, and at a request's first and last token.

The model is the alphabet of the tests, so that only the engine and the front end work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "python"))

from fakes import load_alphabet

from fastpage import AsyncEngine, SamplingParams
from fastpage.engine.observer import StepReport
from fastpage.engine.output_processor import RequestState
from fastpage.serving.metrics import EngineMetrics


class TimedMetrics(EngineMetrics):
    """Keeps the seconds that each call took."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[float]] = {}  # by outputs that got another token
        self.first_tokens: list[float] = []  # for each first token in the step
        self.ends: list[float] = []

    def stepped(self, report: StepReport) -> None:
        start = time.perf_counter()
        super().stepped(report)
        seconds = time.perf_counter() - start
        if report.first_tokens:
            self.first_tokens.append(seconds / len(report.first_tokens))
        else:
            self.steps.setdefault(len(report.token_gaps), []).append(seconds)

    def request_finished(self, request: RequestState) -> None:
        start = time.perf_counter()
        super().request_finished(request)
        self.ends.append(time.perf_counter() - start)


async def measure(num_requests: int, num_tokens: int) -> TimedMetrics:
    metrics = TimedMetrics()
    loaded = load_alphabet(
        max_num_seqs=num_requests,
        num_blocks=num_requests * (num_tokens + 8),
        max_num_batched_tokens=8 * num_requests,
        max_model_len=num_tokens + 8,
    )
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    async with AsyncEngine(loaded, metrics) as engine:

        async def one() -> None:
            async for _ in engine.generate("abc", params):
                pass

        await asyncio.gather(*[one() for _ in range(num_requests)])
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64, help="in a step")
    parser.add_argument("--tokens", type=int, default=500, help="of each request")
    options = parser.parse_args()
    metrics = asyncio.run(measure(options.requests, options.tokens))
    full = sorted(metrics.steps[options.requests])
    result = {
        "requests": options.requests,
        "steps": len(full),
        "step_microseconds": round(median(full) * 1e6, 2),
        "step_microseconds_p99": round(full[int(0.99 * len(full))] * 1e6, 2),
        "first_token_microseconds": round(median(metrics.first_tokens) * 1e6, 2),
        "end_microseconds": round(median(metrics.ends) * 1e6, 2),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<28} {value:>8}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
