"""The CUDA kernels against what the GPU can do: its own copy bandwidth, measured in the same run.

Times are medians of CUDA events over rounds of different inputs, together larger than L2. A decode
kernel's share is the KV bytes it reads, over its time, over the copy's bytes read and written a
second. FlashInfer and FlashAttention-3, where they are installed, run beside (peers).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention_peers
import numpy as np
import torch
from attention_peers import BLOCK, HEAD_DIM, HEADS, KV_HEADS, Paged

from fastpage import _C
from fastpage.executors.cuda import CudaExecutor
from fastpage.executors.device_sampler import DeviceSampler, arrays_of
from fastpage.executors.experts import Experts
from fastpage.executors.torch import activate
from fastpage.models import DecoderSpec, RotarySpec, decoder

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
    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.properties = torch.cuda.get_device_properties(0)
        self.rows: list[dict[str, Any]] = []
        self.copy = self.copy_bandwidth()

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
        if self.file is not None:  # at once: this process may be ended
            told = {"device": self.properties.name, "copy": self.copy, "rows": self.rows}
            self.file.write_text(json.dumps(told))

    # ---- attention

    def attention(
        self, paged: Paged, *, batch_invariant: bool = False
    ) -> tuple[Callable[[], Any], torch.Tensor]:
        """What launches it, and where the output will be."""
        plan = _C.cuda.AttentionPlan(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_num_seqs=len(paged.lens),
            max_num_tokens=len(paged.q),
            max_seq_len=max(paged.lens),
            num_multiprocessors=self.properties.multi_processor_count,
            batch_invariant=batch_invariant,
        )
        host = torch.zeros(plan.plan_size, dtype=torch.int32)
        starts = torch.arange(len(paged.lens) + 1) * paged.new
        plan.plan(starts, torch.tensor(paged.lens), host)
        buffer, out = host.cuda(), torch.empty_like(paged.q)
        workspace = torch.empty(plan.workspace_size, device="cuda")
        counters = torch.zeros(plan.num_counters, dtype=torch.int32, device="cuda")
        arguments = (paged.q, paged.k, paged.v, paged.tables, plan, buffer, workspace, counters)
        scale = HEAD_DIM**-0.5
        return lambda: _C.cuda.paged_attention(*arguments, out, scale=scale), out

    def add_decode(self, name: str, kv: int, launches: list[Callable[[], Any]], goal: str) -> None:
        """All in one graph, so that what a graph takes to begin is not a kernel's."""
        seconds = median_seconds([graphed(*launches)]) / len(launches)
        self.add(name, seconds, "copy", kv / seconds / self.copy, goal)

    def add_prefill(self, name: str, tokens: int, launch: Callable[[], Any], goal: str) -> None:
        seconds = median_seconds([launch], runs=10)
        flops = 2 * tokens * tokens * HEADS * HEAD_DIM  # causal: half of 4
        name = f"{name}, {flops / seconds / 1e12:.0f} TFLOP/s"
        self.add(name, seconds, "800 TFLOP/s", flops / seconds / 800e12, goal)

    def decode(self, batch: int, length: int, goal: str) -> None:
        kv = 2 * batch * length * KV_HEADS * HEAD_DIM * 2
        name = f"decode, {batch} x {length} tokens, {kv / 1e6:.0f} MB of KV"
        inputs = [Paged.random([length] * batch, 1) for _ in range(self.rounds(kv))]
        for mode, in_mode in ((name, False), (BATCH_INVARIANT, True)):
            launches = [self.attention(x, batch_invariant=in_mode)[0] for x in inputs]
            self.add_decode(mode, kv, launches, "" if in_mode else goal)

    def prefill(self, tokens: int, goal: str) -> None:
        paged = Paged.random([tokens], tokens)
        for mode, in_mode in ((f"prefill, {tokens} tokens", False), (BATCH_INVARIANT, True)):
            launch, _ = self.attention(paged, batch_invariant=in_mode)
            self.add_prefill(mode, tokens, launch, "" if in_mode else goal)

    # ---- others' attention, over the same inputs as ours

    def beside(self, peer: attention_peers.Peer, inputs: list[Paged]) -> list[Callable[[], Any]]:
        """Its launches, of which each has computed what ours does."""
        launches = []
        for paged in inputs:
            launch, out = self.attention(paged)
            launch()
            want = out.double()
            theirs = peer(paged)
            error = float((theirs().view_as(out).double() - want).norm() / want.norm())
            if not error < 1e-2:
                raise ValueError(f"its output is not ours: a relative error of {error:.2g}")
            launches.append(theirs)
        return launches

    def peers(self) -> None:
        missing = attention_peers.missing()
        if missing:
            print(f"not installed, and left out: {', '.join(missing)}", flush=True)
        decodes = attention_peers.DECODE
        for batch, length in DECODES if decodes else ():
            kv = 2 * batch * length * KV_HEADS * HEAD_DIM * 2
            inputs = [Paged.random([length] * batch, 1) for _ in range(self.rounds(kv))]
            ours = [self.attention(x)[0] for x in inputs]
            self.add_decode(f"decode, {batch} x {length} tokens", kv, ours, "")
            for name in list(decodes):
                with leaving_out(decodes, name):
                    launches = self.beside(decodes[name], inputs)
                    self.add_decode(f"    {name}", kv, launches, "")
        prefills = attention_peers.PREFILL
        for tokens in PREFILLS if prefills else ():
            paged = Paged.random([tokens], tokens)
            self.add_prefill(f"prefill, {tokens} tokens", tokens, self.attention(paged)[0], "")
            for name in list(prefills):
                with leaving_out(prefills, name):
                    launch = self.beside(prefills[name], [paged])[0]
                    self.add_prefill(f"    {name}", tokens, launch, "")

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

    def executor(
        self, layers: int, length: int, blocks: int, batch_invariant: bool
    ) -> CudaExecutor:
        """A model with so many of Llama 3 8B's layers, and a small vocabulary."""
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
        executor = CudaExecutor(
            decoder(spec), num_kv_blocks=blocks, batch_invariant=batch_invariant
        )
        for buffer in executor.program.buffers:
            if buffer.kind == "weight":
                weight = torch.randn(buffer.shape, device="cuda") * 0.02
                executor.load_weight(buffer.name, weight)
        executor.finish_loading()
        return executor

    def decode_steps(self, batch: int, length: int, layers: int = 8) -> None:
        """As they come, as a CUDA graph, in batch-invariant mode, too; with sampling, to the
        arrival of the tokens."""
        blocks_each = -(-length // BLOCK)
        executor, invariant = (
            self.executor(layers, length, batch * blocks_each, mode) for mode in (False, True)
        )
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
        for each, mode in ((executor, ""), (invariant, ", batch-invariant")):
            each.warm_up(
                max_num_seqs=batch,
                max_num_batched_tokens=batch,
                max_model_len=length,
                graph_sizes=[batch],
            )
            self.step(f"    as a CUDA graph{mode}", read, lambda e=each: e.launch(step))
        sampler = DeviceSampler(_C.cuda, executor.program.vocab_size, executor.device)
        arrays = arrays_of(batch, top_k=50, top_p=0.9)
        self.step(
            "    with sampling, waited for",
            read,
            lambda: sampler.launch(executor.launch(step), arrays).wait(0),
        )

    def prefill_step(self, tokens: int, layers: int = 8) -> None:
        """Of one prompt, of which the last token's logits are wanted."""
        at = np.arange(tokens, dtype=np.int32)
        step = {
            "token_ids": at,
            "positions": at,
            "slot_mapping": at,
            "query_start_loc": np.array([0, tokens], np.int32),
            "seq_lens": np.array([tokens], np.int32),
            "block_tables": np.arange(tokens // BLOCK, dtype=np.int32).reshape(1, -1),
            "logits_indices": at[-1:],
        }
        for name, mode in ((f"prefill step, {layers} layers", False), (BATCH_INVARIANT, True)):
            executor = self.executor(layers, tokens, tokens // BLOCK, mode)
            of_layers = sum(
                math.prod(buffer.shape)
                for buffer in executor.program.buffers
                if buffer.kind == "weight" and buffer.name.startswith("layers.")
            )
            flops = 2 * tokens * (of_layers + layers * tokens * HEADS * HEAD_DIM)
            seconds = self.seconds_of_step(lambda e=executor: e.launch(step))
            name = f"{name}, {tokens} tokens, {flops / seconds / 1e12:.0f} TFLOP/s"
            self.add(name, seconds, "800 TFLOP/s", flops / seconds / 800e12)

    def step(self, name: str, read: int, run: Callable[[], Any]) -> None:
        seconds = self.seconds_of_step(run)
        self.add(name, seconds, "copy", read / seconds / self.copy)

    def seconds_of_step(self, run: Callable[[], Any], runs: int = 30) -> float:
        """By the clock, as the CPU's part counts: mean of so many in a row."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / runs


def graphed(*launches: Callable[[], Any]) -> Callable[[], Any]:
    """One after the other, without the time to launch them."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph.replay


@contextlib.contextmanager
def leaving_out(peers: dict[str, Any], name: str) -> Iterator[None]:
    """What cannot be built or run here is told, and not tried again."""
    try:
        yield
    except Exception as error:
        del peers[name]
        print(f"    {name} is left out: {type(error).__name__}: {error}", flush=True)


DECODES = {  # batch and length, and what is to be reached
    (8, 1024): ">= 55 %",
    (16, 1024): ">= 55 %",
    (32, 1024): ">= 75 %",
    (64, 1024): ">= 85 %",
    (8, 16384): ">= 85 %",
    (1, 131072): ">= 85 %",
    (256, 2048): ">= 85 %",
}
PREFILLS = {2048: "", **dict.fromkeys((4096, 8192, 32768), ">= 300 TFLOP/s")}
SECTIONS = ("decode", "prefill", "cache", "sampling", "steps", "experts", "peers")


def run(bench: Bench, section: str) -> None:
    if section == "decode":
        for (batch, length), goal in DECODES.items():
            bench.decode(batch, length, goal)
    elif section == "prefill":
        for tokens, goal in PREFILLS.items():
            bench.prefill(tokens, goal)
    elif section == "cache":
        for tokens in (16384, 65536):
            bench.reshape_and_cache(tokens)
        bench.blocks()
    elif section == "sampling":
        bench.sample()
    elif section == "steps":
        for batch, length in ((1, 1024), (32, 1024), (256, 512)):
            bench.decode_steps(batch, length)
        bench.prefill_step(2048)
    elif section == "experts":
        for tokens in (1, 8, 64, 256, 1024):
            bench.experts(tokens)
    elif section == "peers":
        bench.peers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="(default: all)"
    )
    arguments = parser.parse_args()
    if not _C.cuda.is_available():
        sys.exit(f"error: nothing was measured: {_C.cuda.unavailable_reason()}")
    bench = Bench(arguments.json)
    print(f"{bench.properties.name}: copy {bench.copy / 1e12:.2f} TB/s (read and written)\n")
    failed = []
    for section in arguments.sections:
        try:
            run(bench, section)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(section)
    if failed:
        sys.exit(f"error: not all was measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
