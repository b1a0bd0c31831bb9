"""Batch-invariant PagedAttention: a row's bits depend on its query and its KV alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from cuda_kernels import Kernels, relative_error
from test_cuda_attention import TOLERANCE, Attention, Case, check, name

torch = pytest.importorskip("torch")

PIECE = 512  # tokens
FEW_ROWS = 16  # of a tile, of sequences with few rows
RUN = ("seq", "tile", "first", "end", "pieces", "length", "slot_row", "counter")


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def rows_of(attention: Attention, seq: int, end: int, new: int, **changes: Any) -> torch.Tensor:
    """Bits of the `new` rows of a sequence before its token `end`, computed on their own."""
    case = replace(attention.case, new_tokens=[new], seq_lens=[end], **changes)
    alone = Attention(attention.cuda, case)
    first = attention.starts[seq + 1] - (attention.case.seq_lens[seq] - end) - new
    alone.q, alone.k, alone.v = attention.q[first : first + new], attention.k, attention.v
    alone.block_tables = attention.block_tables[seq : seq + 1]
    return alone.run().view(torch.int16)


def rows_within(attention: Attention, seq: int, end: int, new: int) -> slice:
    last = attention.starts[seq + 1] - (attention.case.seq_lens[seq] - end)
    return slice(last - new, last)


# Many rows over three pieces, one, few in one tile, few in two.
BATCH = Case(
    new_tokens=[80, 1, 3, 15],
    seq_lens=[1100, 1190, 520, 600],
    batch_invariant=True,
    num_multiprocessors=8,
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"sharpness": 30.0, "dtype": torch.float16},
    {"heads": 6, "head_dim": 128, "float8": True, "window": 600},
    {"heads": 2, "head_dim": 256, "alibi": True},
    {"heads": 2, "kv_heads": 1, "head_dim": 96, "window": 40, "soft_cap": 5.0, "block_size": 48},
    {"heads": 2, "kv_heads": 1, "head_dim": 80, "float8": True, "dtype": torch.float16},
    {"heads": 18, "kv_heads": 1, "head_major": True},  # one token is two tiles
]


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_a_row_is_the_same_in_any_batch_and_chunk(cuda: Kernels, variant: dict[str, Any]) -> None:
    attention = Attention(cuda, replace(BATCH, **variant))
    together = attention.run()
    assert relative_error(together, attention.reference()) < TOLERANCE[torch.bfloat16]
    whole = together.view(torch.int16)
    for seq, end, new, multiprocessors in [
        (0, 1100, 1, 1),
        (0, 1025, 1, 64),
        (0, 1024, 1, 4),
        (0, 1090, 70, 64),
        (1, 1190, 1, 1),
        (2, 519, 2, 64),
        (3, 600, 15, 1),
        (3, 590, 5, 64),
    ]:
        alone = rows_of(attention, seq, end, new, num_multiprocessors=multiprocessors)
        assert torch.equal(alone, whole[rows_within(attention, seq, end, new)]), (seq, end, new)


def test_pieces_are_spread_over_blocks(cuda: Kernels) -> None:
    """Else few long sequences would leave most of the GPU idle."""
    case = replace(BATCH, new_tokens=[1], seq_lens=[5000], num_multiprocessors=132)
    plan = laid_out(cuda, case)
    assert [run["end"] - run["first"] for run in plan.few] == [1] * 10
    plan = laid_out(cuda, replace(case, new_tokens=[64], seq_lens=[1500]))
    assert len(plan.many) == 3


def test_a_prompt_in_chunks(cuda: Kernels) -> None:
    """At once, in chunks of any size, and token by token where pieces begin and end."""
    length = 1060
    case = replace(BATCH, new_tokens=[length], seq_lens=[length], heads=2, kv_heads=1)
    attention = Attention(cuda, case)
    at_once = attention.run().view(torch.int16)
    assert relative_error(at_once.view(torch.bfloat16), attention.reference()) < 1e-2
    end = 0
    for new in (1, 16, 17, 300, 178, 2, 510, 36):  # 512 and 1024 in the middle of chunks
        end += new
        rows = rows_of(attention, 0, end, new, num_multiprocessors=new % 7 + 1)
        assert torch.equal(rows, at_once[end - new : end]), (end, new)
    assert end == length
    for end in (1, 64, 511, 512, 513, 1024, 1025, 1060):
        assert torch.equal(rows_of(attention, 0, end, 1), at_once[end - 1 : end]), end


@pytest.mark.parametrize("new", [1, 12])
def test_pieces_are_folded_in_one_order(cuda: Kernels, new: int) -> None:
    """By one block as they come, or by the last of many: sums of pieces that nearly cancel, so that
    another order would show in 16 bits."""
    case = replace(BATCH, new_tokens=[new] * 2, seq_lens=[6 * PIECE, 4 * PIECE])
    case = replace(case, heads=16, kv_heads=1, sharpness=0.01, dtype=torch.float16)
    case = replace(case, num_multiprocessors=1)
    attention = Attention(cuda, case)
    blocks = PIECE // case.block_size
    for table in attention.block_tables.long():
        for piece in range(math.ceil(max(case.seq_lens) / PIECE)):
            of_piece = table[piece * blocks : (piece + 1) * blocks]
            attention.v[of_piece] += 8.0 if piece % 2 else -8.0
    out = attention.run()
    assert relative_error(out, attention.reference()) < 1e-2
    for seq, length in enumerate(case.seq_lens):
        for multiprocessors in (2, 64):
            rows = rows_of(attention, seq, length, new, num_multiprocessors=multiprocessors)
            whole = out[rows_within(attention, seq, length, new)].view(torch.int16)
            assert torch.equal(rows, whole), (seq, multiprocessors)


def test_the_order_of_sequences_and_where_blocks_lie(cuda: Kernels) -> None:
    attention = Attention(cuda, BATCH)
    bits = attention.run().view(torch.int16)
    parts = [bits[attention.starts[i] : attention.starts[i + 1]] for i in range(4)]
    queries = [attention.q[attention.starts[i] : attention.starts[i + 1]] for i in range(4)]
    for order, block_size in (([3, 1, 0, 2], 16), ([1, 1, 2, 0, 3, 1], 48)):
        lens = [BATCH.seq_lens[i] for i in order]
        new = [BATCH.new_tokens[i] for i in order]
        case = replace(BATCH, new_tokens=new, seq_lens=lens, block_size=block_size)
        other = Attention(cuda, case)
        other.q = torch.cat([queries[i] for i in order])
        for to, table in enumerate(order):
            for cache, there in ((attention.k, other.k), (attention.v, other.v)):
                kv = cache[attention.block_tables[table].long()].flatten(0, 1)[: lens[to]]
                for at in range(0, lens[to], block_size):
                    part = kv[at : at + block_size]
                    there[other.block_tables[to, at // block_size], : len(part)] = part
        want = torch.cat([parts[i] for i in order])
        assert torch.equal(other.run().view(torch.int16), want)


def test_blocks_that_sequences_share(cuda: Kernels) -> None:
    case = replace(BATCH, new_tokens=[1, 40, 40], seq_lens=[1060, 1060, 1060])
    attention = Attention(cuda, case)
    attention.block_tables[1] = attention.block_tables[0]
    attention.block_tables[2] = attention.block_tables[0]
    attention.q[1:41] = attention.q[41:81]
    attention.q[0] = attention.q[40]
    out = attention.run()
    assert relative_error(out, attention.reference()) < 1e-2
    bits = out.view(torch.int16)
    assert torch.equal(bits[1:41], bits[41:])
    assert torch.equal(bits[0], bits[40])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("float8", [False, True])
def test_less_shared_memory(cuda: Kernels, head_dim: int, float8: bool) -> None:
    """What a block has on sm_86 and sm_89."""
    case = replace(BATCH, heads=2, kv_heads=1, head_dim=head_dim, float8=float8)
    case = replace(case, new_tokens=[1, 3], seq_lens=[530, 200])
    want = check(cuda, case)
    with cuda.shared_memory(99 << 10):
        assert torch.equal(check(cuda, case).view(torch.int16), want.view(torch.int16))


def test_windows_that_hide_whole_runs(cuda: Kernels) -> None:
    """Pieces, and whole blocks' work, that no row of a tile sees, or only some rows do."""
    for window in (1, 100, 513):
        for new in ([1], [9], [60]):
            case = replace(BATCH, new_tokens=new, seq_lens=[1600], window=window, heads=2)
            case = replace(case, kv_heads=1, num_multiprocessors=64)
            attention = Attention(cuda, case)
            out = attention.run()
            assert relative_error(out, attention.reference()) < 1e-2
            alone = rows_of(attention, 0, 1600, 1, num_multiprocessors=1)
            assert torch.equal(alone, out[-1:].view(torch.int16))


