"""What a decode step of executor='cuda' launches, and what it costs the CPU. No GPU is needed.

The models have 32 layers of a tiny width. Printed are launches of a decode step, by what they are;
and, of Llama's, microseconds of CPU time of CudaRunner.execute() and wait(), the least and the
median of 190 steps, while matrix products, our kernels and the replay of a recorded step do
nothing.

--expected computes, rather than measures, the time of Llama 3.1 8B's decode steps on an H100, of
the bytes and the products of each launch; START is what a launch takes at the least, amid others of
a CUDA graph.

    PYTHONPATH=python:tests/python python benchmarks/cuda_steps.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from cuda_kernels import Launches, load_emulation
from small_decoder import load_random_weights, small_spec

from fastpage import _C
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.cuda_runner import CudaRunner
from fastpage.models import DecoderSpec, decoder

BLOCK, LENGTH = 16, 256
MEMORY, PRODUCTS, START = 3.0e12, 800e12, 2.5e-6
LLAMA = replace(small_spec(head_dim=16, max_model_len=1024), num_layers=32)
MODELS: dict[str, DecoderSpec] = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm="head"),
    "qwen2 (biases)": replace(LLAMA, qkv_bias=True),
    "gemma 2": replace(
        LLAMA,
        norm_place="sandwich",
        embed_scale=8.0,
        activation="gelu_tanh",
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
    ),
    "falcon (parallel)": replace(
        LLAMA, residual="parallel", gated_mlp=False, activation="gelu", norm_kind="layer"
    ),
    "gpt-2": replace(
        LLAMA,
        rotary=None,
        learned_positions=1024,
        norm_kind="layer",
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation="gelu_tanh",
    ),
}


def executor_of(spec: DecoderSpec, kernels: Any, num_seqs: int) -> CudaExecutor:
    executor = CudaExecutor(
        decoder(spec),
        device="cpu",
        dtype="bfloat16",
        kernels=kernels,
        num_kv_blocks=num_seqs * (1 + LENGTH // BLOCK),
    )
    load_random_weights(executor, executor.program, spec)
    return executor


def decode_step(num_seqs: int) -> dict[str, Any]:
    rows = np.arange(num_seqs, dtype=np.int32)
    tables = np.arange(num_seqs * LENGTH // BLOCK, dtype=np.int32).reshape(num_seqs, -1)
    return {
        "token_ids": rows % 60,
        "positions": np.full(num_seqs, LENGTH - 1, np.int32),
        "slot_mapping": tables[:, -1] * BLOCK + BLOCK - 1,
        "query_start_loc": np.arange(num_seqs + 1, dtype=np.int32),
        "seq_lens": np.full(num_seqs, LENGTH, np.int32),
        "block_tables": tables,
        "logits_indices": rows,
    }


def count(spec: DecoderSpec, ops: Any) -> dict[str, int]:
    """Of a recorded step."""
    launches = Launches(ops, compute=False)
    executor = executor_of(spec, launches.kernels, 1)
    executor.warm_up(
        max_num_seqs=1, max_num_batched_tokens=16, max_model_len=LENGTH, graph_sizes=[1]
    )
    assert executor._graphs is not None
    launches.counts.clear()
    with torch.inference_mode(), launches:
        executor._graphs._graphs[1]._replay()
    return dict(launches.counts)


def multiply_nothing(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


def cpu_seconds(spec: DecoderSpec, ops: Any, num_seqs: int, graphs: bool) -> dict[str, Any]:
    """Of each decode step of an engine with so many sequences."""
    kernels = Launches(ops, compute=False).kernels
    kernels.sample = lambda *args: args[-1].zero_()
    executor = executor_of(spec, kernels, num_seqs)
    executor.warm_up(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=512,
        max_model_len=1024,
        graph_sizes=[num_seqs] if graphs else [],
    )
    if executor._graphs is not None:
        for graph in executor._graphs._graphs.values():
            graph._replay = lambda: None
    times: dict[str, list[float]] = {"execute": [], "wait": []}

    class Timed(CudaRunner):
        def execute(self, batch: Any) -> None:
            begin = time.thread_time()
            super().execute(batch)
            times["execute"].append(time.thread_time() - begin)

        def wait(self, step_id: int) -> Any:
            begin = time.thread_time()
            output = super().wait(step_id)
            times["wait"].append(time.thread_time() - begin)
            return output

    config = _C.EngineConfig(
        scheduler=_C.SchedulerConfig(
            num_blocks=num_seqs * (1 + LENGTH // BLOCK),
            block_size=BLOCK,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=512,
            max_model_len=1024,
        ),
        vocab_size=spec.vocab_size,
    )
    engine = _C.Engine(config, Timed(executor))
    params = _C.SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    for _ in range(num_seqs):
        engine.add_request([1, 2, 3], params)
    while engine.has_unfinished():
        engine.step()
    decode = {name: values[-190:] for name, values in times.items()}
    return {
        name: {"least": 1e6 * min(values), "median": 1e6 * statistics.median(values)}
        for name, values in decode.items()
    }


def expected(rows: int, length: int) -> dict[str, tuple[int, float, float]]:
    """Launches, bytes and seconds of a decode step of Llama 3.1 8B in bfloat16."""
    layers, hidden, wide, q, kv, vocab = 32, 4096, 14336, 4096, 1024, 128256
    matrices = [(hidden, q + 2 * kv), (q, hidden), (hidden, 2 * wide), (wide, hidden)]

    def product(n: int, m: int) -> tuple[float, float]:
        moved = 2.0 * (n * m + rows * (n + m))
        return moved, START + max(moved / MEMORY, 2.0 * rows * n * m / PRODUCTS)

    def other(elements: float) -> tuple[float, float]:
        return 2.0 * elements, START + 2.0 * elements / MEMORY

    table = {
        "matrix products": layers * [product(*shape) for shape in matrices],
        "attention": layers * [other(rows * (2 * q + length * 2 * kv))],
        "norm, with residual": 2 * layers * [other(rows * 4 * hidden)],
        "rotary, cache write": layers * [other(rows * 2 * (q + 2 * kv))],
        "activation": layers * [other(rows * 3 * wide)],
        "logits, embedding, first norm": [
            product(hidden, vocab),
            other(rows * 2 * hidden),
            other(rows * 2 * hidden),
            other(rows * 3 * vocab),
        ],
    }
    return {
        name: (len(parts), sum(x for x, _ in parts), sum(x for _, x in parts))
        for name, parts in table.items()
    }


def print_expected(length: int) -> None:
    for rows in (1, 32, 256):
        print(f"{rows} sequences of {length} tokens:")
        parts = expected(rows, length)
        parts["whole step"] = tuple(sum(x) for x in zip(*parts.values(), strict=True))  # type: ignore[assignment]
        for name, (launches, moved, seconds) in parts.items():
            print(f"  {name:30} {launches:4} {moved / 1e6:9.0f} MB {seconds * 1e3:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where the numbers go, too")
    parser.add_argument("--expected", type=int, metavar="LENGTH", help="of sequences, in tokens")
    args = parser.parse_args()
    if args.expected:
        return print_expected(args.expected)
    torch.set_num_threads(1)
    ops = load_emulation()
    assert ops is not None, "this needs a build with tests"
    results: dict[str, Any] = {}
    for name, spec in MODELS.items():
        counts = count(spec, ops)
        results[name] = counts
        parts = ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda x: -x[1]))
        print(f"{name}: {sum(counts.values())} launches ({parts})")
    functional.linear = multiply_nothing
    for num_seqs in (1, 256):
        for graphs in (True, False):
            took = cpu_seconds(LLAMA, ops, num_seqs, graphs)
            results[f"{num_seqs} sequences, graphs {graphs}"] = took
            columns = ", ".join(
                f"{what} {x['least']:.0f} us (median {x['median']:.0f})" for what, x in took.items()
            )
            print(f"{num_seqs} sequences, {'graphs' if graphs else 'op by op'}: {columns}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
