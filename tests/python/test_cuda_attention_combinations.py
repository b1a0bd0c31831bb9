"""PagedAttention with everything that can be combined, with the longest sequences and with caches
of more elements than 32 bits count. A GPU has all combinations, the emulation a sample."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from cuda_kernels import Kernels, relative_error
from test_cuda_attention import DECODE, PREFILL, TOLERANCE, Attention, Case

torch = pytest.importorskip("torch")

HEAD_DIMS = (64, 80, 96, 112, 128, 256)
HEADS = ((2, 2), (8, 2), (14, 2), (5, 1))  # query and KV heads: MHA, GQA, MQA
BLOCK_SIZES = (16, 32, 48)
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"alibi": True},
    {"window": 29},
    {"soft_cap": 3.0},
    {"alibi": True, "window": 29, "soft_cap": 3.0},
)
STEPS = (DECODE, PREFILL)
COMBINATIONS = list(itertools.product(HEADS, BLOCK_SIZES, MASKS, (False, True), STEPS))
EMULATED = 4  # of the combinations, for each head size and cache


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def check(cuda: Kernels, case: Case) -> None:
    """With either plan."""
    attention = Attention(cuda, case)
    want = attention.reference()
    for batch_invariant in (False, True):
        attention.new_plan(batch_invariant)
        error = relative_error(attention.run(), want)
        assert error < TOLERANCE[case.dtype], (error, batch_invariant, case)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_combinations(cuda: Kernels, head_dim: int, dtype: torch.dtype, float8: bool) -> None:
    combinations = COMBINATIONS
    if not cuda.is_gpu:
        seed = f"{head_dim} {dtype} {float8}"
        combinations = random.Random(seed).sample(COMBINATIONS, EMULATED)
    for (heads, kv_heads), block_size, masks, head_major, step in combinations:
        changes = {"heads": heads, "kv_heads": kv_heads, "block_size": block_size} | masks
        changes |= {"head_dim": head_dim, "dtype": dtype, "float8": float8}
        check(cuda, replace(step, head_major=head_major, **changes))


@pytest.mark.parametrize("float8", [False, True])
def test_lengths_up_to_128k(cuda: Kernels, float8: bool) -> None:
    """Beside short ones, decoded and in a chunk."""
    longest = 128 << 10 if cuda.is_gpu else 6000
    case = Case(
        new_tokens=[1, 1, 50, 1],
        seq_lens=[longest, 1, longest - 77, longest // 2 + 1],
        heads=8 if cuda.is_gpu else 2,
        kv_heads=2 if cuda.is_gpu else 1,
        head_dim=128,
        float8=float8,
        num_multiprocessors=132,
    )
    check(cuda, case)


@pytest.mark.parametrize("step", STEPS, ids=["decode", "prefill"])
@pytest.mark.parametrize("float8", [False, True])
def test_more_elements_than_32_bits_count(cuda: Kernels, float8: bool, step: Case) -> None:
    """4 GB each for keys and values, of which the emulation's are never touched."""
    elements = step.block_size * step.kv_heads * step.head_dim
    blocks_before = (1 << (32 if float8 else 31)) // elements
    check(cuda, replace(step, float8=float8, blocks_before=blocks_before))
