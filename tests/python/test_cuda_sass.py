"""What nvcc made of the CUDA kernels: properties that decide how fast they are on a GPU.

Reads the objects of the build that FASTPAGE_BUILD_DIR names, compiled where nvcc is, with NVIDIA's
cuobjdump and nvdisasm. Nothing runs. Where an expectation here is broken, either the kernel became
slower or a comment (and docs/gpu-status.md) is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Of a multiprocessor: shared memory, of which every block takes 1 KB more than it asks for; and
# what a block may have at most.
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10}
REGISTERS = 65536
MOST_THREADS = 2048
# Bytes that have to be on their way to a multiprocessor, to fill an H100's memory.
IN_FLIGHT = 40 << 10

# What spills, in instructions: docs/gpu-status.md.
SPILLS = {
    "norm_kernel<float, 1, 256> sm_80": 4,
    "rotary_kernel<BFloat16, BFloat16, 1, 1, true, true> sm_90": 2,
    "rotary_kernel<Half, Float8, 8, 8, false, false> sm_90": 2,
    "rotary_kernel<Half, Half, 1, 1, true, true> sm_90": 2,
    "sample_kernel sm_90": 3,
}


@dataclasses.dataclass
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int  # without what a launch asks for
    sass: list[str]

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(opcode(line) for line in self.sass)

    def count(self, pattern: str) -> int:
        return sum(n for op, n in self.opcodes.items() if re.fullmatch(pattern, op))

    def blocks(self, threads: int, shared: int = 0) -> int:
        """Of so many threads and bytes, how many a multiprocessor runs at once."""
        warps = threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        memory = shared + self.shared + 1024
        return min(
            REGISTERS // per_warp // warps, SHARED_MEMORY[self.arch] // memory, 2048 // threads, 32
        )


def opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def tool(name: str) -> str | None:
    folders = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


def run(*command: object, cwd: Path | None = None) -> str:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def disassembled(cubin: Path, cuobjdump: str, nvdisasm: str) -> Iterator[Kernel]:
    arch = re.search(r"sm_\d+", cubin.name)
    assert arch, cubin
    usage = dict(
        re.findall(r"Function (\S+):\s+(REG:.*)", run(cuobjdump, "--dump-resource-usage", cubin))
    )
    if not usage:
        return
    demangled = run("c++filt", *usage).splitlines()
    text = run(nvdisasm, "-c", "-ndf", cubin)
    for (mangled, resources), name in zip(usage.items(), demangled, strict=True):
        name = re.sub(r"fastpage::cuda::|\(anonymous namespace\)::|^void ", "", name)
        begin = text.index(f"//--------------------- .text.{mangled} ")
        end = text.find("//--------------------- ", begin + 10)
        sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", text[begin : end if end > 0 else None])
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        # From sm_90 on, the 1 KB that is the system's is among it.
        shared = max(0, numbers["SHARED"] - (1024 if arch[0] == "sm_90" else 0))
        yield Kernel(re.sub(r"\(.*", "", name), arch[0], numbers["REG"], shared, sass)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = Path(os.environ.get("FASTPAGE_BUILD_DIR") or Path(__file__).parents[2] / "build")
    objects = sorted((folder / "CMakeFiles/fastpage.dir/cuda").glob("*.cu.o"))
    if not objects:
        pytest.skip(f"there are no CUDA objects in {folder}")
    tools = {name: tool(name) for name in ("cuobjdump", "nvdisasm", "c++filt")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found")
    cuobjdump, nvdisasm = str(tools["cuobjdump"]), str(tools["nvdisasm"])
    cubins = tmp_path_factory.mktemp("cubins")
    for path in objects:
        run(cuobjdump, "-xelf", "all", path.absolute(), cwd=cubins)
    known = [path for arch in SHARED_MEMORY for path in sorted(cubins.glob(f"*{arch}.cubin"))]
    if not known:
        pytest.skip(f"the build is for none of {', '.join(SHARED_MEMORY)}")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda path: list(disassembled(path, cuobjdump, nvdisasm)), known)
        return [kernel for part in found for kernel in part]


def some(kernels: list[Kernel], pattern: str) -> list[Kernel]:
    found = [k for k in kernels if re.fullmatch(pattern, k.name)]
    assert found, f"no kernel {pattern}"
    return found


def test_nothing_spills(kernels: list[Kernel]) -> None:
    spills = {f"{k.name} {k.arch}": k.count(r"(LDL|STL).*") for k in kernels}
    assert {name: n for name, n in spills.items() if n > SPILLS.get(name, 0)} == {}


def test_kernels_that_ask_for_shared_memory_have_no_other(kernels: list[Kernel]) -> None:
    """A launch counts what it asks for: it would fail if there were more (launch.cuh)."""
    assert {k.name: k.shared for k in kernels if k.shared} == {"float32_kernel": 2576}


def test_global_memory_is_read_as_global_memory(kernels: list[Kernel]) -> None:
    """Not by generic accesses; not as constants, which another block might write meanwhile."""
    wrong = {
        f"{k.name} {k.arch}": bad
        for k in kernels
        if (bad := [op for op in k.opcodes if re.match(r"(LD|ST)(\.|$)|.*CONSTANT", op)])
    }
    assert wrong == {}


# ---- attention


def tile_stride(head_dim: int, size: int) -> int:
    """Bytes: an odd number of vectors."""
    return (head_dim * size // 16 | 1) * 16


def decode_shared(head_dim: int, size: int, stages: int = 3) -> int:
    tiles = 4 * stages * 2 * 16 * tile_stride(head_dim, size)
    return 16 * tile_stride(head_dim, 2) + max(tiles, 4 * 16 * (head_dim + 10) * 4)


def softmax_tokens(head_dim: int, size: int) -> int:
    return 64 if head_dim <= (96 if size == 1 else 128) else 32


def few_rows_shared(head_dim: int, size: int, stages: int = 3) -> int:
    tokens = softmax_tokens(head_dim, size)
    stage = 2 * tokens * tile_stride(head_dim, size)
    return 16 * tile_stride(head_dim, 2) + 16 * tokens * 4 + 16 * 8 + stages * stage


def prefill_shared(head_dim: int, size: int) -> int:
    fragments = 2 if head_dim <= 128 else 1
    rows, tokens = 64 * fragments, softmax_tokens(head_dim, size)
    tiles = 2 * tokens * tile_stride(head_dim, size)
    return rows * tile_stride(head_dim, 2) + tiles + rows * 8 + fragments * 128 * 16 + 32


SIZES = {"Half": 2, "BFloat16": 2, "Float8": 1}
ATTENTION = r"{}_kernel<(?:Half|BFloat16), (\w+), (\d+)(?:, \w+)?>"


def attention(kernels: list[Kernel], family: str) -> Iterator[tuple[Kernel, int, int]]:
    """With head_dim, and the size of the cache's elements."""
    pattern = ATTENTION.format(family)
    for kernel in some(kernels, pattern):
        match = re.fullmatch(pattern, kernel.name)
        assert match
        yield kernel, int(match[2]), SIZES[match[1]]


