"""The CUDA kernels against what the GPU can do: its own copy bandwidth, measured in the same run.

Times are medians of CUDA events over rounds of different inputs, together larger than L2. A decode
kernel's share is the KV bytes it reads, over its time, over the copy's bytes read and written a
second. FlashInfer, where it is installed, runs beside.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastpage import _C
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.device_sampler import DeviceSampler, arrays_of
from fastpage.executors.experts import Experts
from fastpage.executors.torch import activate
from fastpage.models import DecoderSpec, RotarySpec, decoder

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
BATCH_INVARIANT = "    batch-invariant"


def median_seconds(launches: list[Callable[[], Any]], runs: int = 30) -> float:
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    events = []
    torch.cuda._sleep(20_000_000)  # the GPU is not to wait for the CPU between two events
    for i in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launches[i % len(launches)]()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2] / 1e3


class Bench:
    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.rows: list[dict[str, Any]] = []
        self.copy = self.copy_bandwidth()
        self.has_flashinfer = importlib.util.find_spec("flashinfer") is not None

    def copy_bandwidth(self) -> float:
        a, b = (torch.randn(1 << 28, device="cuda") for _ in range(2))
        return 2 * a.nbytes / median_seconds([lambda: b.copy_(a), lambda: a.copy_(b)])

    def rounds(self, bytes_each: int) -> int:
        """How many sets of inputs are three times L2 together."""
        return int(max(1, min(64, 3 * self.properties.L2_cache_size // bytes_each + 1)))

    def add(self, name: str, seconds: float, bound: str, share: float, goal: str = "") -> None:
        row = {"kernel": name, "us": seconds * 1e6, "of": bound, "share": share, "goal": goal}
        self.rows.append(row)
        print(f"{name:58}{seconds * 1e6:10.1f} us {share:8.1%} of {bound:14}{goal}", flush=True)

    # ---- attention

    def attention(
        self, lens: list[int], new: int, q: torch.Tensor, *, batch_invariant: bool = False
    ) -> Callable[[], Any]:
        blocks_each = -(-max(lens) // BLOCK)
        total = blocks_each * len(lens)
        tables = torch.randperm(total, device="cuda").int().view(len(lens), -1)
        shape = (total, BLOCK, KV_HEADS, HEAD_DIM)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        plan = _C.cuda.AttentionPlan(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_num_seqs=len(lens),
            max_num_tokens=len(q),
            max_seq_len=max(lens),
            num_multiprocessors=self.properties.multi_processor_count,
            batch_invariant=batch_invariant,
        )
        host = torch.zeros(plan.plan_size, dtype=torch.int32)
        plan.plan(torch.arange(len(lens) + 1) * new, torch.tensor(lens), host)
        buffer, out = host.cuda(), torch.empty_like(q)
        workspace = torch.empty(plan.workspace_size, device="cuda")
        counters = torch.zeros(plan.num_counters, dtype=torch.int32, device="cuda")
        arguments = (q, k, v, tables, plan, buffer, workspace, counters, out)
        return lambda: _C.cuda.paged_attention(*arguments, scale=HEAD_DIM**-0.5)

    def decode(self, batch: int, length: int, goal: str) -> None:
        kv = 2 * batch * length * KV_HEADS * HEAD_DIM * 2
        q = torch.randn(batch, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        name = f"decode, {batch} x {length} tokens, {kv / 1e6:.0f} MB of KV"
        for mode, in_mode in ((name, False), (BATCH_INVARIANT, True)):
            launches = [
                self.attention([length] * batch, 1, q, batch_invariant=in_mode)
                for _ in range(self.rounds(kv))
            ]
            seconds = median_seconds([graphed(launch) for launch in launches])
            self.add(mode, seconds, "copy", kv / seconds / self.copy, "" if in_mode else goal)
        if self.has_flashinfer:
            try:
                self.flashinfer_decode(batch, length, kv, q)
            except Exception as error:  # its kernels may not build here; ours are still to be timed
                self.has_flashinfer = False
                print(f"    FlashInfer is left out: {type(error).__name__}: {error}", flush=True)

    def flashinfer_decode(self, batch: int, length: int, kv: int, q: torch.Tensor) -> None:
        import flashinfer

        pages = -(-length // BLOCK)
        shape = (batch * pages, 2, BLOCK, KV_HEADS, HEAD_DIM)
        launches = []
        for _ in range(self.rounds(kv)):
            cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            space = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, use_tensor_cores=True, backend="fa2"
            )
            wrapper.plan(
                torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages,
                torch.randperm(batch * pages, device="cuda").int(),
                torch.full((batch,), (length - 1) % BLOCK + 1, dtype=torch.int32, device="cuda"),
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                BLOCK,
                q_data_type=torch.bfloat16,
            )
            heads = q.view(batch, HEADS, HEAD_DIM)
            launches.append(lambda w=wrapper, c=cache, h=heads: w.run(h, c))
        seconds = median_seconds([graphed(launch) for launch in launches])
        self.add("    FlashInfer (fa2)", seconds, "copy", kv / seconds / self.copy)

    def prefill(self, tokens: int, goal: str) -> None:
        q = torch.randn(tokens, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        flops = 2 * tokens * tokens * HEADS * HEAD_DIM  # causal: half of 4
        for mode, in_mode in ((f"prefill, {tokens} tokens", False), (BATCH_INVARIANT, True)):
            launch = self.attention([tokens], tokens, q, batch_invariant=in_mode)
            seconds = median_seconds([launch], runs=10)
            name = f"{mode}, {flops / seconds / 1e12:.0f} TFLOP/s"
            share = flops / seconds / 800e12
            self.add(name, seconds, "800 TFLOP/s", share, "" if in_mode else goal)

    # ---- the cache

    def reshape_and_cache(self, tokens: int) -> None:
        cols = KV_HEADS * HEAD_DIM
        bytes_ = 4 * tokens * cols * 2
        launches = []
        for _ in range(self.rounds(bytes_)):
            k, v = (torch.randn(tokens, cols, device="cuda").bfloat16() for _ in range(2))
            shape = (tokens // BLOCK, BLOCK, KV_HEADS, HEAD_DIM)
            caches = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            slots = torch.randperm(tokens // BLOCK, device="cuda").int().repeat_interleave(BLOCK)
            slots = slots * BLOCK + torch.arange(tokens, device="cuda").int() % BLOCK
            arguments = (k, v, slots, *caches)
            launches.append(lambda a=arguments: _C.cuda.reshape_and_cache(*a))
        seconds = median_seconds(launches)
        name = f"reshape_and_cache, {bytes_ / 2e6:.0f} MB"
        self.add(name, seconds, "copy", bytes_ / seconds / self.copy, ">= 85 %")

    def blocks(self) -> None:
        elements = BLOCK * KV_HEADS * HEAD_DIM
        cache = torch.randn(32, 512, elements, device="cuda").bfloat16()
        pairs = torch.tensor([[i, 256 + i] for i in range(256)])
        bytes_ = 2 * 32 * 256 * elements * 2
        seconds = median_seconds([lambda: _C.cuda.copy_blocks(cache, pairs)])
        share = bytes_ / seconds / self.copy
        self.add(f"copy_blocks, {bytes_ / 2e6:.0f} MB", seconds, "copy", share, ">= 85 %")
        host = torch.empty(32, 512, elements, dtype=torch.bfloat16, pin_memory=True)
        flat = torch.empty(32 * 256 * elements, dtype=torch.bfloat16, device="cuda")
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        for direction, copy in (
            ("out", lambda: pinned.copy_(flat, non_blocking=True)),
            ("in", lambda: flat.copy_(pinned, non_blocking=True)),
        ):
            whole = median_seconds([copy], runs=10)
            swap = median_seconds(
                [lambda d=direction: _C.cuda.swap_blocks(cache, host, pairs, d)], runs=10
            )
            self.add(f"swap_blocks {direction}", swap, "one big copy", whole / swap, ">= 90 %")

    # ---- sampling

    def sample(self, rows: int = 256, vocab: int = 128 * 1024) -> None:
        logits = torch.randn(rows, vocab, device="cuda") * 3
        workspace = torch.empty(2 * rows * vocab, device="cuda")
        out = torch.empty(rows, dtype=torch.int32, device="cuda")
        ones = torch.ones(rows, device="cuda")
        longs = torch.arange(rows, device="cuda")
        once = logits.nbytes / self.copy
        for name, top_k, top_p in (
            ("top_k 50, top_p 0.9", 50, 0.9),
            ("top_p 0.9", 0, 0.9),
            ("plain", 0, 1.0),
        ):
            k = torch.full((rows,), top_k, dtype=torch.int32, device="cuda")
            arguments = (logits, ones, k, ones * top_p, ones * 0, longs, longs, workspace, out)
            seconds = median_seconds([lambda a=arguments: _C.cuda.sample(*a)])
            self.add(
                f"sample, {rows} x {vocab}, {name}: {seconds / once:.1f} passes",
                seconds,
                "one pass",
                once / seconds,
                "<= 3 passes" if top_k else "",
            )

    # ---- experts

    def experts(self, tokens: int, count: int = 128, top_k: int = 8) -> None:
        """Of a layer of Qwen3-30B-A3B, over the time to read those that are chosen."""
        hidden, intermediate = 2048, 768
        gate_up = torch.randn(count, 2 * intermediate, hidden, device="cuda").bfloat16() * 0.02
        down = torch.randn(count, hidden, intermediate, device="cuda").bfloat16() * 0.02
        silu = functools.partial(activate, kind="silu_and_mul")
        experts = Experts(gate_up, down, top_k=top_k, renormalize=True, activate=silu)
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        logits = torch.randn(tokens, count, device="cuda").bfloat16()
        chosen = logits.float().topk(top_k).indices.unique().numel()
        read = (gate_up.nbytes + down.nbytes) * chosen // count
        with torch.inference_mode():
            launch = graphed(lambda: experts.run(x, logits, may_wait=False))
            seconds = median_seconds([launch])
        name = f"experts, {tokens} tokens, {chosen} of {count} chosen, {read / 1e6:.0f} MB"
        self.add(name, seconds, "copy", read / seconds / self.copy)

    # ---- whole steps

    def decode_steps(self, batch: int, length: int, layers: int = 8) -> None:
        """Of a model with so many of Llama 3 8B's layers, and a small vocabulary: as they come, as
        a CUDA graph, and the latter with sampling, to the arrival of the tokens."""
        spec = DecoderSpec(
            vocab_size=32000,
            hidden_size=HEADS * HEAD_DIM,
            intermediate_size=14336,
            num_layers=layers,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            norm_eps=1e-5,
            max_position_embeddings=length,
            rotary=RotarySpec(dim=HEAD_DIM),
        )
        blocks_each = -(-length // BLOCK)
        executor = CudaExecutor(decoder(spec), num_kv_blocks=batch * blocks_each)
        for buffer in executor.program.buffers:
            if buffer.kind == "weight":
                weight = torch.randn(buffer.shape, device="cuda") * 0.02
                executor.load_weight(buffer.name, weight)
        executor.finish_loading()
        one_each = np.arange(batch, dtype=np.int32)
        tables = np.arange(batch * blocks_each, dtype=np.int32).reshape(batch, -1)
        step = {
            "token_ids": one_each,
            "positions": np.full(batch, length - 1, np.int32),
            "slot_mapping": tables[:, -1] * BLOCK + (length - 1) % BLOCK,
            "query_start_loc": np.arange(batch + 1, dtype=np.int32),
            "seq_lens": np.full(batch, length, np.int32),
            "block_tables": tables,
            "logits_indices": one_each,
        }
        matrices = [b for b in executor.program.buffers if b.kind == "weight" and len(b.shape) == 2]
        read = 2 * sum(math.prod(b.shape) for b in matrices if "embed" not in b.name)
        read += 2 * 2 * layers * batch * length * KV_HEADS * HEAD_DIM
        name = f"decode step, {layers} layers, {batch} x {length} tokens, {read / 1e6:.0f} MB"
        self.step(f"{name}, as it comes", read, lambda: executor.launch(step))
        executor.warm_up(
            max_num_seqs=batch,
            max_num_batched_tokens=batch,
            max_model_len=length,
            graph_sizes=[batch],
        )
        self.step("    as a CUDA graph", read, lambda: executor.launch(step))
        sampler = DeviceSampler(_C.cuda, spec.vocab_size, executor.device)
        arrays = arrays_of(batch, top_k=50, top_p=0.9)
        self.step(
            "    with sampling, waited for",
            read,
            lambda: sampler.launch(executor.launch(step), arrays).wait(0),
        )

    def step(self, name: str, read: int, run: Callable[[], Any], runs: int = 30) -> None:
        """By the clock, as the CPU's part counts: mean of so many in a row."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / runs
        self.add(name, seconds, "copy", read / seconds / self.copy)