@pytest.mark.parametrize("decode_only", [False, True])
def test_one_plan_and_fixed_buffers_for_changing_lengths(cuda: Kernels, decode_only: bool) -> None:
    """What a CUDA graph needs: the same buffers and grids, another plan in them."""
    limits = {"max_num_seqs": 5, "max_num_tokens": 64, "max_seq_len": 1500}
    case = replace(BATCH, fixed_grid=True, decode_only=decode_only, plan=limits)
    steps = [([1, 1, 1], [1, 537, 1300]), ([1, 1], [64, 1025]), ([1], [1500]), ([1] * 5, [600] * 5)]
    if not decode_only:
        steps += [([1, 40, 2], [64, 1200, 513]), ([60], [1100])]
    first = Attention(cuda, replace(case, new_tokens=[1], seq_lens=[1]))
    for new_tokens, lens in steps:
        step = replace(case, new_tokens=new_tokens, seq_lens=lens)
        eager = replace(step, fixed_grid=False, decode_only=False, plan={}, num_multiprocessors=3)
        want = check(cuda, eager)
        fixed = Attention(cuda, step)
        fixed.plan, fixed.plan_buffer = first.plan, first.plan_buffer
        fixed.workspace, fixed.counters = first.workspace, first.counters
        fixed.pad()
        assert torch.equal(fixed.run().view(torch.int16), want.view(torch.int16))


