"""Linear layers over quantized weights against float64 numpy. test_ops.py runs this file once more
for each lower instruction set."""

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from fastpage._C import ops

FORMATS = ["int8", "q8_0", "q4_0", "q4_1"]
SHAPES = [
    # rows, in, out
    (1, 32, 1), (0, 64, 8), (1, 576, 960), (2, 96, 33), (3, 32, 64), (5, 64, 31), (7, 128, 257),
    (6, 576, 32), (13, 576, 100), (25, 32, 65), (64, 160, 96), (70, 64, 50), (193, 64, 24),
    (4, 2528, 40), (30, 1120, 70), (1, 3008, 16),
]  # fmt: skip


def random_blocks(rng, rows, groups, fmt):
    """Blocks of GGUF with any quants, and the values that the gguf package reads in them."""
    header = {"q8_0": 1, "q4_0": 1, "q4_1": 2}[fmt]
    quant_bytes = 32 if fmt == "q8_0" else 16
    scales = (rng.standard_normal((rows, groups, header)) * 0.1).astype(np.float16)
    quant = rng.integers(0, 256, (rows, groups, quant_bytes), np.uint8)
    quant[:, ::3] = rng.choice(np.array([0, 127, 128, 129, 255], np.uint8), quant[:, ::3].shape)
    blocks = np.concatenate([scales.view(np.uint8).reshape(rows, groups, -1), quant], 2)
    blocks = np.ascontiguousarray(blocks.reshape(rows, -1))
    return blocks, quants.dequantize(blocks, GGMLQuantizationType[fmt.upper()])


