"""Every CPU op against float64 numpy, and the promise that a row's result depends on nothing else.

The tests run on the best instruction set of the machine, and once more in a process of their own
for each lower one.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from fastpage import _C
from fastpage._C import ops

RTOL = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}  # of values already rounded
DTYPES = ["float32", "bfloat16", "float16"]
ACTIVATIONS = ["quantized", "float32"]
BF16_ISAS = ["avx512_bf16", "amx"]  # where bf16 activations meet bf16 weights and caches
KV_DTYPES = [*DTYPES, "int8"]


def bf16_bits(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(x, dtype):
    """x as it is once stored as dtype, in float32."""
    if dtype == "bfloat16":
        return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)
    return x.astype(dtype).astype(np.float32)


def quantized(x):
    """int8 with a scale for each vector of the last axis, in the float32 steps of the kernels."""
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    integers = np.rint((x * inverse[..., None]).astype(np.float32)).astype(np.int8)
    return integers, largest / np.float32(127)


def assert_close(got, want, scale, rtol=2e-6):
    """scale: what the terms of the sum add up to in magnitude."""
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.all(np.isfinite(got))
    error = np.abs(got - want) / (np.asarray(scale) + 1e-30)
    assert error.size == 0 or error.max() <= rtol, f"relative error {error.max()}"


# ---------------------------------------------------------------- linear

LINEAR_SHAPES = [
    # rows, in, out
    (1, 1, 1), (0, 8, 8), (1, 576, 960), (2, 17, 33), (3, 31, 64), (5, 64, 31), (7, 100, 257),
    (12, 48, 32), (13, 576, 192), (25, 33, 65), (64, 130, 96), (193, 40, 50), (400, 16, 24),
    (4, 2500, 40), (30, 1100, 70), (1, 3000, 16),
]  # fmt: skip


def as_met(x, dtype, activations):
    """x as it meets weights of that type."""
    rounds = activations == "quantized" and dtype == "bfloat16" and ops.cpu_isa() in BF16_ISAS
    return rounded(x, dtype) if rounds else x


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear(pools, shape, dtype, activations):
    rows, n_in, n_out = shape
    rng = np.random.default_rng(hash(shape) % 2**32)
    given = rng.standard_normal((rows, n_in), np.float32)
    x = as_met(given, dtype, activations)
    w = rng.standard_normal((n_out, n_in), np.float32)
    bias = rng.standard_normal(n_out).astype(np.float32)
    want = x.astype(np.float64) @ rounded(w, dtype).astype(np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + 1
    results = []
    for pool in pools:
        packed = ops.PackedWeight(w, dtype, pool)
        assert (packed.in_features, packed.out_features, packed.format) == (n_in, n_out, dtype)
        assert packed.nbytes >= w.size * (4 if dtype == "float32" else 2)
        got = ops.linear(pool, given, packed, activations=activations)
        assert_close(got, want, scale)
        biased = ops.linear(pool, given, packed, bias, activations=activations)
        assert_close(biased, want + bias, scale + np.abs(bias))
        np.testing.assert_array_equal(biased, got + bias)
        out = np.empty_like(got)
        assert ops.linear(pool, given, packed, out=out, activations=activations) is out
        np.testing.assert_array_equal(out, got)
        results.append(got)
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_does_not_depend_on_batch(pools, dtype, activations):
    pool = pools[2]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((230, 1300), np.float32)
    w = ops.PackedWeight(rng.standard_normal((75, 1300), np.float32), dtype, pool)
    whole = ops.linear(pool, x, w, activations=activations)
    for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 23, 64, 200]:
        at = int(rng.integers(0, 230 - rows))
        got = ops.linear(pools[rows % 2], x[at : at + rows], w, activations=activations)
        np.testing.assert_array_equal(got, whole[at : at + rows])


@pytest.mark.skipif(ops.cpu_isa() not in BF16_ISAS, reason="bf16 is not multiplied here")
def test_linear_with_bf16_activations_rounds_them_to_nearest_even(pool):
    """Ties, infinities, NaN, denormals: against weights of 1, one in_feature a row."""
    values = np.array(
        [0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-8, 3.4e38,
         np.inf, -np.inf, np.nan, 1e-39, 2.0**-126, -1e-45], np.float32)  # fmt: skip
    n_in = 33
    w = ops.PackedWeight(np.ones((40, n_in), np.float32), "bfloat16", pool)
    for column in (0, 1, 31, 32):
        x = np.zeros((len(values), n_in), np.float32)
        x[:, column] = values
        want = rounded(values, "bfloat16")
        want[np.isnan(values)] = np.nan
        want[np.abs(values) < 2.0**-126] = 0  # denormals count as zero
        got = ops.linear(pool, x, w)
        np.testing.assert_array_equal(got, np.repeat(want[:, None], 40, 1))


@pytest.mark.skipif(ops.cpu_isa() != "avx512_bf16", reason="another instruction's order")
def test_linear_adds_products_of_bf16_in_the_order_of_the_manual(pool):
    """Pair by pair, the odd in_feature first, each product added exactly and rounded once."""
    rng = np.random.default_rng(12)
    x = rounded(rng.standard_normal((14, 70), np.float32), "bfloat16")
    w = rounded(rng.standard_normal((37, 70), np.float32), "bfloat16")
    want = np.zeros((14, 37), np.float32)
    for k in range(70):
        k ^= 1
        product = x[:, k, None].astype(np.longdouble) * w[None, :, k]
        want = (want + product).astype(np.float32)
    packed = ops.PackedWeight(w, "bfloat16", pool)
    np.testing.assert_array_equal(ops.linear(pool, x, packed), want)


def test_linear_takes_strided_rows_and_all_sources(pool):
    rng = np.random.default_rng(2)
    wide = rng.standard_normal((9, 100), np.float32)
    w = rng.standard_normal((40, 60)).astype(np.float32)
    packed = ops.PackedWeight(w[:, 10:50], "float32", pool)
    want = wide[:, 20:60].astype(np.float64) @ w[:, 10:50].astype(np.float64).T
    assert_close(ops.linear(pool, wide[:, 20:60], packed), want, 40.0)
    x = wide[:, :60]
    for dtype in DTYPES:  # stored as it came, it is packed without loss
        if dtype == "bfloat16":
            source = ops.PackedWeight(bf16_bits(w), dtype, pool, source_dtype="bfloat16")
        else:
            source = ops.PackedWeight(w.astype(dtype), dtype, pool)
        again = ops.PackedWeight(rounded(w, dtype), dtype, pool)
        np.testing.assert_array_equal(ops.linear(pool, x, source), ops.linear(pool, x, again))


def test_rounding_of_weights(pool):
    """float32 -> bf16 / fp16 and back, with ties, subnormals, infinities and NaN."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 1e-8, 2.0**-24, 2.0**-25,
         3 * 2.0**-25, 2.0**-14, 6.1e-5, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11,
         1 + 3 * 2.0**-11, 3.4e38], np.float32)  # fmt: skip
    x = np.concatenate([special, -special, bits.view(np.float32)])
    x = np.concatenate([x, (rng.standard_normal(4000) * 1e-5).astype(np.float32)])[None, :]
    for dtype in DTYPES:
        with np.errstate(over="ignore", invalid="ignore"):
            want = rounded(x, dtype)
        packed = ops.PackedWeight(np.ascontiguousarray(x.T), dtype, pool)
        ids = np.arange(x.size)
        finite = ~np.isnan(x[0])
        got = ops.embed(pool, ids, packed)[:, 0]
        np.testing.assert_array_equal(got[finite], want[0][finite])
        assert np.isnan(got[~finite]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(pools, dtype):
    rng = np.random.default_rng(4)
    table = rng.standard_normal((101, 77)).astype(np.float32)
    ids = rng.integers(0, 101, 300)
    want = rounded(table, dtype)[ids]
    for pool in pools:
        packed = ops.PackedWeight(table, dtype, pool)
        np.testing.assert_array_equal(ops.embed(pool, ids, packed), want)
        if dtype != "bfloat16":
            np.testing.assert_array_equal(ops.embed(pool, ids, table.astype(dtype)), want)
    assert ops.embed(pool, np.zeros(0, np.int64), packed).shape == (0, 77)


# ---------------------------------------------------------------- elementwise


@pytest.mark.parametrize("shape", [(0, 8), (1, 576), (3, 1), (5, 37), (64, 130), (200, 512)])
def test_rms_norm(pools, shape):
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape, np.float32) * 3
    rows, cols = shape
    for group in {cols, cols // 2 if cols % 2 == 0 else cols}:
        w = rng.standard_normal(group).astype(np.float32)
        grouped = x.astype(np.float64).reshape(rows, cols // group, group)
        want = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + 1e-5) * w
        want = want.reshape(shape)
        results = [ops.norm(pool, x, w, 1e-5, group=group) for pool in pools]
        for got in results:
            assert_close(got, want, np.abs(want) + 1e-6)
            np.testing.assert_array_equal(got, results[0])
        for i in range(rows):
            np.testing.assert_array_equal(
                ops.norm(pools[0], x[i : i + 1], w, 1e-5, group=group)[0], results[0][i]
            )


@pytest.mark.parametrize("shape", [(0, 8), (1, 576), (3, 1), (5, 37), (64, 130), (200, 512)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm(pools, shape, has_bias):
    rng = np.random.default_rng(15)
    # A mean far from zero: squares less the mean's square would lose the variance.
    x = (rng.standard_normal(shape) + 50).astype(np.float32)
    rows, cols = shape
    for group in {cols, cols // 2 if cols % 2 == 0 else cols}:
        for width in {group, cols}:
            w, b = rng.standard_normal((2, width)).astype(np.float32)
            grouped = x.astype(np.float64).reshape(rows, cols // group, group)
            centred = grouped - grouped.mean(-1, keepdims=True)
            want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
            want = want.reshape(rows, cols // width, width) * w + (b if has_bias else 0)
            bias = b if has_bias else None
            results = [ops.norm(p, x, w, 1e-3, bias, group, "layer") for p in pools]
            for got in results:
                assert_close(got, want.reshape(shape), 1.0, 1e-4)
                np.testing.assert_array_equal(got, results[0])


def gelu(x):
    return x * np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.ravel()]).reshape(x.shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


FUNCTIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activations(pool, kind):
    """From underflow to overflow, and densely where the approximations of erfc meet."""
    near = np.linspace(-5, 5, 4001)
    far = np.concatenate([-np.geomspace(1e-30, 40, 500), np.geomspace(1e-30, 3e38, 500), [0]])
    x = np.concatenate([near, far]).astype(np.float32)[None, :]
    want = FUNCTIONS[kind](x.astype(np.float64))
    np.testing.assert_allclose(ops.activate(pool, x, kind), want, rtol=6e-6, atol=1e-36)
    gated = np.concatenate([x, 2 * np.ones_like(x)], axis=1)
    finite = np.abs(want) < 1e38
    got = ops.activate(pool, gated, kind + "_and_mul")
    np.testing.assert_array_equal(got[finite], 2 * ops.activate(pool, x, kind)[finite])
    nan = np.full((1, 3), np.nan, np.float32)
    assert np.isnan(ops.activate(pool, nan, kind)).all()


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 33), (90, 700)])
def test_scale_clamp_soft_cap(pools, shape):
    x = (np.random.default_rng(8).standard_normal(shape) * 30).astype(np.float32)
    capped = 20 * np.tanh(x.astype(np.float64) / 20)
    for pool in pools:
        np.testing.assert_array_equal(ops.scale(pool, x, 0.3), x * np.float32(0.3))
        np.testing.assert_array_equal(ops.clamp(pool, x, 12.5), np.clip(x, -12.5, 12.5))
        assert_close(ops.soft_cap(pool, x, 20.0), capped, np.abs(capped), 2e-6)


@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("head_dim,rotary_dim", [(64, 64), (80, 32), (6, 2), (10, 6), (128, 128)])
def test_rotary(pools, style, head_dim, rotary_dim):
    rng = np.random.default_rng(6)
    heads, rows, half = 3, 70, rotary_dim // 2
    x = rng.standard_normal((rows, heads * head_dim), np.float32)
    positions = rng.integers(0, 500, rows)
    angles = np.arange(500)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    c = cos_sin[positions, None, :half].astype(np.float64)
    s = cos_sin[positions, None, half:].astype(np.float64)
    want = x.astype(np.float64).reshape(rows, heads, head_dim).copy()
    if style == "neox":
        first, second = slice(0, half), slice(half, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    x0, x1 = want[..., first].copy(), want[..., second].copy()
    want[..., first] = x0 * c - x1 * s
    want[..., second] = x1 * c + x0 * s
    results = [ops.rotary(pool, x, positions, cos_sin, head_dim, style) for pool in pools]
    for got in results:
        assert_close(got, want.reshape(x.shape), 4.0, 1e-6)
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 1536), (7, 33), (90, 700)])
def test_silu_add_gather(pools, shape):
    rng = np.random.default_rng(7)
    rows, cols = shape
    x = (rng.standard_normal((rows, 2 * cols)) * 20).astype(np.float32)
    gate, up = x[:, :cols].astype(np.float64), x[:, cols:].astype(np.float64)
    want = gate / (1 + np.exp(-gate)) * up
    for pool in pools:
        assert_close(ops.activate(pool, x, "silu_and_mul"), want, np.abs(want) + 1e-30, 2e-6)
        a, b = x[:, :cols], x[:, cols:]
        np.testing.assert_array_equal(ops.add(pool, a, b), a + b)
        indices = rng.integers(0, rows, 50) if rows else np.zeros(0, np.int32)
        np.testing.assert_array_equal(ops.gather_rows(pool, a, indices), a[indices])


