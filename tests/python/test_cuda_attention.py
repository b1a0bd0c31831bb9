"""PagedAttention on the GPU (or its emulation) against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cuda_kernels import Kernels, from_float8, relative_error, to_float8

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


@dataclass(frozen=True)
class Case:
    new_tokens: list[int]
    seq_lens: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    float8: bool = False
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    head_major: bool = False
    num_multiprocessors: int = 4
    batch_invariant: bool = False
    fixed_grid: bool = False
    decode_only: bool = False
    blocks_before: int = 0  # those used, in the cache
    sharpness: float = 1.0  # of the softmax
    plan: dict[str, int] = field(default_factory=dict)


class Attention:
    """The inputs of a case; blocks are shuffled, and memory without tokens is poisoned."""

    def __init__(self, cuda: Kernels, case: Case) -> None:
        self.cuda, self.case = cuda, case
        c = case
        self.starts = [0]
        for n in c.new_tokens:
            self.starts.append(self.starts[-1] + n)
        rows, cols = self.starts[-1], c.heads * c.head_dim
        wide = cuda.random(rows, cols + 64, dtype=c.dtype, seed=1, scale=c.sharpness)
        self.q = wide[:, 64:]
        self.blocks_each = max(1, max((math.ceil(n / c.block_size) for n in c.seq_lens), default=1))
        total = self.blocks_each * max(1, len(c.seq_lens)) + 1
        order = torch.randperm(total, generator=torch.Generator().manual_seed(2))
        ids = order[: self.blocks_each * len(c.seq_lens)].to(torch.int32)
        self.block_tables = ids.view(len(c.seq_lens), self.blocks_each).to(cuda.device)
        self.k, self.k_scale = self.new_cache(total, seed=3)
        self.v, self.v_scale = self.new_cache(total, seed=4)
        self.block_tables += c.blocks_before
        self.slopes = None
        if c.alibi:
            self.slopes = torch.linspace(0.5, 0.01, c.heads).to(cuda.device)
        self.scale = c.head_dim**-0.5
        self.new_plan(c.batch_invariant)

    def new_plan(self, batch_invariant: bool) -> None:
        c, cuda = self.case, self.cuda
        limits = {
            "max_num_seqs": max(1, len(c.seq_lens)),
            "max_num_tokens": max(1, self.starts[-1]),
            "max_seq_len": max([1, *c.seq_lens]),
        } | c.plan
        self.plan = cuda.ops.AttentionPlan(
            num_heads=c.heads,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            num_multiprocessors=c.num_multiprocessors,
            batch_invariant=batch_invariant,
            fixed_grid=c.fixed_grid,
            decode_only=c.decode_only,
            **limits,
        )
        self.plan_buffer = torch.full((self.plan.plan_size,), -7, dtype=torch.int32)
        self.workspace = cuda.poisoned(self.plan.workspace_size, dtype=torch.float32)
        self.counters = torch.zeros(self.plan.num_counters, dtype=torch.int32, device=cuda.device)

    def new_cache(self, total: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        c, cuda = self.case, self.cuda
        shape = (total, c.block_size, c.kv_heads, c.head_dim)
        values = cuda.random(*shape, dtype=torch.float32, seed=seed)
        scale = None
        if c.float8:
            scale = torch.linspace(0.25, 0.5, c.kv_heads).to(cuda.device)
            cache = to_float8(values / scale[:, None])
        else:
            cache = values.to(c.dtype)
        flat = cache.view(torch.uint8)
        used = torch.zeros(total, c.block_size, dtype=torch.bool)
        for table, n in zip(self.block_tables.cpu(), c.seq_lens, strict=True):
            at = torch.arange(n)
            used[table[at // c.block_size], at % c.block_size] = True
        flat[~used.to(cuda.device)] = 0xFF
        if c.head_major:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        if c.blocks_before:
            memory = cache.new_empty(c.blocks_before + total, *cache.shape[1:])
            cache = memory[c.blocks_before :].copy_(cache)
            return memory, scale
        return cache, scale

    def run(self) -> torch.Tensor:
        c = self.case
        self.plan.plan(
            torch.tensor(self.starts), torch.tensor(c.seq_lens, dtype=torch.int32), self.plan_buffer
        )
        on_device = self.plan_buffer.to(self.cuda.device)
        out = self.cuda.poisoned(len(self.q), c.heads * c.head_dim, dtype=c.dtype)

        def launch() -> None:
            self.cuda.ops.paged_attention(
                self.q,
                self.k,
                self.v,
                self.block_tables,
                self.plan,
                on_device,
                self.workspace,
                self.counters,
                out,
                scale=self.scale,
                sliding_window=c.window,
                soft_cap=c.soft_cap,
                alibi_slopes=self.slopes,
                k_scale=self.k_scale,
                v_scale=self.v_scale,
            )

        self.cuda.run(launch, out)
        assert not self.counters.any()
        rows = self.starts[-1]
        assert (out[rows:].view(torch.uint8) == 0xFF).all()  # padding, which nobody writes
        return out[:rows]

    def pad(self) -> None:
        """To the plan's maxima, with what must not be read."""
        limits, blocks = self.case.plan, self.block_tables
        wide = self.cuda.poisoned(limits["max_num_tokens"], self.q.shape[1], dtype=self.q.dtype)
        wide[: len(self.q)] = self.q
        self.q = wide
        blocks_each = -(-limits["max_seq_len"] // self.case.block_size)
        tables = torch.full((limits["max_num_seqs"], blocks_each), 1 << 30, dtype=torch.int32)
        tables[: blocks.shape[0], : blocks.shape[1]] = blocks
        self.block_tables = tables.to(self.cuda.device)

    def values(self, cache: torch.Tensor, scale: torch.Tensor | None, seq: int) -> torch.Tensor:
        """[seq_len, heads, head_dim] in float64."""
        c = self.case
        x = cache[self.block_tables[seq].long()].flatten(0, 1)[: c.seq_lens[seq]]
        x = from_float8(x) * scale.double()[:, None] if scale is not None else x.double()
        return x.repeat_interleave(c.heads // c.kv_heads, dim=1)

    def reference(self) -> torch.Tensor:
        c = self.case
        out = torch.empty(self.starts[-1], c.heads * c.head_dim, dtype=torch.float64)
        for seq, length in enumerate(c.seq_lens):
            rows = slice(self.starts[seq], self.starts[seq + 1])
            q = self.q[rows].double().unflatten(1, (c.heads, c.head_dim))
            k, v = self.values(self.k, self.k_scale, seq), self.values(self.v, self.v_scale, seq)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            if c.soft_cap:
                scores = c.soft_cap * torch.tanh(scores / c.soft_cap)
            at = torch.arange(length, device=scores.device)
            age = at[length - len(q) :, None] - at[None, :]
            if self.slopes is not None:
                scores = scores - self.slopes.double()[:, None, None] * age
            hidden = age < 0
            if c.window:
                hidden |= age >= c.window
            weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v).flatten(1).cpu()
        return out


def check(cuda: Kernels, case: Case) -> torch.Tensor:
    attention = Attention(cuda, case)
    out = attention.run()
    assert relative_error(out, attention.reference()) < TOLERANCE[case.dtype]
    return out


TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
DECODE = Case(new_tokens=[1, 1, 1], seq_lens=[1, 37, 300])
PREFILL = Case(new_tokens=[5, 1, 70, 0], seq_lens=[5, 40, 133, 3])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float16},
    {"float8": True},
    {"float8": True, "dtype": torch.float16},
    {"head_dim": 80},
    {"head_dim": 96, "dtype": torch.float16, "head_major": True},
    {"head_dim": 112},
    {"head_dim": 128},
    {"head_dim": 256},
    {"head_dim": 80, "float8": True},
    {"head_dim": 128, "float8": True, "dtype": torch.float16},
    {"head_dim": 256, "float8": True},
    {"heads": 3, "kv_heads": 3},  # MHA
    {"heads": 14, "kv_heads": 2},  # groups of 7
    {"heads": 18, "kv_heads": 1},  # MQA, more heads than an MMA has rows
    {"block_size": 32, "head_major": True},
    {"block_size": 48},
    {"window": 1},
    {"window": 33},
    {"window": 4096},
    {"sharpness": 30.0},  # what is greatest changes often, and by much
    {"sharpness": 30.0, "head_dim": 256, "float8": True},
    {"soft_cap": 2.0},
    {"alibi": True},
    {"alibi": True, "window": 20, "soft_cap": 5.0, "heads": 6, "kv_heads": 2, "float8": True},
]