@pytest.mark.parametrize("family", ["decode", "few_rows", "prefill"])
def test_attention_uses_what_the_hardware_has(kernels: list[Kernel], family: str) -> None:
    """Tensor cores, fed by ldmatrix of four, fed by copies of 16 bytes around L1 and registers."""
    for kernel, head_dim, size in attention(kernels, family):
        assert kernel.count(r"HMMA\.16816\.F32.*") >= head_dim // 8, kernel.name
        assert kernel.count(r"LDSM\.16\.M88\.4") >= head_dim // 16, kernel.name
        assert kernel.count(r"LDSM\.16\.MT88\.4") >= head_dim * size // 64, kernel.name
        assert {op for op in kernel.opcodes if "LDSM" in op} == {"LDSM.16.M88.4", "LDSM.16.MT88.4"}
        copies = {op for op in kernel.opcodes if op.startswith("LDGSTS")}
        assert copies == {"LDGSTS.E.BYPASS.128"}, kernel.name


def test_decode_keeps_enough_on_its_way(kernels: list[Kernel]) -> None:
    """The table of docs/gpu-status.md: all stages of a block but the one each warp works on."""
    for kernel, head_dim, size in attention(kernels, "decode"):
        if kernel.arch != "sm_90":
            continue
        blocks = kernel.blocks(128, decode_shared(head_dim, size))
        in_flight = blocks * 4 * 2 * (2 * 16 * head_dim * size)
        assert in_flight >= size * IN_FLIGHT, (kernel.name, blocks)
        if size == 2:
            assert blocks == {64: 3, 96: 2, 128: 2, 256: 1}[head_dim], kernel.name


