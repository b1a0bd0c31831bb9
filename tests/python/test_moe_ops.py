"""Mixtures of experts against float64 numpy. test_ops.py runs this file once more for each lower
instruction set."""

import math

import numpy as np
import pytest

from fastpage import _C
from fastpage._C import ops

FORMATS = ["float32", "bfloat16", "float16", "int8", "q4_1"]
MULTIPLIES_BF16 = ops.cpu_isa() in ("avx512_bf16", "amx")
CASES = [
    # rows, experts, top_k, hidden, intermediate
    (1, 1, 1, 8, 8), (0, 4, 2, 16, 8), (1, 8, 2, 33, 70), (2, 5, 5, 20, 17), (9, 7, 3, 64, 64),
    (40, 4, 1, 50, 96), (70, 3, 2, 96, 128), (230, 2, 1, 40, 64), (11, 128, 8, 64, 32),
    (500, 4, 2, 16, 40),
]  # fmt: skip


class Experts:
    """Random experts: packed, and the values that are stored."""

    def __init__(self, rng, pool, num_experts, hidden, intermediate, fmt="float32"):
        self.packed, self.values = [], []
        for _ in range(num_experts):
            pair = [
                ops.PackedWeight(matrix / np.sqrt(matrix.shape[1], dtype=np.float32), fmt, pool)
                for matrix in (
                    rng.standard_normal((2 * intermediate, hidden), np.float32),
                    rng.standard_normal((hidden, intermediate), np.float32),
                )
            ]
            self.packed.append(tuple(pair))
            self.values.append(
                [ops.embed(pool, np.arange(p.out_features), p).astype(np.float64) for p in pair]
            )


def chosen(logits, top_k, renormalize):
    """[rows, experts]: the weight of each expert, 0 if it is not chosen."""
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    mask = np.zeros_like(p)
    np.put_along_axis(mask, np.argsort(-logits, axis=1, kind="stable")[:, :top_k], 1, axis=1)
    p *= mask
    return p / p.sum(1, keepdims=True) if renormalize else p


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference(x, logits, values, top_k, renormalize, activate=silu):
    weights = chosen(logits, top_k, renormalize)
    y = np.zeros(x.shape)
    for e, (gate_up, down) in enumerate(values):
        gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
        y += weights[:, e : e + 1] * ((activate(gate) * up) @ down.T)
    return y


def relative_error(got, want):
    assert got.dtype == np.float32 and got.shape == want.shape
    return np.abs(got - want).max(initial=0) / (np.abs(want).max(initial=0) + 1e-30)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moe(pools, case, fmt):
    rows, num_experts, top_k, hidden, intermediate = case
    rng = np.random.default_rng(list(case))
    experts = Experts(rng, pools[1], num_experts, hidden, intermediate, fmt)
    x = rng.standard_normal((rows, hidden), np.float32)
    logits = rng.standard_normal((rows, num_experts), np.float32)
    for renormalize in (False, True):
        want = reference(x, logits, experts.values, top_k, renormalize)
        for activations in ("float32", "quantized"):
            results = [
                ops.moe(
                    pool,
                    x,
                    logits,
                    experts.packed,
                    top_k,
                    renormalize,
                    activations=activations,
                )
                for pool in pools
            ]
            # Activations that are rounded to the weights' precision: where the CPU multiplies bf16,
            # to that of bf16 weights too.
            rounded = ("int8", "q4_1", "bfloat16") if MULTIPLIES_BF16 else ("int8", "q4_1")
            exact = activations == "float32" or fmt not in rounded
            assert relative_error(results[0], want) < (5e-6 if exact else 4e-2)
            for got in results[1:]:
                np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("intermediate", [64, 50])  # fused, or not
def test_gelu(pool, intermediate):
    rng = np.random.default_rng(0)
    experts = Experts(rng, pool, 4, 40, intermediate)
    x = rng.standard_normal((20, 40), np.float32)
    logits = rng.standard_normal((20, 4), np.float32)
    want = reference(x, logits, experts.values, 2, False, gelu)
    got = ops.moe(pool, x, logits, experts.packed, 2, kind="gelu_and_mul")
    assert relative_error(got, want) < 5e-6


@pytest.mark.parametrize("intermediate", [64, 50])  # the activation fused, or not
@pytest.mark.parametrize("fmt", FORMATS)
def test_row_does_not_depend_on_batch(pools, fmt, intermediate):
    rng = np.random.default_rng(1)
    experts = Experts(rng, pools[1], 6, 160, intermediate, fmt)
    x = rng.standard_normal((230, 160), np.float32)
    logits = rng.standard_normal((230, 6), np.float32)
    whole = ops.moe(pools[2], x, logits, experts.packed, 2)
    for rows in [1, 2, 3, 4, 5, 6, 7, 9, 13, 24, 64, 200]:
        at = int(rng.integers(0, 230 - rows))
        part = slice(at, at + rows)
        got = ops.moe(pools[rows % 2], x[part], logits[part], experts.packed, 2)
        np.testing.assert_array_equal(got, whole[part])