def test_silu_at_the_ends(pool):
    gate = np.array([-3e38, -200, -88, -87.2, -1e-30, 0, 1e-30, 88, 200, 3e38], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None, :]
    want = gate.astype(np.float64) / (1 + np.exp(-np.clip(gate.astype(np.float64), -700, 700)))
    got = ops.activate(pool, x, "silu_and_mul")[0]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-35)


# ---------------------------------------------------------------- attention


class Sequences:
    """Random sequences in a paged cache, blocks shuffled; the first `shared` are common to all."""

    def __init__(self, rng, pool, lens, kv_heads, head_dim, dtype, block_size=16, shared=0):
        self.dtype, self.kv_heads, self.head_dim = dtype, kv_heads, head_dim
        self.block_size = block_size
        self.k = [rng.standard_normal((n, kv_heads * head_dim)).astype(np.float32) for n in lens]
        self.v = [rng.standard_normal((n, kv_heads * head_dim)).astype(np.float32) for n in lens]
        for n in range(1, len(lens)):
            common = min(shared * block_size, lens[0], lens[n])
            self.k[n][:common] = self.k[0][:common]
            self.v[n][:common] = self.v[0][:common]
        width = max(-(-n // block_size) for n in lens) + 1
        free = iter(rng.permutation(width * len(lens) + 3))
        self.tables = np.full((len(lens), width), -1, np.int32)
        for i, n in enumerate(lens):
            for b in range(-(-n // block_size)):
                can_share = i > 0 and b < shared and (b + 1) * block_size <= min(n, lens[0])
                self.tables[i, b] = self.tables[0, b] if can_share else next(free)
        self.cache = ops.KvCache(width * len(lens) + 3, kv_heads, head_dim, block_size, dtype)
        # Memory that holds no token may hold anything.
        nan = {"float32": np.nan, "int8": 0xFF}.get(dtype, 0x7FFF)
        self.cache.k[...] = nan
        self.cache.v[...] = nan
        for i, n in enumerate(lens):
            at = np.arange(n)
            slots = self.tables[i, at // block_size] * block_size + at % block_size
            ops.reshape_and_cache(pool, self.k[i], self.v[i], slots, self.cache)

    def stored(self, x):
        """Keys or values as the cache keeps them: [tokens, kv_heads, head_dim], float64."""
        x = x.reshape(-1, self.kv_heads, self.head_dim)
        if self.dtype != "int8":
            return rounded(x, self.dtype).astype(np.float64)
        integers, scales = quantized(x)
        return integers * scales[..., None].astype(np.float64)

    def reference(self, i, q, first, num_heads, scale, window=0, cap=0.0, slopes=None):
        """Float64 attention of q's rows, at positions from `first` on, over sequence i."""
        group, d = num_heads // self.kv_heads, self.head_dim
        k, v = self.stored(self.k[i]), self.stored(self.v[i])
        out = np.zeros((len(q), num_heads, d))
        for r, row in enumerate(q.astype(np.float64).reshape(len(q), num_heads, d)):
            position = first + r
            low = max(0, position + 1 - window) if window else 0
            for h in range(num_heads):
                s = k[low : position + 1, h // group] @ row[h] * scale
                if cap:
                    s = cap * np.tanh(s / cap)
                if slopes is not None:
                    s = s + slopes[h] * (np.arange(low, position + 1) - position)
                p = np.exp(s - s.max())
                out[r, h] = p / p.sum() @ v[low : position + 1, h // group]
        return out.reshape(len(q), num_heads * d)


ATTENTION_CASES = [
    # kv_heads, group, head_dim, dtype, block_size, window, cap[, alibi]
    (3, 3, 64, "bfloat16", 16, 0, 0.0),
    (2, 3, 64, "int8", 16, 0, 0.0),
    (1, 5, 128, "int8", 32, 0, 0.0, True),
    (2, 1, 20, "int8", 16, 60, 25.0),
    (1, 4, 64, "bfloat16", 16, 0, 0.0, True),
    (3, 1, 32, "float32", 16, 100, 0.0, True),
    (1, 1, 64, "float32", 16, 0, 0.0),
    (2, 7, 64, "float16", 32, 0, 0.0),
    (2, 4, 128, "bfloat16", 16, 0, 0.0),
    (1, 8, 80, "float32", 48, 0, 0.0),
    (2, 2, 8, "float32", 16, 0, 0.0),
    (1, 2, 24, "bfloat16", 16, 50, 0.0),
    (2, 1, 96, "float16", 16, 0, 30.0),
    (1, 3, 256, "bfloat16", 16, 130, 20.0),
    (2, 2, 5, "bfloat16", 16, 1, 0.0),
    (2, 3, 80, "bfloat16", 16, 0, 0.0),
    (1, 4, 96, "bfloat16", 32, 77, 0.0),
    (2, 5, 40, "bfloat16", 16, 0, 15.0),
    (1, 13, 72, "bfloat16", 16, 31, 0.0, True),
    (3, 1, 9, "bfloat16", 16, 0, 0.0),
    (1, 2, 10, "bfloat16", 16, 3, 0.0, True),
    (1, 1, 33, "bfloat16", 16, 2, 0.0),
    (1, 16, 32, "bfloat16", 64, 0, 0.0),
    (1, 130, 16, "float32", 16, 0, 0.0),
]


def alibi_slopes(heads):
    return np.float32(2) ** (-8 * np.arange(1, heads + 1, dtype=np.float32) / heads)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("activations", ["quantized", "float32"])
def test_paged_attention(pools, case, activations):
    kv_heads, group, head_dim, dtype, block_size, window, cap, *alibi = case
    rounds = activations == "quantized" and dtype == "bfloat16" and ops.cpu_isa() in BF16_ISAS
    rng = np.random.default_rng(8)
    lens = [1, 16, 17, 130, 300, 129, 45]
    new = [1, 16, 3, 1, 1, 129, 0]
    seqs = Sequences(rng, pools[1], lens, kv_heads, head_dim, dtype, block_size, shared=3)
    heads = kv_heads * group
    q = rng.standard_normal((sum(new), heads * head_dim)).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(new)])
    slopes = alibi_slopes(heads) if alibi else None
    options = (heads, 0.3, window, cap, slopes)
    exact = rounded(q * np.float32(0.3), "bfloat16") / 0.3 if rounds else q
    want = [
        seqs.reference(i, exact[start[i] : start[i + 1]], lens[i] - new[i], *options)
        for i in range(len(lens))
    ]
    args = (q, seqs.cache, start, np.array(lens), seqs.tables, *options)
    results = [ops.paged_attention(pool, *args, activations=activations) for pool in pools]
    # A probability is rounded by at most 2^-9 of it, and a result by as much of the values.
    largest = max(np.abs(v).max() for v in seqs.v)
    for got in results:
        assert_close(got, np.concatenate(want), *((largest, 2**-9) if rounds else (4.0, 3e-6)))
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.skipif(ops.cpu_isa() not in BF16_ISAS, reason="bf16 is not multiplied here")
def test_attention_over_a_bf16_cache_rounds_queries_and_probabilities(pool):
    """Of two tokens whose scores differ by the query's own rounding, and by e^-1."""
    cache = ops.KvCache(1, 1, 2, 16, "bfloat16")
    keys = np.array([[1, 0], [0, 1]], np.float32)
    values = np.array([[0, 1], [1, 0]], np.float32)
    ops.reshape_and_cache(pool, keys, values, np.arange(2), cache)
    q = np.array([[2 + 2.0**-7, 1]], np.float32)  # a tie, to even: 2
    args = (pool, q, cache, np.array([0, 1]), np.array([2]), np.array([[0]]), 1, 1.0)
    p = rounded(np.exp(np.array([-1, 0], np.float32)), "bfloat16")
    got = ops.paged_attention(*args)
    np.testing.assert_allclose(got[0], p / (1 + np.exp(-1.0)), rtol=1e-6)
    exact = np.exp([-1 - 2.0**-7, 0])
    got = ops.paged_attention(*args, activations="float32")
    np.testing.assert_allclose(got[0], exact / exact.sum(), rtol=1e-6)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_row_does_not_depend_on_chunks_or_batch(pools, case):
    kv_heads, group, head_dim, dtype, block_size, window, cap, *alibi = case
    rng = np.random.default_rng(9)
    lens = [290, 150]
    seqs = Sequences(rng, pools[1], lens, kv_heads, head_dim, dtype, block_size, shared=2)
    heads = kv_heads * group
    q = [rng.standard_normal((n, heads * head_dim)).astype(np.float32) for n in lens]

    def attend(pool, *chunks):
        """chunks: (sequence, first, last) of query tokens."""
        start = np.cumsum([0] + [b - a for _, a, b in chunks])
        return ops.paged_attention(
            pool,
            np.concatenate([q[i][a:b] for i, a, b in chunks]),
            seqs.cache,
            start,
            np.array([b for _, _, b in chunks]),
            seqs.tables[[i for i, _, _ in chunks]],
            heads, 0.3, window, cap, alibi_slopes(heads) if alibi else None,
        )  # fmt: skip

    whole = np.concatenate([attend(pools[0], (i, 0, n)) for i, n in enumerate(lens)])
    np.testing.assert_array_equal(attend(pools[2], (0, 0, 290), (1, 0, 150)), whole)
    for pool in pools:
        for size in (1, 23, 64):
            chunked = [attend(pool, (0, at, min(290, at + size))) for at in range(0, 290, size)]
            np.testing.assert_array_equal(np.concatenate(chunked), whole[:290])
        mixed = attend(pool, (1, 149, 150), (0, 100, 290), (1, 0, 149), (0, 99, 100))
        want = np.concatenate([whole[439:], whole[100:290], whole[290:439], whole[99:100]])
        np.testing.assert_array_equal(mixed, want)


SHARING_CASES = [
    # kv_heads, group, head_dim, dtype, block_size, window[, alibi]
    (3, 3, 64, "bfloat16", 16, 0),
    (1, 1, 32, "float32", 48, 0),
    (2, 4, 128, "int8", 256, 0),
    (2, 8, 24, "float16", 16, 300),
    (2, 3, 9, "float32", 16, 0, True),
    (4, 1, 64, "bfloat16", 16, 0, True),
]


@pytest.mark.parametrize("case", SHARING_CASES, ids=str)
def test_shared_prefixes_leave_no_trace(pools, case):
    """Whether block tables begin alike, and how far, must not be seen in the result."""
    kv_heads, group, head_dim, dtype, block_size, window, *alibi = case
    rng = np.random.default_rng(13)
    heads = kv_heads * group
    slopes = alibi_slopes(heads) if alibi else None
    # Two families that share their own prefixes, the second with a branch; all share two tiles.
    prefixes = {"a": 700, "b": 400, "bb": 900, "": 256}
    families = ["a", "b", "bb", "a", "", "bb", "b", "a", "bb", "", "a"] + ["bb"] * 20
    new = [1, 1, 1, 2, 1, 1, 40, 0, 1, 1, 1] + [1] * 20
    lens = [prefixes[f] + int(rng.integers(n + 1, 300)) for f, n in zip(families, new, strict=True)]
    width = -(-max(lens) // block_size)
    tables = np.full((len(lens), width), -1, np.int32)
    free = iter(rng.permutation(width * len(lens)))
    first = {}
    for i, family in enumerate(families):
        for b in range(-(-lens[i] // block_size)):
            end = (b + 1) * block_size
            names = [p for p in ("", family[:1], family) if end <= prefixes[p]]
            owner = first.get((names[0], b)) if names else None
            tables[i, b] = next(free) if owner is None else owner
            if names:
                first[names[0], b] = tables[i, b]
    cache = ops.KvCache(width * len(lens), kv_heads, head_dim, block_size, dtype)
    slots = np.arange(width * len(lens) * block_size)
    kv = rng.standard_normal((2, len(slots), kv_heads * head_dim)).astype(np.float32)
    ops.reshape_and_cache(pools[1], kv[0], kv[1], slots, cache)
    q = rng.standard_normal((sum(new), heads * head_dim)).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(new)])

    def attend(pool, seqs):
        """Of these sequences, in one batch."""
        rows = [q[start[i] : start[i + 1]] for i in seqs]
        at = np.cumsum([0] + [new[i] for i in seqs])
        out = ops.paged_attention(
            pool, np.concatenate(rows), cache, at, np.array([lens[i] for i in seqs]),
            tables[seqs], heads, 0.3, window, 0.0, slopes,
        )  # fmt: skip
        return [out[at[n] : at[n + 1]] for n in range(len(seqs))]

    alone = [attend(pools[0], [i])[0] for i in range(len(lens))]
    for pool in pools:
        for _ in range(4):
            seqs = rng.integers(0, len(lens), rng.integers(2, 2 * len(lens)))  # some twice
            for i, got in zip(seqs, attend(pool, seqs), strict=True):
                np.testing.assert_array_equal(got, alone[i])


def test_one_long_sequence_among_short_ones(pools):
    rng = np.random.default_rng(14)
    lens = [30, 2500, 100, 1]
    seqs = Sequences(rng, pools[0], lens, 2, 32, "bfloat16")
    q = rng.standard_normal((4, 4 * 32)).astype(np.float32)
    want = [seqs.reference(i, q[i : i + 1], lens[i] - 1, 4, 0.3) for i in range(4)]
    args = (q, seqs.cache, np.arange(5), np.array(lens), seqs.tables, 4, 0.3)
    results = [ops.paged_attention(pool, *args, activations="float32") for pool in pools]
    assert_close(results[0], np.concatenate(want), 4.0, 3e-6)
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


def test_window_needs_no_blocks_before_it(pool):
    rng = np.random.default_rng(10)
    seqs = Sequences(rng, pool, [400], 2, 64, "bfloat16")
    q = rng.standard_normal((20, 256)).astype(np.float32)
    args = (pool, q, seqs.cache, np.array([0, 20]), np.array([400]))
    want = ops.paged_attention(*args, seqs.tables, 4, 0.3, 100)
    tables = seqs.tables.copy()
    tables[0, : (400 - 20 - 99) // 16] = -1
    np.testing.assert_array_equal(ops.paged_attention(*args, tables, 4, 0.3, 100), want)


def granule(dtype, k, v):
    """16 tokens of one head, [16, head_dim] each, as the cache keeps them, in bytes."""
    if dtype == "int8":
        halves = []
        for x, transposed in ((k, True), (v, False)):
            integers, scales = quantized(x)
            laid_out = integers.T if transposed else integers
            halves.append(np.frombuffer(laid_out.tobytes() + scales.tobytes(), np.uint8))
        return halves
    store = {"float32": lambda x: x, "bfloat16": bf16_bits,
             "float16": lambda x: x.astype(np.float16).view(np.uint16)}[dtype]  # fmt: skip
    k, v = store(k), store(v)
    laid_out = k.T
    if dtype == "bfloat16":  # in pairs
        even = k.shape[1] // 2 * 2
        pairs = k[:, :even].reshape(16, -1, 2).transpose(1, 0, 2)
        laid_out = np.concatenate([pairs.ravel(), k[:, even:].ravel()])
    return [np.frombuffer(half.tobytes(), np.uint8) for half in (laid_out, v)]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size,head_dim", [(16, 20), (48, 20), (16, 5)])
def test_reshape_and_cache_and_copy_blocks(pools, dtype, block_size, head_dim):
    rng = np.random.default_rng(11)
    kv_heads, blocks = 3, 9
    for pool in pools:
        cache = ops.KvCache(blocks, kv_heads, head_dim, block_size, dtype)
        slots = rng.permutation(blocks * block_size)[:100].astype(np.int32)
        slots[::9] = -1
        k = rng.standard_normal((100, kv_heads * head_dim)).astype(np.float32)
        v = rng.standard_normal((100, kv_heads * head_dim)).astype(np.float32)
        k[1] = 0
        ops.reshape_and_cache(pool, k, v, slots, cache)
        tokens = np.zeros((2, blocks * block_size, kv_heads, head_dim), np.float32)
        written = slots >= 0
        tokens[:, slots[written]] = np.stack([k, v]).reshape(2, 100, kv_heads, -1)[:, written]
        tokens = tokens.reshape(2, blocks, block_size // 16, 16, kv_heads, head_dim)
        tokens = tokens.transpose(0, 1, 4, 2, 3, 5).reshape(2, -1, 16, head_dim)
        want = [granule(dtype, *halves) for halves in tokens.transpose(1, 0, 2, 3)]
        want_k, want_v = (
            np.concatenate(half).reshape(blocks, -1) for half in zip(*want, strict=True)
        )
        got_k, got_v = (half.view(np.uint8).reshape(blocks, -1) for half in (cache.k, cache.v))
        np.testing.assert_array_equal(got_k, want_k)
        np.testing.assert_array_equal(got_v, want_v)
        copies = np.array([[0, 1], [1, 2], [5, 5], [3, 0]])  # in order: 0 goes to 1 and to 2
        ops.copy_blocks(pool, cache, copies)
        for src, dst in copies:
            want_k[dst], want_v[dst] = want_k[src], want_v[src]
        np.testing.assert_array_equal(got_k, want_k)
        np.testing.assert_array_equal(got_v, want_v)


def random_cache(rng, *shape):
    cache = ops.KvCache(*shape)
    for half in (cache.k, cache.v):  # any bits: they are moved, not looked at
        half.view(np.uint8)[:] = rng.integers(0, 256, half.view(np.uint8).shape, np.uint8)
    return cache


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 16), (3, 20, 48), (8, 128, 16)], ids=str)
def test_swap_blocks(pools, dtype, shape):
    rng = np.random.default_rng(12)
    kv_heads, head_dim, block_size = shape
    for pool in pools:
        device = random_cache(rng, 9, kv_heads, head_dim, block_size, dtype)
        host = random_cache(rng, 5, kv_heads, head_dim, block_size, dtype)
        caches = [x.view(np.uint8) for x in (device.k, device.v, host.k, host.v)]
        want = [x.copy() for x in caches]
        # Of two that go to one place the later one stays.
        for direction, swaps in [
            ("out", [(8, 0), (3, 4), (0, 2), (1, 2)]),
            ("in", [(0, 4), (5, 2), (5, 3), (6, 0), (7, 0)]),
            ("out", []),
        ]:
            ops.swap_blocks(pool, device, host, np.array(swaps, np.int64).reshape(-1, 2), direction)
            for at_device, at_host in swaps:
                for d, h in ((0, 2), (1, 3)):
                    if direction == "out":
                        want[h][at_host] = want[d][at_device]
                    else:
                        want[d][at_device] = want[h][at_host]
            for got, expected in zip(caches, want, strict=True):
                np.testing.assert_array_equal(got, expected)


def test_swaps_are_checked(pool):
    device = ops.KvCache(3, 1, 8, 16, "float32")
    host = ops.KvCache(2, 1, 8, 16, "float32")
    device.k[:] = 1
    for swaps in [(3, 0)], [(0, 2)], [(-1, 0)], [(0, -1)], [(0, 0), (2, 5)]:
        for direction in ("out", "in"):
            with pytest.raises(_C.InvalidArgument, match="and host block"):
                ops.swap_blocks(pool, device, host, np.array(swaps), direction)
    assert not host.k.any() and device.k.all(), "nothing is moved if anything is wrong"
    for other in [(2, 2, 8, 16, "float32"), (2, 1, 8, 32, "float32"), (2, 1, 8, 16, "float16")]:
        with pytest.raises(_C.InvalidArgument, match="one layout"):
            ops.swap_blocks(pool, device, ops.KvCache(*other), np.array([[0, 0]]), "out")
    with pytest.raises(_C.InvalidArgument, match="direction is 'up'"):
        ops.swap_blocks(pool, device, host, np.array([[0, 0]]), "up")
    with pytest.raises(_C.InvalidArgument, match=r"swaps must be an array \[n\]\[2\]"):
        ops.swap_blocks(pool, device, host, np.array([[0, 0, 0]]), "out")


# ---------------------------------------------------------------- arguments


def test_errors_name_the_argument(pool):
    x = np.zeros((2, 8), np.float32)
    w = ops.PackedWeight(np.zeros((4, 8), np.float32), "float32", pool)
    for call, words in [
        (lambda: ops.linear(pool, x.astype(np.float64), w), ["x", "64 bits"]),
        (lambda: ops.linear(pool, x.astype(np.float16), w), ["x", "float16", "float32"]),
        (lambda: ops.linear(pool, x[0], w), ["x", "1 dimensions"]),
        (lambda: ops.linear(pool, x.T, w), ["x", "contiguous"]),
        (lambda: ops.linear(pool, x[:, :5], w), ["5", "8"]),
        (lambda: ops.linear(pool, [[1.0]], w), ["x", "list"]),
        (lambda: ops.linear(pool, x, w, np.zeros(3, np.float32)), ["bias", "4"]),
        (lambda: ops.linear(pool, x, w, out=np.zeros((2, 5), np.float32)), ["out", "2 x 4"]),
        (lambda: ops.PackedWeight(x.astype(np.uint16), "bfloat16", pool), ["weight", "uint16"]),
        (lambda: ops.PackedWeight(x, "int32", pool), ["int32"]),
        (lambda: ops.PackedWeight(x, "q8_0", pool), ["q8_0", "int8 or q4_1"]),
        (lambda: ops.PackedWeight(x + np.inf, "int8", pool), ["NaN or infinity"]),
        (lambda: ops.PackedWeight(x * np.nan, "q4_1", pool), ["NaN or infinity"]),
        (lambda: ops.PackedWeight.from_blocks(x, "q8_0", pool), ["float32", "uint8"]),
        (lambda: ops.PackedWeight.from_blocks(x.astype(np.uint8), "q4_1", pool), ["8", "20"]),
        (lambda: ops.PackedWeight.from_blocks(x.astype(np.uint8), "int8", pool), ["int8", "q8_0"]),
        (lambda: ops.linear(pool, x, w, activations="int4"), ["int4", "quantized or float32"]),
        (lambda: ops.PackedWeight(x, "float8", pool), ["float8"]),
        (lambda: ops.embed(pool, np.array([4]), w), ["ids", "4"]),
        (lambda: ops.embed(pool, np.array([2**40]), w), ["ids", "32 bits"]),
        (lambda: ops.norm(pool, x, np.zeros(3, np.float32), 1e-5, group=3), ["3", "8"]),
        (lambda: ops.KvCache(2, 1, 8, 8, "float32"), ["block_size", "16"]),
        (lambda: ops.copy_blocks(pool, ops.KvCache(2, 1, 8, 16, "float32"), np.array([[0, 2]])),
         ["0 -> 2"]),
        (lambda: _C.ThreadPool(-1), ["num_threads"]),
    ]:  # fmt: skip
        with pytest.raises(_C.InvalidArgument) as error:
            call()
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_attention_arguments_are_checked(pool):
    cache = ops.KvCache(4, 1, 8, 16, "float32")
    q = np.zeros((2, 8), np.float32)

    def attend(start=(0, 2), lens=(20,), tables=((0, 1),), heads=1):
        args = [np.array(a, np.int32) for a in (start, lens, tables)]
        return ops.paged_attention(pool, q, cache, *args, heads, 1.0)

    assert attend().shape == (2, 8)
    for bad in [
        {"start": (0, 1)}, {"start": (0, 1, 2)}, {"lens": (1,)}, {"lens": (33,)},
        {"tables": ((0, 4),)}, {"heads": 2}, {"lens": (2**31 - 1,)}, {"tables": ((0, -1),)},
    ]:  # fmt: skip
        with pytest.raises(_C.InvalidArgument):
            attend(**bad)


def test_read_only_and_dlpack_sources(pool):
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    x.flags.writeable = False

    class Exporter:
        """DLPack without numpy's type; `versions`: whether it knows max_version."""

        def __init__(self, versions):
            self.versions = versions

        def __dlpack__(self, **kwargs):
            if kwargs and not self.versions:
                raise TypeError("unexpected keyword argument")
            return x.copy().__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return (1, 0)

    class OnGpu(Exporter):
        def __dlpack_device__(self):
            return (2, 0)

    class Pinned(Exporter):
        def __dlpack_device__(self):
            return (3, 0)

    want = x + x
    np.testing.assert_array_equal(ops.add(pool, x, x), want)
    np.testing.assert_array_equal(ops.add(pool, Exporter(True), Exporter(False)), want)
    np.testing.assert_array_equal(ops.add(pool, x, Pinned(True)), want)
    with pytest.raises(_C.InvalidArgument, match=r"^b is not in CPU memory"):
        ops.add(pool, x, OnGpu(True))


@pytest.mark.parametrize("versions", [False, True])
def test_refused_dlpack_sources_are_released(pool, versions):
    x = np.zeros((1, 1, 1, 1, 1), np.float32)

    class Exporter:
        def __dlpack__(self, max_version=None):
            return x.__dlpack__(max_version=max_version) if versions else x.__dlpack__()

        def __dlpack_device__(self):
            return (1, 0)

    holders = sys.getrefcount(x)
    with pytest.raises(_C.InvalidArgument, match="a has 5 dimensions"):
        ops.add(pool, Exporter(), Exporter())
    assert sys.getrefcount(x) == holders


def test_elements_of_no_size_are_refused(pool):
    nothing = np.zeros((2, 2), np.dtype([]))
    with pytest.raises(_C.InvalidArgument, match=r"^a has elements of no size"):
        ops.add(pool, nothing, nothing)


def test_torch_tensors(pool):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(12)
    w = rng.standard_normal((40, 30)).astype(np.float32)
    x = rng.standard_normal((3, 30)).astype(np.float32)
    packed = ops.PackedWeight(torch.from_numpy(w).to(torch.bfloat16), "bfloat16", pool)
    same = ops.PackedWeight(w, "bfloat16", pool)
    np.testing.assert_array_equal(
        ops.linear(pool, torch.from_numpy(x), packed), ops.linear(pool, x, same)
    )
    np.testing.assert_array_equal(
        ops.embed(pool, torch.tensor([3, 1]), torch.from_numpy(w)), w[[3, 1]]
    )
    with pytest.raises(_C.InvalidArgument, match=r"^x is bfloat16"):
        ops.linear(pool, torch.zeros(3, 30, dtype=torch.bfloat16), packed)
    with pytest.raises(_C.InvalidArgument, match=r"^x "):
        ops.linear(pool, torch.zeros(3, 30, device="meta"), packed)


# ---------------------------------------------------------------- instruction sets


# Each above those before it.
ISAS = ["portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"]


def test_cpu_isa():
    wanted = os.environ.get("FASTPAGE_CPU_ISA", "")
    assert ops.cpu_isa() == wanted if wanted else ops.cpu_isa() in ISAS


@pytest.mark.skipif("FASTPAGE_CPU_ISA" in os.environ, reason="this is such a run")
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_other_instruction_sets(isa):
    env = {**os.environ, "FASTPAGE_CPU_ISA": isa}
    files = [__file__.replace("test_ops", f"test_{name}_ops") for name in ("quantized", "moe")]
    if isa in ("portable", "avx2"):  # the others' float kernels are another set's
        files.append(__file__)
    if ISAS.index(isa) >= ISAS.index(ops.cpu_isa()):
        pytest.skip(f"{isa} is not below {ops.cpu_isa()}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