def test_few_rows_keep_enough_on_their_way(kernels: list[Kernel]) -> None:
    for kernel, head_dim, size in attention(kernels, "few_rows"):
        if kernel.arch != "sm_90":
            continue
        blocks = kernel.blocks(128, few_rows_shared(head_dim, size))
        tile = 2 * softmax_tokens(head_dim, size) * head_dim * size
        assert blocks * 2 * tile >= IN_FLIGHT, (kernel.name, blocks)
        if head_dim == 128:
            assert blocks >= 2, kernel.name


def test_two_blocks_of_prefill_run_at_once(kernels: list[Kernel]) -> None:
    for kernel, head_dim, size in attention(kernels, "prefill"):
        blocks = kernel.blocks(128, prefill_shared(head_dim, size))
        assert blocks >= 2, (kernel.name, kernel.arch, kernel.registers)


# ---- what moves bytes


def stores(kernel: Kernel) -> set[str]:
    return {op for op in kernel.opcodes if re.match(r"STG?\.", op)}


def test_the_cache_is_written_in_whole_vectors(kernels: list[Kernel]) -> None:
    for pattern in (
        r"reshape_and_cache_kernel<.*>",
        r"copy_blocks_kernel",
        r"rotary_kernel<(Half|BFloat16), \1, 8, 8, \w+, \w+>",
        r"rotary_kernel<float, float, 4, 4, \w+, \w+>",
        r"rotary_kernel<\w+, Float8, 8, 16, \w+, \w+>",
    ):
        for kernel in some(kernels, pattern):
            assert stores(kernel) == {"STG.E.128"}, (kernel.name, kernel.arch)


def test_rows_are_read_and_written_in_whole_vectors(kernels: list[Kernel]) -> None:
    for pattern in (
        r"norm_kernel<(Half|BFloat16), 8, \d+>",
        r"norm_kernel<float, 4, \d+>",
        r"activate_kernel<(Half|BFloat16), 8>",
        r"activate_kernel<float, 4>",
    ):
        for kernel in some(kernels, pattern):
            accesses = {op for op in kernel.opcodes if re.match(r"(STG|LDG)\.", op)}
            assert accesses == {"LDG.E.128", "STG.E.128"}, (kernel.name, kernel.arch)
    for kernel in some(kernels, "embed_kernel<uint4>"):
        assert stores(kernel) == {"STG.E.128"}


def loads_at_once(kernel: Kernel) -> int:
    """Most loads of 16 bytes without a store or a barrier between them."""
    most = count = 0
    for line in kernel.sass:
        op = opcode(line)
        count = 0 if re.match(r"STG|BAR|EXIT", op) else count + (op == "LDG.E.128")
        most = max(most, count)
    return most


@pytest.mark.parametrize(
    ("pattern", "threads", "loads"),
    [
        (r"copy_blocks_kernel", 256, 4),
        (r"reshape_and_cache_kernel<(Half|BFloat16|float), \1>", 128, 4),
        (r"reshape_and_cache_kernel<\w+, Float8>", 128, 8),
        (r"rotary_kernel<(Half|BFloat16), \1, 8, 8, true, false>", 256, 6),
        (r"activate_kernel<(Half|BFloat16), 8>", 256, 2),
        (r"norm_kernel<(Half|BFloat16), 8, \d+>", 256, 2),
    ],
)
def test_copies_keep_enough_on_their_way(
    kernels: list[Kernel], pattern: str, threads: int, loads: int
) -> None:
    for kernel in some(kernels, pattern):
        assert loads_at_once(kernel) >= loads, (kernel.name, kernel.arch)
        in_flight = kernel.blocks(threads) * threads * loads * 16
        assert in_flight >= IN_FLIGHT, (kernel.name, kernel.arch, kernel.registers)


def test_the_sampler_has_eight_loads_on_their_way(kernels: list[Kernel]) -> None:
    """Of 4 bytes, and 1,024 threads: a block has a multiprocessor to itself."""
    for kernel in some(kernels, "sample_kernel|logprob_kernel"):
        assert kernel.blocks(1024) >= 1
        most = count = 0
        for line in kernel.sass:
            op = opcode(line)
            count = 0 if re.match(r"ST|BAR|EXIT", op) else count + (op == "LDG.E")
            most = max(most, count)
        assert most >= 8, (kernel.name, kernel.arch)
