"""The CUDA kernels that move keys and values, against plain indexing."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_kernels import Kernels, from_float8, relative_error, rotated, to_float8

torch = pytest.importorskip("torch")

HALF_TYPES = [torch.bfloat16, torch.float16]
TYPES = [*HALF_TYPES, torch.float32]


@pytest.fixture(scope="module")
def cuda() -> Kernels:
    return Kernels()


def new_cache(
    cuda: Kernels, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    return cuda.poisoned(blocks, block_size, heads, head_dim, dtype=dtype)


def slots_for(rows: int, blocks: int, block_size: int, cuda: Kernels) -> torch.Tensor:
    """Distinct, shuffled; the second and the last row go nowhere."""
    order = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(5))
    slots = order[:rows].to(torch.int32)
    slots[1:2] = -1
    slots[-1:] = blocks * block_size  # out of range
    return slots.to(cuda.device)


def written(cache: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    want = cache.clone().flatten(0, 1)
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < len(want):
            want[slot] = x[row].unflatten(0, cache.shape[2:])
    return want.unflatten(0, cache.shape[:2])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "block_size"),
    [(1, 1, 64, 16), (5, 3, 80, 16), (34, 8, 128, 32), (3, 2, 256, 48), (0, 2, 96, 16)],
)
@pytest.mark.parametrize("head_major", [False, True])
def test_reshape_and_cache(
    cuda: Kernels,
    dtype: torch.dtype,
    rows: int,
    heads: int,
    head_dim: int,
    block_size: int,
    head_major: bool,
) -> None:
    blocks = 4
    qkv = cuda.random(rows, 4 * heads * head_dim, dtype=dtype, seed=1)
    k, v = qkv[:, heads * head_dim :].tensor_split(3, dim=1)[
        :2
    ]  # strided, as of a fused projection
    slots = slots_for(rows, blocks, block_size, cuda)
    caches = [new_cache(cuda, blocks, block_size, heads, head_dim, dtype) for _ in range(2)]
    if head_major:
        caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
    wants = [written(c, x, slots) for c, x in zip(caches, (k, v), strict=True)]
    cuda.run(lambda: cuda.ops.reshape_and_cache(k, v, slots, *caches))
    for cache, want in zip(caches, wants, strict=True):
        assert same(cache, want)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_reshape_and_cache_float8(cuda: Kernels, dtype: torch.dtype) -> None:
    rows, heads, head_dim, blocks, block_size = 9, 3, 80, 3, 16
    k = cuda.random(rows, heads * head_dim, dtype=dtype, seed=1, scale=8)
    v = cuda.random(rows, heads * head_dim, dtype=dtype, seed=2, scale=0.02)  # many subnormal
    k[0, :4] = torch.tensor([1e4, -1e4, 0.0, 440.0], dtype=dtype)
    k_scale = torch.tensor([1.0, 0.25, 3.0], device=cuda.device)
    v_scale = torch.tensor([1.0, 0.5, 0.1], device=cuda.device)
    slots = slots_for(rows, blocks, block_size, cuda)
    caches = [new_cache(cuda, blocks, block_size, heads, head_dim, torch.uint8) for _ in range(2)]
    wants = []
    for cache, x, scale in zip(caches, (k, v), (k_scale, v_scale), strict=True):
        scaled = x.float().unflatten(1, (heads, head_dim)) / scale[:, None]
        wants.append(written(cache, to_float8(scaled).flatten(1), slots))
    cuda.run(lambda: cuda.ops.reshape_and_cache(k, v, slots, *caches, k_scale, v_scale))
    for cache, want in zip(caches, wants, strict=True):
        assert same(cache, want)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_float8_quotients(cuda: Kernels, dtype: torch.dtype) -> None:
    """Of all 16-bit numbers, as IEEE division and rounding give them: by scales of any size."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, 0.0).to(cuda.device)
    scales = [1.0, 0.1, 7.0, 1 / 448, 0.007, 15.0, 1e-38, 1e30, 1e-20, 7e4, 0.3333, 5e-5]
    heads, head_dim = len(scales) // 2, 64
    rows = len(numbers) // head_dim
    x = numbers.view(rows, 1, head_dim).expand(rows, heads, head_dim).reshape(rows, -1)
    slots = cuda.ints(list(range(rows)))
    caches = [new_cache(cuda, rows // 16, 16, heads, head_dim, torch.uint8) for _ in range(2)]
    k_scale, v_scale = torch.tensor(scales, device=cuda.device).view(2, heads)
    cuda.ops.reshape_and_cache(x, x, slots, *caches, k_scale, v_scale)
    for cache, scale in zip(caches, (k_scale, v_scale), strict=True):
        want = to_float8(x.float().unflatten(1, (heads, head_dim)) / scale[:, None])
        assert torch.equal(cache.flatten(0, 1), want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 32), (80, 20), (128, 128), (96, 6)]
)
def test_rotary(
    cuda: Kernels, dtype: torch.dtype, style: str, head_dim: int, rotary_dim: int
) -> None:
    rows, heads = 5, 3
    x = cuda.random(rows, heads * head_dim, dtype=dtype, seed=3)
    table = cuda.random(12, rotary_dim, dtype=torch.float32, seed=4)
    positions = cuda.ints([0, 11, 3, 3, 7])
    out = cuda.poisoned(rows, heads * head_dim, dtype=dtype)
    cuda.run(lambda: cuda.ops.rotary(x, positions, table, head_dim, style, out), out)
    want = rotated(x, positions, table, head_dim, style)
    assert relative_error(out, want) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_rotary_tables_may_begin_anywhere(cuda: Kernels) -> None:
    x = cuda.random(2, 128, dtype=torch.bfloat16, seed=3)
    positions = cuda.ints([1, 5])
    table = cuda.random(6, 64, dtype=torch.float32, seed=4)
    results = []
    for first, stride in ((0, 64), (4, 64), (1, 64), (0, 68)):
        memory = torch.zeros(first + 6 * stride, device=cuda.device)
        moved = memory[first:].view(6, stride)[:, :64].copy_(table)
        out = cuda.poisoned(2, 128, dtype=x.dtype)
        cuda.ops.rotary(x, positions, moved, 64, "neox", out)
        results.append(out)
    assert all(same(out, results[0]) for out in results)