FLOAT32: list[dict[str, Any]] = [
    {},
    {"head_dim": 80, "head_major": True, "heads": 14, "kv_heads": 2},
    {"head_dim": 256, "heads": 2, "kv_heads": 1, "block_size": 48},
    {"window": 33, "soft_cap": 2.0, "alibi": True},
    {"sharpness": 30.0},
]


def name(variant: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in variant.items()) or "plain"


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_decode(cuda: Kernels, variant: dict[str, Any]) -> None:
    check(cuda, replace(DECODE, **variant))


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_prefill_and_decode_together(cuda: Kernels, variant: dict[str, Any]) -> None:
    check(cuda, replace(PREFILL, **variant))


@pytest.mark.parametrize("variant", FLOAT32, ids=name)
def test_float32(cuda: Kernels, variant: dict[str, Any]) -> None:
    for case in (DECODE, PREFILL):
        check(cuda, replace(case, dtype=torch.float32, **variant))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("float8", [False, True])
def test_less_shared_memory(cuda: Kernels, head_dim: int, float8: bool) -> None:
    """What a block has on sm_86 and sm_89; the results are the same to the bit."""
    case = replace(PREFILL, heads=2, head_dim=head_dim, float8=float8)
    case = replace(case, new_tokens=[1, 33], seq_lens=[300, 50])
    want = check(cuda, case)
    with cuda.shared_memory(99 << 10):
        assert torch.equal(check(cuda, case).view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("length", [2, 15, 16, 17, 63, 64, 65, 127, 129])
def test_odd_lengths(cuda: Kernels, length: int) -> None:
    check(cuda, replace(DECODE, new_tokens=[1, length], seq_lens=[length, length]))


def test_nothing_to_do(cuda: Kernels) -> None:
    assert check(cuda, Case(new_tokens=[], seq_lens=[])).shape[0] == 0


def test_blocks_that_sequences_share(cuda: Kernels) -> None:
    attention = Attention(cuda, replace(PREFILL, new_tokens=[1, 20], seq_lens=[60, 60]))
    attention.block_tables[1] = attention.block_tables[0]
    assert relative_error(attention.run(), attention.reference()) < 1e-2


def test_a_long_sequence_is_split(cuda: Kernels) -> None:
    case = replace(DECODE, new_tokens=[1, 1], seq_lens=[1500, 3], num_multiprocessors=16)
    attention = Attention(cuda, case)
    assert relative_error(attention.run(), attention.reference()) < 1e-2
    assert attention.plan.num_decode_items > 8


def test_one_plan_and_fixed_buffers_for_changing_lengths(cuda: Kernels) -> None:
    """What a CUDA graph needs: the same buffers and grids, another plan in them."""
    limits = {"max_num_seqs": 6, "max_num_tokens": 64, "max_seq_len": 512}
    case = replace(DECODE, fixed_grid=True, plan=limits)
    attention = Attention(cuda, case)
    for new_tokens, lens in [([1, 1, 1], [1, 37, 300]), ([1, 30, 1], [64, 30, 5]), ([1], [200])]:
        step = Attention(cuda, replace(case, new_tokens=new_tokens, seq_lens=lens))
        step.plan, step.plan_buffer = attention.plan, attention.plan_buffer
        step.workspace, step.counters = attention.workspace, attention.counters
        want = step.reference()
        step.pad()
        assert relative_error(step.run(), want) < 1e-2


def test_a_plan_for_decoding_alone(cuda: Kernels) -> None:
    limits = {"max_num_seqs": 5, "max_num_tokens": 5, "max_seq_len": 512}
    case = replace(DECODE, fixed_grid=True, decode_only=True, plan=limits)
    attention = Attention(cuda, case)
    both = Attention(cuda, replace(case, decode_only=False))
    want = attention.reference()
    for each in (attention, both):
        each.pad()
    got = attention.run()
    assert relative_error(got, want) < 1e-2
    assert torch.equal(got.view(torch.int16), both.run().view(torch.int16))
    assert attention.plan.plan_size < both.plan.plan_size  # without room for prefill
    with pytest.raises(ValueError, match="query_start_loc has 2 new tokens of a sequence"):
        Attention(cuda, replace(case, new_tokens=[1, 2], seq_lens=[5, 5])).run()


def plan_error(cuda: Kernels, message: str, starts: list[int], lens: list[int]) -> None:
    plan = cuda.ops.AttentionPlan(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_num_seqs=2,
        max_num_tokens=8,
        max_seq_len=100,
        num_multiprocessors=4,
    )
    with pytest.raises(ValueError, match=message):
        plan.plan(
            torch.tensor(starts),
            torch.tensor(lens),
            torch.zeros(plan.plan_size, dtype=torch.int32),
        )


def test_errors_name_the_argument(cuda: Kernels) -> None:
    plan_error(cuda, "seq_lens has 3 sequences", [0, 1, 2, 3], [1, 1, 1])
    plan_error(cuda, "query_start_loc must have one", [0, 1], [1, 1])
    plan_error(cuda, "seq_lens holds 101", [0, 1], [101])
    plan_error(cuda, "seq_lens holds 1 for 2", [0, 2], [1])
    plan_error(cuda, "query_start_loc must not descend", [0, 2, 1], [2, 2])
    plan_error(cuda, "more than max_num_tokens", [0, 9], [9])
    plan_error(cuda, "query_start_loc must begin with 0", [1, 2], [1])
    for change, message in [
        ({"head_dim": 72}, "head_dim must"),
        ({"heads": 5}, "num_heads must"),
        ({"plan": {"max_num_seqs": 0}}, "max_num_seqs must"),
    ]:
        with pytest.raises(ValueError, match=message):
            Attention(cuda, replace(DECODE, **change))  # type: ignore[arg-type]
    attention = Attention(cuda, DECODE)
    attention.workspace = attention.workspace[1:]
    with pytest.raises(ValueError, match="workspace has"):
        attention.run()
    attention = Attention(cuda, DECODE)
    attention.workspace = torch.cat((attention.workspace, attention.workspace[:1]))[1:]
    with pytest.raises(ValueError, match="workspace must begin on 16 bytes"):
        attention.run()
    attention = Attention(cuda, DECODE)
    attention.scale = 0.0
    with pytest.raises(ValueError, match="scale must be positive"):
        attention.run()
    attention = Attention(cuda, replace(DECODE, float8=True, dtype=torch.float32))
    with pytest.raises(ValueError, match="q is float32: with a float8 cache, bfloat16"):
        attention.run()
    attention = Attention(cuda, DECODE)
    attention.q = attention.q.half()
    with pytest.raises(ValueError, match=r"q must be of the type of the cache|out must be"):
        attention.run()


def test_sizes_are_the_plan_s(cuda: Kernels) -> None:
    """Else rows would be left as they are, or read where there are none."""
    limits = {"max_num_seqs": 5, "max_num_tokens": 7, "max_seq_len": 400}
    fixed = replace(DECODE, fixed_grid=True, plan=limits)
    for case, q, rows, blocks in ((DECODE, 3, 3, 19), (fixed, 7, 5, 25)):
        plan = r"the plan \(fixed_grid\) is for" if case.fixed_grid else "the plan is for"
        for change, message in [
            (("q", lambda x: x[1:]), f"^q has {q - 1} rows, {plan} {q} tokens"),
            (("q", lambda x: x.repeat(2, 1)), f"^q has {2 * q} rows, {plan} {q} tokens"),
            (
                ("block_tables", lambda x: x[1:]),
                f"^block_tables has {rows - 1} rows, {plan} {rows} sequences",
            ),
            (("block_tables", lambda x: x.repeat(2, 1)), f"^block_tables has {2 * rows} rows"),
            (
                ("block_tables", lambda x: x[:, 1:]),
                f"^block_tables has {blocks - 1} blocks a row, {plan} .* which are {blocks}",
            ),
            (("block_tables", lambda x: x.long()), "^block_tables must be int32"),
        ]:
            attention = Attention(cuda, case)
            if case.fixed_grid:
                attention.pad()
            name, changed = change
            setattr(attention, name, changed(getattr(attention, name)))
            with pytest.raises(ValueError, match=message):
                attention.run()