def graphed(launch: Callable[[], Any]) -> Callable[[], Any]:
    """Without the time to launch it."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


SECTIONS = ("decode", "prefill", "cache", "sampling", "steps", "experts")


def run(bench: Bench, section: str) -> None:
    if section == "decode":
        for batch, length, goal in (
            (8, 1024, ">= 55 %"),
            (16, 1024, ">= 55 %"),
            (32, 1024, ">= 75 %"),
            (64, 1024, ">= 85 %"),
            (8, 16384, ">= 85 %"),
            (1, 131072, ">= 85 %"),
            (256, 2048, ">= 85 %"),
        ):
            bench.decode(batch, length, goal)
    elif section == "prefill":
        for tokens in (2048, 4096, 8192, 32768):
            bench.prefill(tokens, ">= 300 TFLOP/s" if tokens >= 4096 else "")
    elif section == "cache":
        for tokens in (16384, 65536):
            bench.reshape_and_cache(tokens)
        bench.blocks()
    elif section == "sampling":
        bench.sample()
    elif section == "steps":
        for batch, length in ((1, 1024), (32, 1024), (256, 512)):
            bench.decode_steps(batch, length)
    elif section == "experts":
        for tokens in (1, 8, 64, 256, 1024):
            bench.experts(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="(default: all)"
    )
    arguments = parser.parse_args()
    if not _C.cuda.is_available():
        sys.exit(f"error: nothing was measured: {_C.cuda.unavailable_reason()}")
    bench = Bench()
    print(f"{bench.properties.name}: copy {bench.copy / 1e12:.2f} TB/s (read and written)\n")
    failed = []
    for section in arguments.sections:
        try:
            run(bench, section)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(section)
        # What was measured so far stays if a later section ends this process.
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(
                    {"device": bench.properties.name, "copy": bench.copy, "rows": bench.rows}, file
                )
    if failed:
        sys.exit(f"error: not all was measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
