"""What a decode step of executor='cuda' launches, and what it costs the CPU. No GPU is needed.

The model has the layers of another and a tiny width; matrix products are torch's on the CPU, our
kernels do nothing, and neither does the replay of a recorded step. Printed are launches for each
decode step, by what they are, and microseconds of CPU time of CudaRunner.execute() and wait(): the
least of all steps, and the median.

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
from cuda_kernels import Launches, load_emulation
from small_decoder import load_random_weights, small_spec

from fastpage import _C
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.cuda_runner import CudaRunner
from fastpage.models import DecoderSpec, decoder

BLOCK, LENGTH = 16, 256
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where the numbers go, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ops = load_emulation()
    assert ops is not None, "this needs a build with tests"
    results: dict[str, Any] = {}
    for name, spec in MODELS.items():
        counts = count(spec, ops)
        results[name] = counts
        parts = ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda x: -x[1]))
        print(f"{name}: {sum(counts.values())} launches ({parts})")
    for num_seqs in (1, 256):
        for graphs in (True, False):
            took = cpu_seconds(LLAMA, ops, num_seqs, graphs)
            results[f"{num_seqs} sequences, graphs {graphs}"] = took
            print(f"{num_seqs} sequences, {'graphs' if graphs else 'op by op'}: {took}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
