"""The kernels as nvcc compiles them: their PTX, run on the CPU (cuda/emulation/ptx.h).

The tests of the kernels, once more, over the PTX of sm_90. A build with FASTPAGE_CUDA=ON and the
C++ tests on makes it: in the folder that FASTPAGE_BUILD_DIR names, or in build/.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_cuda_attention
import test_cuda_attention_combinations
import test_cuda_batch_invariant
import test_cuda_cache
import test_cuda_elementwise
import test_cuda_sampling
from cuda_kernels import Kernels
from test_cuda_attention import DECODE, PREFILL, Attention, Case

torch = pytest.importorskip("torch")

# What takes long is left to the emulation of the source: lengths, not instructions, make the
# difference there.
LEFT_OUT = (
    "test_lengths_up_to_128k",
    "test_pieces_are_spread",
    "test_errors",
    "test_float8_values",
)

for module in (
    test_cuda_attention,
    test_cuda_attention_combinations,
    test_cuda_batch_invariant,
    test_cuda_cache,
    test_cuda_elementwise,
    test_cuda_sampling,
):
    for name, value in vars(module).items():
        if name.startswith("test_") and callable(value) and not name.startswith(LEFT_OUT):
            globals()[f"test_{module.__name__.removeprefix('test_cuda_')}__{name[5:]}"] = value


def ptx_files() -> list[Path]:
    folder = os.environ.get("FASTPAGE_BUILD_DIR") or Path(__file__).parents[2] / "build"
    return sorted(Path(folder).glob("CMakeFiles/fastpage_ptx.dir/cuda/*.ptx"))


@pytest.fixture(scope="module")
def cuda() -> Iterator[Kernels]:
    kernels = Kernels()
    if kernels.is_gpu:
        pytest.skip("a GPU runs the kernels themselves")
    files = ptx_files()
    if not files:
        pytest.skip("FASTPAGE_BUILD_DIR has no PTX: it was built without FASTPAGE_CUDA=ON, or nvcc")
    kernels.ops.load_ptx([str(path) for path in files])
    yield kernels
    kernels.ops.load_ptx([])


# ---- what the machine itself finds


@pytest.fixture
def spoil(cuda: Kernels, tmp_path: Path) -> Iterator[Any]:
    """Loads the PTX, that of one file changed."""

    def load(file: str, pattern: str, by: str) -> None:
        paths = {path.stem: path for path in ptx_files()}
        text, changes = re.subn(pattern, by, paths[file].read_text())
        assert changes
        paths[file] = tmp_path / "spoilt.ptx"
        paths[file].write_text(text)
        cuda.ops.load_ptx([str(path) for path in paths.values()])

    yield load
    cuda.ops.load_ptx([str(path) for path in ptx_files()])


SPLIT = replace(DECODE, new_tokens=[1], seq_lens=[600], num_multiprocessors=16)
SPOILT = [
    ("decode_attention", r"\tbar\.warp\.sync.*\n", "", "no barrier lies between", DECODE),
    ("decode_attention", r"\tbar\.sync.*\n", "", "no barrier lies between", DECODE),
    ("prefill_attention", r"\tbar\.sync.*\n", "", "no barrier lies between", PREFILL),
    ("decode_attention", r"\tcp\.async\.wait_group.*\n", "", "is still bringing", DECODE),
    ("prefill_attention", r"(wait_group) 0", r"\1 1", "is still bringing", PREFILL),
    ("decode_attention", r"(ld\.global\.u32.*\[%rd\d+)\]", r"\1+1073741824]", "outside of", DECODE),
    ("decode_attention", r"(st\.shared\.v2\.f32 \s*\[%r\d+)\]", r"\1+4]", "misaligned", DECODE),
    ("decode_attention", r"(mov\.u32.*%r\d+), -1;", r"\1, 15;", "only whole warps", DECODE),
    ("decode_attention", r"membar\.gl", "griddepcontrol.wait", "no such instruction", DECODE),
    ("decode_attention", r"\tmembar\.gl;\n", "", "atomic and fence do not lie between", SPLIT),
    ("decode_attention", r"(ld\.global)\.cg", r"\1", "reads through L1 what block", SPLIT),
]


@pytest.mark.parametrize(("file", "pattern", "by", "message", "step"), SPOILT)
def test_what_is_wrong_is_found(
    cuda: Kernels, spoil: Any, file: str, pattern: str, by: str, message: str, step: Case
) -> None:
    spoil(file, pattern, by)
    with pytest.raises(RuntimeError, match=message):
        Attention(cuda, replace(step, head_dim=128, plan={})).run()


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("new_tokens", "batch_invariant"), [(1, False), (1, True), (64, False), (64, True)]
)
def test_tiles_have_no_bank_conflicts(
    cuda: Kernels, new_tokens: int, batch_invariant: bool, head_dim: int, float8: bool
) -> None:
    """256 more tokens of keys and values take of shared memory nearly the least possible."""
    if float8 and (new_tokens, batch_invariant) == (1, False):
        pytest.skip("each block stores its queries in another order, two bytes at a time")

    def shared(length: int) -> Counter[str]:
        def counts() -> Counter[str]:
            return sum(map(Counter, cuda.ops.ptx_counts().values()), Counter())

        before = counts()
        case = Case(new_tokens=[new_tokens], seq_lens=[length], head_dim=head_dim, float8=float8)
        Attention(cuda, replace(case, batch_invariant=batch_invariant)).run()
        return counts() - before

    more = shared(512)
    more.subtract(shared(256))
    # Where a piece or a block ends, some are more than the least.
    assert 0 < more["shared_wavefronts"] <= 1.02 * more["shared_least"]