def test_more_rows_than_the_scratch_holds(pool):
    """They are computed one part after the other, which must not show."""
    rng = np.random.default_rng(2)
    experts = Experts(rng, pool, 2, 32, 64, "bfloat16")
    rows = 100_000
    assert rows * 2 * (32 + 64) > 16 * 2**20
    x = rng.standard_normal((rows, 32), np.float32)
    logits = rng.standard_normal((rows, 2), np.float32)
    whole = ops.moe(pool, x, logits, experts.packed, 2)
    edge = 16 * 2**20 // (2 * (32 + 64))
    for part in (slice(0, 5), slice(edge - 3, edge + 8), slice(rows - 2, rows)):
        got = ops.moe(pool, x[part], logits[part], experts.packed, 2)
        np.testing.assert_array_equal(got, whole[part])


def test_ties_go_to_the_first(pool):
    rng = np.random.default_rng(3)
    experts = Experts(rng, pool, 6, 16, 24)
    x = rng.standard_normal((4, 16), np.float32)
    logits = np.array(
        [[0, 0, 0, 0, 0, 0], [1, 2, 1, 2, 1, 2], [-1, 0, 5, 0, 5, 0], [3, 3, 3, 9, 3, 3]],
        np.float32,
    )
    picks = [[0, 1], [1, 3], [2, 4], [0, 3]]
    got = ops.moe(pool, x, logits, experts.packed, 2, True)
    for row, (a, b) in enumerate(picks):
        alone = [
            ops.moe(pool, x[row : row + 1], np.zeros((1, 1), np.float32), [experts.packed[e]], 1)
            for e in (a, b)
        ]
        weights = chosen(logits, 2, True)[row, [a, b]]
        want = weights[0] * alone[0] + weights[1] * alone[1]
        np.testing.assert_allclose(got[row : row + 1], want, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_stays_in_its_row(pool):
    rng = np.random.default_rng(4)
    experts = Experts(rng, pool, 5, 64, 64)
    x = rng.standard_normal((6, 64), np.float32)
    logits = rng.standard_normal((6, 5), np.float32)
    want = ops.moe(pool, x, logits, experts.packed, 2)
    bad_x, bad_logits = x.copy(), logits.copy()
    bad_x[1, 7] = np.nan
    bad_logits[3] = np.nan
    bad_logits[4, :] = np.inf
    got = ops.moe(pool, bad_x, bad_logits, experts.packed, 2)
    np.testing.assert_array_equal(got[[0, 2, 5]], want[[0, 2, 5]])
    assert np.isnan(got[[1, 3, 4]]).all()


def test_extreme_logits(pool):
    """Far apart they leave one expert; the weights of the others vanish, and nothing overflows."""
    rng = np.random.default_rng(5)
    experts = Experts(rng, pool, 3, 16, 16)
    x = rng.standard_normal((3, 16), np.float32)
    logits = np.array([[3e38, -3e38, 0], [200, 0, 0], [-200, -400, -300]], np.float32)
    got = ops.moe(pool, x, logits, experts.packed, 2)
    first = ops.moe(pool, x, np.zeros((3, 1), np.float32), experts.packed[:1], 1)
    np.testing.assert_array_equal(got, first)


def test_errors_name_the_argument(pool):
    rng = np.random.default_rng(6)
    experts = Experts(rng, pool, 3, 16, 24).packed
    x, logits = np.ones((4, 16), np.float32), np.zeros((4, 3), np.float32)
    other = Experts(rng, pool, 1, 16, 23).packed[0]
    odd = (ops.PackedWeight(np.ones((47, 16), np.float32), "float32", pool), experts[0][1])
    for args, words in [
        ((x, logits[:3], experts, 1), "router_logits are 3 x 3, not 4 x 3"),
        ((x, logits, experts[:2], 1), "router_logits are 4 x 3, not 4 x 2"),
        ((x, logits[:, :0], [], 1), "no experts"),
        ((x, logits, experts, 0), "top_k is 0 of 3 experts"),
        ((x, logits, experts, 4), "top_k is 4 of 3 experts"),
        ((x[:, :15], logits, experts, 2), "expert 0 has gate_up 48 x 16 and down 16 x 24"),
        ((x, logits, [*experts[:2], other], 3), "expert 2 has gate_up 46 x 16"),
        ((x, logits, [odd, *experts[:2]], 3), "expert 0 has gate_up 47 x 16"),
        ((x, logits, [(e[1], e[0]) for e in experts], 3), "expert 0 has gate_up 16 x 24"),
    ]:
        with pytest.raises(_C.InvalidArgument, match=words):
            ops.moe(pool, *args)
    with pytest.raises(_C.InvalidArgument, match="the activation is not gated"):
        ops.moe(pool, x, logits, experts, 1, kind="silu")