@pytest.mark.parametrize(
    ("dtype", "float8"),
    [(dtype, float8) for dtype in HALF_TYPES for float8 in (False, True)]
    + [(torch.float32, False)],
)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(128, 128), (80, 32), (80, 80), (64, 24), (64, 10)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_cache(
    cuda: Kernels,
    dtype: torch.dtype,
    style: str,
    float8: bool,
    head_dim: int,
    rotary_dim: int,
    normed: bool,
) -> None:
    """To the bit what norm, rotary and reshape_and_cache give; q is turned in place."""
    rows, heads, kv_heads, blocks, block_size = 6, 6, 2, 2, 16
    q = cuda.random(rows, heads * head_dim, dtype=dtype, seed=6)
    k, v = (cuda.random(rows, kv_heads * head_dim, dtype=dtype, seed=i) for i in (7, 8))
    table = cuda.random(40, rotary_dim, dtype=torch.float32, seed=9)
    positions = cuda.ints([31, 0, 1, 39, 40, -1])  # the last two are clamped
    slots = slots_for(rows, blocks, block_size, cuda)
    cache_dtype = torch.uint8 if float8 else dtype
    scales = [torch.tensor([0.5, 2.0], device=cuda.device) for _ in range(2)] if float8 else []
    shape = (blocks, block_size, kv_heads, head_dim)
    wants = [cuda.poisoned(*shape, dtype=cache_dtype) for _ in range(2)]
    want_q, want_k = torch.empty_like(q), torch.empty_like(k)
    norms: dict[str, Any] = {}
    normed_q, normed_k = q, k
    if normed:
        weights = [cuda.random(head_dim, dtype=torch.float32, seed=i) for i in (10, 11)]
        norms = {"q_norm": weights[0], "k_norm": weights[1], "norm_eps": 1e-2}
        normed_q, normed_k = torch.empty_like(q), torch.empty_like(k)
        for x, y, weight in zip((q, k), (normed_q, normed_k), weights, strict=True):
            cuda.ops.norm(x, y, "rms", 1e-2, weight, None, None, head_dim)
    cuda.ops.rotary(normed_q, positions, table, head_dim, style, want_q)
    cuda.ops.rotary(normed_k, positions, table, head_dim, style, want_k)
    cuda.ops.reshape_and_cache(want_k, v, slots, *wants, *scales)
    caches = [cuda.poisoned(*shape, dtype=cache_dtype) for _ in range(2)]

    def launch() -> None:
        args = (q, k, v, positions, slots, table, style, *caches, q, *scales)
        cuda.ops.rotary_and_cache(*args, **norms)

    cuda.run(launch, q)
    assert same(q, want_q)
    for cache, want in zip(caches, wants, strict=True):
        assert same(cache, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_more_elements_than_32_bits_count(cuda: Kernels, dtype: torch.dtype) -> None:
    """Caches of 4 GB each, of which the emulation's are hardly touched."""
    heads, head_dim, block_size = 4, 128, 16
    elements = block_size * heads * head_dim
    blocks = (1 << (31 if dtype == torch.bfloat16 else 32)) // elements + 4
    shape = (blocks, block_size, heads, head_dim)
    caches = [torch.empty(shape, dtype=dtype, device=cuda.device) for _ in range(2)]
    for cache in caches:
        cache[-4:] = 0
    k, v = (cuda.random(3, heads * head_dim, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    slots = cuda.ints([blocks * block_size - 1, (blocks - 2) * block_size, -1])
    ends = [cache[-4:].flatten(2).flatten(0, 1) for cache in caches]
    wants = [end.clone() for end in ends]
    for want, x in zip(wants, (k, v), strict=True):
        bits = x if dtype == torch.bfloat16 else to_float8(x)
        want[-1], want[2 * block_size] = bits[0], bits[1]
    cuda.run(lambda: cuda.ops.reshape_and_cache(k, v, slots, *caches))
    assert all(same(end, want) for end, want in zip(ends, wants, strict=True))
    copies = torch.tensor([[blocks - 1, blocks - 3]])
    cuda.run(lambda: cuda.ops.copy_blocks(caches[0].view(1, blocks, elements), copies))
    wants[0][block_size : 2 * block_size] = wants[0][3 * block_size :]
    assert same(ends[0], wants[0])


def test_copy_blocks_in_order(cuda: Kernels) -> None:
    """A block that was copied to is copied from, is written twice, and is read before that."""
    layers, blocks = 3, 300
    cache = cuda.random(layers, blocks, 16 * 2 * 80, dtype=torch.bfloat16, seed=10)
    copies = [[0, 1], [1, 2], [3, 4], [5, 3], [6, 7], [8, 7], [9, 9], [2, 5]]
    copies += [[i, i + 140] for i in range(10, 150)] + [[i + 140, i] for i in range(10, 150)]
    want = cache.clone()
    for src, dst in copies:
        want[:, dst] = want[:, src]
    cuda.run(lambda: cuda.ops.copy_blocks(cache, torch.tensor(copies)), cache)
    assert same(cache, want)


def test_swap_blocks(cuda: Kernels) -> None:
    device = cuda.random(2, 300, 640, dtype=torch.float16, seed=11)
    host = torch.randn(2, 280, 640).to(torch.float16)
    host = host.pin_memory() if cuda.is_gpu else host
    out = [[i, 279 - i] for i in range(270)]
    want = host.clone()
    for there, here in out:
        want[:, here] = device[:, there].cpu()
    cuda.run(lambda: cuda.ops.swap_blocks(device, host, torch.tensor(out), "out"), host)
    assert same(host, want)
    back = [[299 - i, i] for i in range(5)]
    want_device = device.cpu().clone()
    for there, here in back:
        want_device[:, there] = host[:, here]
    cuda.run(lambda: cuda.ops.swap_blocks(device, host, torch.tensor(back), "in"), device)
    assert same(device.cpu(), want_device)


def test_float8_values(cuda: Kernels) -> None:
    """All 256 of them come back as they are."""
    bits = torch.arange(256, dtype=torch.uint8)
    bits = bits[(bits & 0x7F) != 0x7F]
    values = from_float8(bits)
    assert torch.equal(to_float8(values), bits)


def bad_arguments(cuda: Kernels) -> list[tuple[str, Any]]:
    k = cuda.random(2, 128, dtype=torch.bfloat16, seed=1)
    cache = cuda.random(2, 16, 2, 64, dtype=torch.bfloat16, seed=1)
    slots = cuda.ints([0, 1])
    table = cuda.random(4, 64, dtype=torch.float32, seed=1)
    write, rotary = cuda.ops.reshape_and_cache, cuda.ops.rotary
    weight = table[0]

    def write_rotated(**norms: torch.Tensor) -> None:
        out = torch.empty_like(k)
        cuda.ops.rotary_and_cache(k, k, k, slots, slots, table, "neox", cache, cache, out, **norms)

    return [
        ("k is 2 x 64", lambda: write(k[:, :64], k, slots, cache, cache)),
        ("v is 1 x 128", lambda: write(k, k[:1], slots, cache, cache)),
        ("slot_mapping has 1", lambda: write(k, k, slots[:1], cache, cache)),
        ("slot_mapping is int64", lambda: write(k, k, slots.long(), cache, cache)),
        ("k must be of the type", lambda: write(k.half(), k.half(), slots, cache, cache)),
        ("k_scale is for float8", lambda: write(k, k, slots, cache, cache, table[0, :2])),
        ("blocks of 8", lambda: write(k, k, slots, cache[:, :8], cache[:, :8])),
        ("k_cache has 3", lambda: write(k, k, slots, cache[0], cache[0])),
        ("v_cache must have", lambda: write(k, k, slots, cache, cache[:1])),
        ("k must have rows that begin", lambda: write(odd(k), k, slots, cache, cache)),
        ("last dimension", lambda: write(k.t().contiguous().t(), k, slots, cache, cache)),
        ("style must be", lambda: rotary(k, slots, table, 64, "x", k)),
        ("cos_sin must have an even", lambda: rotary(k, slots, table[:, :3], 64, "neox", k)),
        ("q_norm and k_norm go together", lambda: write_rotated(q_norm=weight)),
        ("q_norm and k_norm go together", lambda: write_rotated(k_norm=weight)),
        ("k_norm has 63", lambda: write_rotated(q_norm=weight, k_norm=weight[1:])),
        ("must be on 16 bytes", lambda: write_rotated(q_norm=weight, k_norm=odd(weight))),
        (
            "copies has no block 16",
            lambda: cuda.ops.copy_blocks(cache.flatten(2), torch.tensor([[0, 16]])),
        ),
    ]


def odd(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element past a boundary."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("case", range(18))
def test_errors_name_the_argument(cuda: Kernels, case: int) -> None:
    message, call = bad_arguments(cuda)[case]
    with pytest.raises(ValueError, match=message):
        call()
