"""Norms, activations and embedding on the GPU (or its emulation), against float64."""

from __future__ import annotations

import pytest
from cuda_kernels import Kernels, relative_error

torch = pytest.importorskip("torch")
functional = torch.nn.functional

TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 4e-3


def normed(
    x: torch.Tensor, kind: str, group: int, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    groups = x.double().cpu().unflatten(1, (-1, group))
    if kind == "layer":
        groups = groups - groups.mean(-1, keepdim=True)
    y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
    w, b = weight.double().cpu(), bias.double().cpu()
    return y.flatten(1) * w + b if len(w) == x.shape[1] else (y * w + b).flatten(1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("rows", "cols", "group"),
    [
        (1, 64, 64),
        (3, 2048, 2048),
        (5, 1536, 128),
        (2, 75, 75),
        (3, 90, 30),
        (0, 64, 64),
        (2, 4104, 4104),
        (1, 12288, 12288),  # 48 KB of 2-byte elements, as floats: a block has no more unasked
    ],
)
@pytest.mark.parametrize("per_column", [False, True])
def test_norm(
    cuda: Kernels, dtype: torch.dtype, kind: str, rows: int, cols: int, group: int, per_column: bool
) -> None:
    x = cuda.random(rows, cols, dtype=dtype, seed=1, scale=3) + 1
    weight, bias = (
        cuda.random(cols if per_column else group, dtype=torch.float32, seed=s) for s in (2, 3)
    )
    out = cuda.poisoned(rows, cols, dtype=dtype)
    cuda.run(lambda: cuda.ops.norm(x, out, kind, 1e-5, weight, bias, None, group), out)
    assert relative_error(out, normed(x, kind, group, weight, bias)) < tolerance(dtype)


def test_norm_of_as_many_as_shared_memory_holds(cuda: Kernels) -> None:
    """Of 227 KB, some are taken by sums of warps."""
    if cuda.is_gpu:
        pytest.skip("a GPU has what it has")
    x = cuda.random(1, 58113, dtype=torch.float32, seed=1)[:, 1:]  # not on 16 bytes: rounds of 256
    with pytest.raises(ValueError, match="norm needs 232480 bytes of shared memory a block"):
        cuda.ops.norm(x, torch.empty_like(x), "rms", 1e-5)
    x = x[:, :-256]
    size = x.shape[1]
    out = cuda.poisoned(1, size, dtype=torch.float32)
    cuda.ops.norm(x, out, "rms", 1e-5)
    want = normed(x, "rms", size, torch.ones(size), torch.zeros(size))
    assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cols", [256, 1000])
def test_norm_with_residual(cuda: Kernels, dtype: torch.dtype, cols: int) -> None:
    """To the bit what an addition and a norm give; in place."""
    x, residual = (cuda.random(4, cols, dtype=dtype, seed=s) for s in (4, 5))
    weight = cuda.random(cols, dtype=torch.float32, seed=6)
    total = x + residual
    want = cuda.poisoned(4, cols, dtype=dtype)
    cuda.ops.norm(total, want, "rms", 1e-6, weight)
    cuda.run(lambda: cuda.ops.norm(x, x, "rms", 1e-6, weight, None, residual), x, residual)
    assert torch.equal(x, want)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(3, 264), (1, 5000), (2, 7), (0, 8)])
def test_activate(
    cuda: Kernels, dtype: torch.dtype, kind: str, gated: bool, rows: int, cols: int
) -> None:
    x = cuda.random(rows, cols * (1 + gated), dtype=dtype, seed=7, scale=3)
    functions = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "relu": functional.relu,
    }
    want = functions[kind](x.double()[:, :cols])
    if gated:
        want = want * x.double()[:, cols:]
    out = cuda.poisoned(rows, cols, dtype=dtype)
    cuda.run(lambda: cuda.ops.activate(x, kind + "_and_mul" * gated, out), out)
    assert relative_error(out, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cols", [128, 33])
def test_embed(cuda: Kernels, dtype: torch.dtype, cols: int) -> None:
    table = cuda.random(50, cols, dtype=dtype, seed=8)
    ids = cuda.ints([0, 49, 7, 7, -1, 50])  # the last two are clamped
    out = cuda.poisoned(6, cols, dtype=dtype)
    cuda.run(lambda: cuda.ops.embed(ids, table, out), out)
    assert torch.equal(out, table[cuda.ints([0, 49, 7, 7, 0, 49]).long()])


def test_errors_name_the_argument(cuda: Kernels) -> None:
    x = cuda.random(2, 64, dtype=torch.bfloat16, seed=1)
    ops = cuda.ops
    with pytest.raises(ValueError, match="group must divide"):
        ops.norm(x, x, "rms", 1e-6, group=48)
    long = torch.zeros(1, 60000, device=cuda.device)
    with pytest.raises(ValueError, match="norm needs 241696 bytes of shared memory"):
        ops.norm(long, long, "rms", 1e-6)
    with pytest.raises(ValueError, match="kind must be rms or layer"):
        ops.norm(x, x, "batch", 1e-6)
    with pytest.raises(ValueError, match="out is 1 x 64, not 2 x 64"):
        ops.norm(x, x[:1], "rms", 1e-6)
    with pytest.raises(ValueError, match="x is 2 x 64, not 2 x 128"):
        ops.activate(x, "silu_and_mul", x)
    with pytest.raises(ValueError, match="out must be of the type of table"):
        ops.embed(cuda.ints([1, 2]), x.half(), x)