def random_weight(rng, n_out, n_in, fmt, pool):
    """A packed weight, and its exact values."""
    if fmt == "int8":
        weight = rng.standard_normal((n_out, n_in), np.float32)
        packed = ops.PackedWeight(weight, fmt, pool)
        return packed, ops.embed(pool, np.arange(n_out), packed)
    blocks, values = random_blocks(rng, n_out, n_in // 32, fmt)
    return ops.PackedWeight.from_blocks(blocks, fmt, pool), values


def as_int8(x):
    """x as it is once quantized in groups of 32, and the scales of the groups."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32) * 32), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(len(x), padded.shape[1] // 32, 32)
    highest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.where(highest > 1e-30, np.float32(127) / np.maximum(highest, 1e-30), 0)
    quant = np.rint(groups * inverse.astype(np.float32))
    scale = highest * np.float32(1 / 127)
    values = quant.astype(np.float64) * scale
    return values.reshape(padded.shape)[:, : x.shape[1]], scale[..., 0]


def assert_close(got, want, scale, rtol=3e-6):
    assert got.dtype == np.float32 and got.shape == want.shape and np.all(np.isfinite(got))
    error = np.abs(got - want) / (scale + 1e-30)
    assert error.size == 0 or error.max() <= rtol, f"relative error {error.max()}"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(pools, shape, fmt):
    rows, n_in, n_out = shape
    rng = np.random.default_rng(hash(shape) % 2**32)
    packed, w = random_weight(rng, n_out, n_in, fmt, pools[1])
    assert (packed.in_features, packed.out_features, packed.format) == (n_in, n_out, fmt)
    bits = {"int8": 8, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5}[fmt]
    assert packed.nbytes >= w.size * bits / 8
    x = rng.standard_normal((rows, n_in), np.float32)
    bias = rng.standard_normal(n_out).astype(np.float32)
    for activations in ("quantized", "float32"):
        exact = as_int8(x)[0] if activations == "quantized" else x.astype(np.float64)
        want = exact @ w.astype(np.float64).T
        scale = np.abs(exact) @ np.abs(w.astype(np.float64)).T
        # The minimum and the steps above it, each as large as both, are summed apart.
        scale *= 8 if fmt == "q4_1" else 1
        results = []
        for pool in pools:
            got = ops.linear(pool, x, packed, activations=activations)
            assert_close(got, want, scale + 1e-6)
            np.testing.assert_array_equal(
                ops.linear(pool, x, packed, bias, activations=activations), got + bias
            )
            results.append(got)
        for got in results:
            np.testing.assert_array_equal(got, results[0])
        # The bound that ops.h gives, for what rounding the activations does.
        if activations == "quantized" and rows:
            step = np.repeat(as_int8(x)[1], 32, 1)[:, :n_in]
            bound = (step * 0.501) @ np.abs(w).T
            assert np.all(np.abs(got - x.astype(np.float64) @ w.T) <= bound + 3e-6 * (scale + 1e-6))


@pytest.mark.parametrize("fmt", ["int8", "q4_1"])
@pytest.mark.parametrize("n_in", [1, 3, 17, 31, 33, 100, 1050])
def test_in_features_that_are_no_whole_groups(pools, n_in, fmt):
    rng = np.random.default_rng(n_in)
    w = rng.standard_normal((45, n_in)).astype(np.float32)
    x = rng.standard_normal((9, n_in)).astype(np.float32)
    for pool in pools:
        packed = ops.PackedWeight(w, fmt, pool)
        stored = ops.embed(pool, np.arange(45), packed)
        assert np.abs(stored - w).max() <= np.abs(w).max() * (0.005 if fmt == "int8" else 0.2)
        for rows in (1, 2, 9):
            for activations in ("quantized", "float32"):
                exact = as_int8(x[:rows])[0] if activations == "quantized" else x[:rows]
                scale = 8 * np.abs(exact) @ np.abs(stored).T
                got = ops.linear(pool, x[:rows], packed, activations=activations)
                assert_close(got, exact @ stored.T.astype(np.float64), scale)


@pytest.mark.parametrize("activations", ["quantized", "float32"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_row_does_not_depend_on_batch(pools, fmt, activations):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((230, 1312), np.float32)
    w, _ = random_weight(rng, 75, 1312, fmt, pools[1])
    whole = ops.linear(pools[2], x, w, activations=activations)
    for rows in [*range(1, 71), 200]:
        at = int(rng.integers(0, 230 - rows))
        got = ops.linear(pools[rows % 2], x[at : at + rows], w, activations=activations)
        np.testing.assert_array_equal(got, whole[at : at + rows])


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_kept_bit_by_bit(pools, fmt):
    rng = np.random.default_rng(2)
    blocks, values = random_blocks(rng, 77, 5, fmt)
    blocks[:9, :2] = rng.integers(0, 0x7C, (9, 2), np.uint8)  # any finite scale, subnormal ones too
    values = quants.dequantize(blocks, GGMLQuantizationType[fmt.upper()])
    for pool in pools:
        packed = ops.PackedWeight.from_blocks(blocks, fmt, pool)
        got = ops.embed(pool, np.arange(77), packed)
        np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("fmt", FORMATS)
def test_extremes(pool, fmt):
    """Weights and activations at the ends of their ranges, of one sign: sums do not saturate."""
    for w_sign in (1, -1):
        for x_sign in (1, -1):
            x = np.full((7, 512), 3.0 * x_sign, np.float32)
            if fmt == "int8":
                packed = ops.PackedWeight(np.full((40, 512), w_sign, np.float32), fmt, pool)
                w = np.full((40, 512), w_sign, np.float32)
            else:
                header = np.array([1, 0][: 2 if fmt == "q4_1" else 1], np.float16).view(np.uint8)
                top, bottom = (127, 128) if fmt == "q8_0" else (0xFF, 0x00)
                quant = np.full(
                    32 if fmt == "q8_0" else 16, top if w_sign > 0 else bottom, np.uint8
                )
                blocks = np.tile(np.concatenate([header, quant]), (40, 16))
                w = quants.dequantize(blocks, GGMLQuantizationType[fmt.upper()])
                packed = ops.PackedWeight.from_blocks(blocks, fmt, pool)
            want = x.astype(np.float64) @ w.T
            assert_close(ops.linear(pool, x, packed), want, np.abs(want) + 1e-6)


def test_int8_rounds_to_nearest(pool):
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((60, 333)) * 10.0 ** rng.integers(-12, 12, (60, 1))).astype(np.float32)
    w[7] = 0
    w[8, 5] = 1e-40
    packed = ops.PackedWeight(w, "int8", pool)
    got = ops.embed(pool, np.arange(60), packed)
    highest = np.abs(w).max(1, keepdims=True).astype(np.float64)
    assert np.all(np.abs(got - w) <= highest / 253)
    assert np.all(got[7] == 0)


def test_q4_1_fits_better_than_the_extremes_alone(pool):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((64, 320)).astype(np.float32)
    w[3] = 7.0
    w[4] = 0.0
    w[5] *= 1e-3
    packed = ops.PackedWeight(w, "q4_1", pool)
    got = ops.embed(pool, np.arange(64), packed)
    blocks = quants.quantize(w, GGMLQuantizationType.Q4_1)
    plain = quants.dequantize(blocks, GGMLQuantizationType.Q4_1)
    assert ((got - w) ** 2).sum() < 0.9 * ((plain - w) ** 2).sum()
    assert np.all(got[3] == 7.0) and np.all(got[4] == 0.0)
    # What has 16 values at even distances is kept as it is.
    again = ops.PackedWeight(plain, "q4_1", pool)
    error = np.abs(ops.embed(pool, np.arange(64), again) - plain)
    assert error.max() <= 2e-3 * np.abs(plain).max()


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_not_finite_stays_so(pool, fmt):
    rng = np.random.default_rng(5)
    w, _ = random_weight(rng, 70, 96, fmt, pool)
    x = rng.standard_normal((8, 96)).astype(np.float32)
    want = ops.linear(pool, x, w)
    x[2, 50] = np.nan
    x[5, 95] = -np.inf
    got = ops.linear(pool, x, w)
    assert not np.isfinite(got[[2, 5]]).any()
    finite = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(got[finite], want[finite])
    tiny = ops.linear(pool, np.full((1, 96), 1e-38, np.float32), w)
    assert np.all(tiny == 0)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["int8", "q4_1"])
def test_sources(pool, fmt, source):
    rng = np.random.default_rng(6)
    bits = (rng.standard_normal((40, 60)).astype(np.float32).view(np.uint32) >> 16) << 16
    wide = bits.view(np.float32)
    if source == "bfloat16":
        stored = (bits >> 16).astype(np.uint16)
        packed = ops.PackedWeight(stored[:, 10:], fmt, pool, source_dtype="bfloat16")
    else:
        packed = ops.PackedWeight(wide.astype(source)[:, 10:], fmt, pool)
    want = ops.PackedWeight(wide[:, 10:], fmt, pool)
    x = rng.standard_normal((3, 50)).astype(np.float32)
    np.testing.assert_array_equal(ops.linear(pool, x, packed), ops.linear(pool, x, want))