def test_float32_is_so_anyway(cuda: Kernels) -> None:
    case = replace(BATCH, dtype=torch.float32, heads=2, kv_heads=1, new_tokens=[20, 1])
    attention = Attention(cuda, replace(case, seq_lens=[600, 40]))
    whole = attention.run().view(torch.int16)
    for end, new in ((600, 1), (599, 7)):
        rows = whole[rows_within(attention, 0, end, new)]
        assert torch.equal(rows_of(attention, 0, end, new), rows)


# ---- the plan


class LaidOut:
    """A step's plan, read from its buffer."""

    def __init__(self, case: Case, plan: Any, buffer: torch.Tensor, max_num_seqs: int) -> None:
        padded = [-(-n // 4) * 4 for n in (4, max_num_seqs + 1, *[max_num_seqs] * 3)]
        few_at, counts = sum(padded), buffer[:3].tolist()
        group = case.heads // case.kv_heads
        many_size = 128 if case.head_dim <= 128 else 64
        # The items of many rows lie behind room for all that there may be of few.
        self.few = self.runs(buffer[few_at:], counts[1])
        self.many = self.runs(buffer[few_at + 8 * plan.max_decode_items :], counts[2])
        self.group, self.tile_rows = group, {False: FEW_ROWS, True: many_size}

    def runs(self, items: torch.Tensor, count: int) -> list[dict[str, int]]:
        rows = items[: 8 * count].view(count, 8).tolist()
        return [dict(zip(RUN, row, strict=True)) for row in rows]


def laid_out(cuda: Kernels, case: Case) -> LaidOut:
    limits = {
        "max_num_seqs": max(1, len(case.seq_lens)),
        "max_num_tokens": max(1, sum(case.new_tokens)),
        "max_seq_len": max([1, *case.seq_lens]),
    } | case.plan
    plan = cuda.ops.AttentionPlan(
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_multiprocessors=case.num_multiprocessors,
        batch_invariant=True,
        **limits,
    )
    buffer = torch.full((plan.plan_size,), -7, dtype=torch.int32)
    starts = torch.tensor([0, *case.new_tokens]).cumsum(0)
    plan.plan(starts, torch.tensor(case.seq_lens), buffer)
    step = LaidOut(case, plan, buffer, limits["max_num_seqs"])
    check_plan(case, plan, step, limits)
    return step


def check_plan(case: Case, plan: Any, step: LaidOut, limits: dict[str, int]) -> None:
    """Every piece of every tile once, and slots that nobody else has, within the workspace."""
    pieces = math.ceil(limits["max_seq_len"] / PIECE)
    slots = 0
    if pieces > 1:
        slots = limits["max_num_tokens"] + min(4096, limits["max_num_tokens"] * pieces)
    assert plan.workspace_size == slots * case.heads * (case.head_dim + 2)
    group = step.group
    wanted: dict[bool, dict[tuple[int, int], int]] = {False: {}, True: {}}
    for seq, (new, length) in enumerate(zip(case.new_tokens, case.seq_lens, strict=True)):
        many = new > 1 and new * group > 2 * FEW_ROWS
        for tile in range(math.ceil(new * group / step.tile_rows[many])):
            last = min(new, math.ceil((tile + 1) * step.tile_rows[many] / group))
            wanted[many][seq, tile] = math.ceil((length - new + last) / PIECE)
    for many, runs in ((False, step.few), (True, step.many)):
        lengths = [run["end"] - run["first"] for run in runs]
        assert lengths == sorted(lengths, reverse=True)  # no block begins a long one late
        seen: dict[tuple[int, int], list[int]] = {}
        taken: list[tuple[int, int]] = []
        counters = set()
        for run in runs:
            key = run["seq"], run["tile"]
            seen.setdefault(key, []).extend(range(run["first"], run["end"]))
            assert run["first"] % run["length"] == 0
            assert run["pieces"] == wanted[many][key]
            if run["first"] > 0 or (run["pieces"] <= run["length"] and not many):
                continue
            if run["pieces"] == 1:
                continue
            rows = min(step.tile_rows[many], case.new_tokens[run["seq"]] * group)
            rows = min(
                rows, case.new_tokens[run["seq"]] * group - run["tile"] * step.tile_rows[many]
            )
            size = rows * max(1, run["pieces"] - run["length"] + 1)
            taken.append((run["slot_row"], run["slot_row"] + size))
            if run["pieces"] > run["length"]:
                assert run["counter"] not in counters
                counters.add(run["counter"])
        assert {key: sorted(x) for key, x in seen.items()} == {
            key: list(range(n)) for key, n in wanted[many].items()
        }
        taken.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert all(end <= slots * group for _, end in taken)
        assert all(counter < plan.num_counters / case.kv_heads for counter in counters)


def test_plans_cover_everything_once(cuda: Kernels) -> None:
    generator = torch.Generator().manual_seed(1)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(200):
        lens = [1 + below(1 << (4 + below(14))) for _ in range(1 + below(20))]
        new = [min(length, 1 if below(2) else 1 + below(600)) for length in lens]
        kv_heads = 1 << below(4)
        laid_out(
            cuda,
            Case(
                new_tokens=new,
                seq_lens=lens,
                heads=kv_heads * (1 + below(20)),
                kv_heads=kv_heads,
                head_dim=[64, 80, 128, 256][below(4)],
                num_multiprocessors=1 + below(140),
            ),
        )


def test_runs_are_longer_where_the_workspace_is_short(cuda: Kernels) -> None:
    """Of 512 tokens, that is in 16 tiles, and 8 KV heads; two blocks of each multiprocessor."""
    case = Case(new_tokens=[512], seq_lens=[8192], heads=32, kv_heads=8, head_dim=128)
    step = laid_out(cuda, replace(case, num_multiprocessors=132))
    assert {run["length"] for run in step.many} == {8}  # 4 would make an average block's share
    assert len(step.many) == 32
    roomy = laid_out(cuda, replace(case, num_multiprocessors=132, plan={"max_num_tokens": 4096}))
    assert {run["length"] for run in roomy.many} == {4}
    step = laid_out(cuda, replace(case, seq_lens=[131072], num_multiprocessors=132))
    assert len(step.many) == 16
