"""How near the CPU kernels come to the machine's limits.

Linear layers of SmolLM2-135M and of a 1B model, attention over a paged cache in decode and prefill,
each as a share of a plain C read loop and a plain C FMA loop (probe.c) measured just before and
after it: whichever bounds it at that many rows. Weights and caches are walked through memory, as a
model's layers are, so that nothing is found in a cache that a model would not find there. Then what
a step does to the KV cache first: whole blocks of all layers copied, and swapped to the host cache
and back, in bytes moved (each is read and written) beside what the read loop reads.

The last line is one JSON object; a `linear_..._share` is that of the model that does worse.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import probe
import step_profile

from fastpage import _C
from fastpage._C import ops
from fastpage.models import DecoderSpec, RotarySpec, decoder

# (in_features, out_features): how many the model has
SHAPES = {
    "135M": {
        (576, 960): 30,
        (576, 576): 30,
        (576, 3072): 30,
        (1536, 576): 30,
        (576, 49152): 1,
    },
    "1B": {(2048, 8192): 2, (8192, 2048): 1, (2048, 2048): 2},  # of a layer
}
FORMATS = {
    "bf16": "bfloat16",  # with bf16 activations where the CPU multiplies bf16
    "fp16": "float16",
    "fp32": "float32",
    "int8": "int8",  # with int8 activations, as int4
    "int4": "q4_1",
}
STEPS = {"bf16": "none", "int8": "int8", "int4": "int4"}  # by name, as --quantization says
ROWS = [1, 2, 4, 16, 64, 256, 1024]
WALK_BYTES = 192 << 20


def best_seconds(call: Callable[[int], None], count: int, overhead: float, budget: float) -> float:
    """The least mean time of a round of calls: call(0), ..., call(count - 1), or part of a round if
    that alone takes long."""
    best = float("inf")
    deadline = time.perf_counter() + budget
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        began = time.perf_counter()
        done = 0
        while done < count and (done == 0 or time.perf_counter() - began < 0.05):
            call(done)
            done += 1
        best = min(best, (time.perf_counter() - began) / done)
        rounds += 1
    return best - overhead


class Machine:
    """The probe, taken again around every group of measurements."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.readings = [probe.measure(threads)]

    def around(self, measure: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """A measurement, and the better of the readings before and after it."""
        before = self.readings[-1]
        value = measure()
        after = probe.measure(self.threads, repeats=3)
        self.readings.append(after)
        return value, {key: max(before[key], after[key]) for key in before}

    def median(self, key: str) -> float:
        return float(np.median([reading[key] for reading in self.readings]))


def linear_row(
    pool: _C.ThreadPool, machine: Machine, shape: tuple[int, int], stored: str, budget: float
) -> list[tuple[float, float, float]]:
    """Per number of rows: seconds, and the seconds that reading and that arithmetic alone take."""
    n_in, n_out = shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((n_out, n_in), np.float32)
    first = ops.PackedWeight(weight, stored, pool)
    copies = max(1, min(400, WALK_BYTES // first.nbytes))
    weights = [first] + [ops.PackedWeight(weight, stored, pool) for _ in range(copies - 1)]
    nothing = np.zeros((0, n_in), np.float32)
    no_rows = np.zeros((0, n_out), np.float32)

    def call_nothing(_: int) -> None:
        ops.linear(pool, nothing, first, None, no_rows)

    overhead = best_seconds(call_nothing, 100, 0.0, 0.01)
    results = []
    for rows in ROWS:
        x = rng.standard_normal((rows, n_in), np.float32)
        y = np.zeros((rows, n_out), np.float32)

        def call(i: int, x: np.ndarray = x, y: np.ndarray = y) -> None:
            ops.linear(pool, x, weights[i], None, y)

        seconds, limits = machine.around(lambda f=call: best_seconds(f, copies, overhead, budget))
        read = first.nbytes / limits["read_gbs"] * 1e-9
        results.append((seconds, read, 2 * rows * weight.size / limits["fma_gflops"] * 1e-9))
    return results


def print_linear(name: str, rows_by_shape: dict[tuple[int, int], list]) -> None:
    print(f"\nlinear, {name}: GFLOP/s (share of the bound)")
    print(f"{'in x out':>14}" + "".join(f"{rows:>13}" for rows in ROWS))
    for shape, results in rows_by_shape.items():
        cells = []
        for rows, (seconds, read, flops) in zip(ROWS, results, strict=True):
            gflops = 2e-9 * rows * shape[0] * shape[1] / seconds
            cells.append(f"{gflops:>7.0f} {max(read, flops) / seconds:>4.0%} ")
        print(f"{shape[0]:>6} x {shape[1]:>5}" + "".join(cells))


def linear_shares(
    rows_by_shape: dict[tuple[int, int], list], counts: dict[tuple[int, int], int]
) -> dict[int, float]:
    """Of all layers of a model together; at 1 and 2 rows of bandwidth, from 16 on of FMA, between
    them of whichever bounds more."""
    shares = {}
    for i, rows in enumerate(ROWS):
        seconds, read, flops = (
            sum(r[i][j] * counts[shape] for shape, r in rows_by_shape.items()) for j in range(3)
        )
        bound = read if rows <= 2 else flops if rows >= 16 else max(read, flops)
        shares[rows] = bound / seconds
    return shares


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


MIXTURES = {
    "Qwen3-30B-A3B": Mixture(128, 8, 2048, 768),
    "Mixtral 8x7B at a quarter of its width": Mixture(8, 2, 4096, 3584),
}
MOE_ROWS = [1, 4, 16, 64, 256]


def moe_rows(
    pool: _C.ThreadPool, machine: Machine, name: str, stored: str, budget: float
) -> dict[int, tuple[float, float]]:
    """Prints a line per number of rows, routed at random; the shares of reading the experts that
    have rows, and of arithmetic."""
    mixture = MIXTURES[name]
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((2 * mixture.intermediate, mixture.hidden), np.float32)
    down = rng.standard_normal((mixture.hidden, mixture.intermediate), np.float32)
    experts = [
        (ops.PackedWeight(gate_up, stored, pool), ops.PackedWeight(down, stored, pool))
        for _ in range(mixture.num_experts)
    ]
    expert_bytes = sum(part.nbytes for part in experts[0])
    no_x, no_logits = (np.zeros((0, n), np.float32) for n in (mixture.hidden, mixture.num_experts))

    def call_nothing(_: int) -> None:
        ops.moe(pool, no_x, no_logits, experts, mixture.top_k)

    overhead = best_seconds(call_nothing, 100, 0.0, 0.01)  # Python's list of all experts
    shares = {}
    for rows in MOE_ROWS:
        x = rng.standard_normal((rows, mixture.hidden), np.float32)
        steps = [rng.standard_normal((rows, mixture.num_experts), np.float32) for _ in range(16)]

        def call(i: int, x: np.ndarray = x, steps: list[np.ndarray] = steps) -> None:
            ops.moe(pool, x, steps[i], experts, mixture.top_k)

        seconds, limits = machine.around(lambda f=call: best_seconds(f, 16, overhead, budget))
        chosen = [np.unique(np.argsort(-s)[:, : mixture.top_k]).size for s in steps]
        read = np.mean(chosen) * expert_bytes / limits["read_gbs"] * 1e-9
        flops = 2 * rows * mixture.top_k * (gate_up.size + down.size) / limits["fma_gflops"] * 1e-9
        shares[rows] = float(read / seconds), float(flops / seconds)
        print(
            f"{rows:>6} rows{seconds * 1e3:>10.3f} ms{shares[rows][0]:>8.0%}{shares[rows][1]:>8.0%}"
        )
    return shares


def print_mixtures(
    pool: _C.ThreadPool, machine: Machine, weights: list[str], budget: float
) -> dict[str, float]:
    result = {}
    for name, mixture in MIXTURES.items():
        for stored in weights:
            print(f"\n{f'experts, {name}, {stored}':<48}{'read':>8}{'FMA':>8}")
            shares = moe_rows(pool, machine, name, FORMATS[stored], budget)
            for rows, share in shares.items():
                key = f"moe_{mixture.num_experts}_{stored}_m{rows}_share"
                result[key] = round(max(share), 3)
    return result


@dataclass(frozen=True)
class Attention:
    """One new token (or new_tokens) of each sequence, over a cache of blocks that lie anywhere, or
    in a row as an unused pool hands them out."""

    lens: tuple[int, ...]
    new_tokens: int = 1
    kv_heads: int = 3
    head_dim: int = 64
    shared: int = 0  # tokens that all sequences have in common, in the same blocks
    in_order: bool = False

    def tables(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.int32], int]:
        """Block tables, and how many blocks there are."""
        counts = [-(-n // 16) for n in self.lens]
        blocks = np.arange(sum(counts), dtype=np.int32)
        if not self.in_order:
            rng.shuffle(blocks)
        tables = np.zeros((len(counts), max(counts)), np.int32)
        for i, count in enumerate(counts):
            tables[i, :count], blocks = blocks[:count], blocks[count:]
        tables[:, : self.shared // 16] = tables[0, : self.shared // 16]
        return tables, sum(counts)


def attention(
    pool: _C.ThreadPool, machine: Machine, case: Attention, dtype: str, budget: float
) -> tuple[float, float, float]:
    """Seconds, and the seconds that reading the cache once for each sequence and that arithmetic
    alone take."""
    kv_heads, head_dim, new = case.kv_heads, case.head_dim, case.new_tokens
    heads = kv_heads * (3 if head_dim == 64 else 4)
    rng = np.random.default_rng(0)
    tables, blocks = case.tables(rng)
    bytes_per_token = _C.CpuExecutor.kv_block_bytes(1, kv_heads, head_dim, dtype, 16) / 16
    caches = []
    for _ in range(max(1, min(30, int(WALK_BYTES // (blocks * 16 * bytes_per_token))))):
        cache = ops.KvCache(blocks, kv_heads, head_dim, 16, dtype)
        tokens = rng.standard_normal((1024, kv_heads * head_dim)).astype(np.float32)
        for at in range(0, blocks * 16, 1024):
            slots = np.arange(at, min(at + 1024, blocks * 16), dtype=np.int32)
            part = tokens[: len(slots)]
            ops.reshape_and_cache(pool, part, part, slots, cache)
        caches.append(cache)
    start = np.arange(len(case.lens) + 1, dtype=np.int32) * new
    lens = np.array(case.lens, np.int32)
    q = rng.standard_normal((len(lens) * new, heads * head_dim)).astype(np.float32)
    out = np.zeros_like(q)

    def call(i: int) -> None:
        ops.paged_attention(pool, q, caches[i], start, lens, tables, heads, head_dim**-0.5, out=out)

    seconds, limits = machine.around(lambda: best_seconds(call, len(caches), 0.0, budget))
    pairs = sum(new * (n - new) + new * (new + 1) / 2 for n in case.lens)
    read = sum(case.lens) * bytes_per_token
    flops = 4 * pairs * heads * head_dim
    return seconds, read / limits["read_gbs"] * 1e-9, flops / limits["fma_gflops"] * 1e-9


DECODE = {
    "decode, 64 x 1000 tokens, 3 KV heads of 64": Attention((1000,) * 64),
    "decode, 64 x 1000 tokens, 8 KV heads of 128": Attention((1000,) * 64, 1, 8, 128),
}
IN_ORDER = {
    "the same in order, 3 KV heads of 64": Attention((1000,) * 64, in_order=True),
    "the same in order, 8 KV heads of 128": Attention((1000,) * 64, 1, 8, 128, in_order=True),
}
PREFILL = {
    "prefill, 2048 tokens, 3 KV heads of 64": Attention((2048,), 2048),
    "prefill, 2048 tokens, 8 KV heads of 128": Attention((2048,), 2048, 8, 128),
}
ONE_STREAM = "decode, 1 x 2048 tokens, 3 KV heads of 64"
APART = "decode, 32 x 2100 tokens, nothing in common"
SHARED = "decode, 32 x 2100 tokens, 2000 in common"
SKEWED = "decode, 1 x 8000 and 15 x 100 tokens"
OTHERS = {
    ONE_STREAM: Attention((2048,)),
    APART: Attention((2100,) * 32),
    SHARED: Attention((2100,) * 32, shared=2000),
    SKEWED: Attention((8000,) + (100,) * 15),
}


def attention_rows(
    pool: _C.ThreadPool, machine: Machine, dtype: str, budget: float
) -> dict[str, float]:
    """Prints a table; what of it belongs into the JSON line."""
    print(f"\n{f'attention, {dtype} KV':<60}{'read':>8}{'FMA':>8}")
    timed = {}
    for name, case in (DECODE | IN_ORDER | PREFILL | OTHERS).items():
        seconds, read, flops = timed[name] = attention(pool, machine, case, dtype, budget)
        print(f"{name:<48}{seconds * 1e3:>9.3f} ms{read / seconds:>8.0%}{flops / seconds:>8.0%}")
    prefix = "attn" if dtype == "bfloat16" else f"attn_{dtype}"
    alone = attention(_C.ThreadPool(1), machine, OTHERS[SKEWED], dtype, budget)[0]
    result = {
        "decode_share": min(timed[name][1] / timed[name][0] for name in DECODE),
        "decode_in_order_share": min(timed[name][1] / timed[name][0] for name in IN_ORDER),
        "prefill_share": min(timed[name][2] / timed[name][0] for name in PREFILL),
        "decode_ms": timed[next(iter(DECODE))][0] * 1e3,
        "shared_prefix_speedup": timed[APART][0] / timed[SHARED][0],
        "skewed_thread_share": alone / timed[SKEWED][0] / machine.threads,
    }
    print(f"a prefix in common: {result['shared_prefix_speedup']:.2f} times as fast as apart")
    print(f"one long sequence: {result['skewed_thread_share']:.0%} of the ideal split")
    for name, case in DECODE.items():
        shape = f"{case.kv_heads}x{case.head_dim}"
        result[f"decode_{shape}_share"] = timed[name][1] / timed[name][0]
    return {f"{prefix}_{key}": round(value, 3) for key, value in result.items()}


def cache_of(layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: str) -> _C.CpuExecutor:
    """An executor with that KV cache and a host cache of the same size, both touched, and hardly
    anything else."""
    spec = DecoderSpec(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_layers=layers,
        num_heads=kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_position_embeddings=16,
        rotary=RotarySpec(dim=head_dim),
    )
    program = decoder(spec)
    executor = _C.CpuExecutor(
        program, num_kv_blocks=blocks, num_host_kv_blocks=blocks, kv_cache_dtype=dtype
    )
    for buffer in program.buffers:
        if buffer.kind == "weight":
            executor.load_weight(buffer.name, np.zeros(buffer.shape, np.float32))
    executor.finish_loading()
    same = np.stack([np.arange(blocks, dtype=np.int32)] * 2, axis=1)
    executor.apply_transfers(same, same[:0], same)
    return executor


def transfers(
    executor: _C.CpuExecutor, place: int, blocks: int, count: int, budget: float
) -> float:
    """Seconds to move `count` random blocks, other ones each time; place: of the list that they are
    in, of apply_transfers' three."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(50):
        lists = [np.zeros((0, 2), np.int32)] * 3
        lists[place] = np.stack([rng.permutation(blocks)[:count] for _ in range(2)], axis=1)
        steps.append(lists)
    return best_seconds(lambda i: executor.apply_transfers(*steps[i]), 50, 0.0, budget)


def print_transfers(machine: Machine, dtype: str, budget: float) -> dict[str, float]:
    print(f"\n{f'whole blocks, {dtype} KV':<48}{'GB/s moved':>12}{'of reading':>12}")
    result = {}
    for model, shape in {"135M": (30, 3, 64), "1B": (16, 8, 128)}.items():
        bytes_each = _C.CpuExecutor.kv_block_bytes(*shape, dtype, 16)
        blocks = 2 * WALK_BYTES // bytes_each
        executor = cache_of(*shape, blocks, dtype)
        for count in (1, 16, 128):
            for place, name in enumerate(("swap out", "copy", "swap in")):
                seconds, limits = machine.around(
                    lambda args=(executor, place, blocks, count, budget): transfers(*args)
                )
                gbs = count * bytes_each / seconds * 1e-9
                label = f"{model}, {name}, {count} x {bytes_each >> 10} KiB"
                print(f"{label:<48}{gbs:>12.1f}{gbs / limits['read_gbs']:>12.0%}")
                result[f"{name.replace(' ', '_')}_{model}_{count}_gbs"] = round(gbs, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--weights",
        default="bf16,fp16,int8,int4",
        help=f"how they are kept: of {', '.join(FORMATS)}, separated by commas",
    )
    parser.add_argument("--kv-dtypes", default="bfloat16,int8", help="separated by commas")
    parser.add_argument("--experts", action="store_true", help="mixtures of experts, too (3 GB)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    args = parser.parse_args()
    pool = _C.ThreadPool(args.threads)
    machine = Machine(args.threads)
    result: dict[str, float | str | int] = {"isa": ops.cpu_isa(), "threads": args.threads}

    for name in filter(None, args.weights.split(",")):
        tables = {
            model: {s: linear_row(pool, machine, s, FORMATS[name], args.seconds) for s in shapes}
            for model, shapes in SHAPES.items()
        }
        print_linear(name, {s: r for rows in tables.values() for s, r in rows.items()})
        shares = [linear_shares(rows, SHAPES[model]) for model, rows in tables.items()]
        for rows in ROWS:
            result[f"linear_{name}_m{rows}_share"] = round(min(s[rows] for s in shares), 3)

    print("\na whole step of the 135M at a context of 256, milliseconds")
    for name in filter(STEPS.get, args.weights.split(",")):
        for rows, ms in step_profile.decode_ms(STEPS[name], [1, 64], pool).items():
            print(f"{name:>6}, {rows:>2} rows: {ms:.2f}")
            result[f"step_{name}_m{rows}_ms"] = round(ms, 3)

    if args.experts:
        result |= print_mixtures(pool, machine, args.weights.split(","), args.seconds)
    kv_dtypes = list(filter(None, args.kv_dtypes.split(",")))
    for dtype in kv_dtypes:
        result |= attention_rows(pool, machine, dtype, args.seconds)
    if kv_dtypes:
        result |= print_transfers(machine, kv_dtypes[0], args.seconds)
    result["read_gbs"] = round(machine.median("read_gbs"), 1)
    result["fma_gflops"] = round(machine.median("fma_gflops"), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
