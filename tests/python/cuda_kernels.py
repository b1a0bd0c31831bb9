"""What the tests of the CUDA kernels run on: a GPU if there is one, else their emulation.

The emulation (cuda/emulation) runs the same sources on the CPU. It comes with a build that has the
C++ tests on: in the folder that FASTPAGE_BUILD_DIR names, or in build/. FASTPAGE_TEST_GPU=1 asks
for a GPU: the emulation does not stand in for it then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastpage import _C

torch = pytest.importorskip("torch")
functional = torch.nn.functional
tree_leaves = pytest.importorskip("torch.utils._pytree").tree_leaves
is_tensor = torch.is_tensor
TorchDispatchMode = pytest.importorskip("torch.utils._python_dispatch").TorchDispatchMode

SHARED_MEMORY = 227 << 10  # of a block, as on sm_90

# How emulated threads take turns: what a kernel computes must not depend on it.
SCHEDULES = [("ascending", True, 0), ("descending", False, 0), ("random", True, 1)]


@functools.cache
def load_emulation() -> ModuleType | None:
    folder = os.environ.get("FASTPAGE_BUILD_DIR") or Path(__file__).parents[2] / "build"
    for path in sorted(Path(folder).glob("python/fastpage_cuda_emulation.*.so")):
        spec = importlib.util.spec_from_file_location("fastpage_cuda_emulation", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


class Kernels:
    """`ops` are the functions of fastpage._C.cuda, for tensors on `device`."""

    def __init__(self, schedule: tuple[str, bool, int] | None = None) -> None:
        """schedule: of emulated threads, until run() sets others."""
        self.is_gpu = bool(_C.cuda.is_available()) and torch.cuda.is_available()
        self.device = "cuda" if self.is_gpu else "cpu"
        self.ops: Any = _C.cuda
        if not self.is_gpu:
            if os.environ.get("FASTPAGE_TEST_GPU"):
                pytest.fail(f"FASTPAGE_TEST_GPU is set, but {_C.cuda.unavailable_reason()}")
            self.ops = load_emulation()
        if self.ops is None:
            pytest.skip(
                f"{_C.cuda.unavailable_reason()}, and there is no emulation in FASTPAGE_BUILD_DIR"
            )
        if schedule is not None and not self.is_gpu:
            self.ops.set_schedule(*schedule)

    def run(self, launch: Callable[[], Any], *outputs: torch.Tensor) -> None:
        """Calls `launch` again and again, on the emulation once for each schedule: no bit may
        change. On a GPU a result that moves is a race."""
        before = [out.clone() for out in outputs]
        results: list[list[torch.Tensor]] = []
        turns = ["the first time", "the second", "the third"] if self.is_gpu else SCHEDULES
        for turn in turns:
            for out, old in zip(outputs, before, strict=True):
                out.copy_(old)
            if not self.is_gpu:
                self.ops.set_schedule(*turn)
            launch()
            if self.is_gpu:
                torch.cuda.synchronize()  # some outputs are host memory
            results.append([out.clone() for out in outputs])
        for turn, result in zip(turns[1:], results[1:], strict=True):
            for a, b in zip(results[0], result, strict=True):
                same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                assert same, f"{turn} and {turns[0]} differ"

    @contextlib.contextmanager
    def shared_memory(self, bytes_: int) -> Iterator[None]:
        """Blocks may have no more than this; on the emulation only."""
        if self.is_gpu:
            pytest.skip("a GPU has what it has")
        self.ops.set_max_shared(bytes_)
        try:
            yield
        finally:
            self.ops.set_max_shared(SHARED_MEMORY)

    def random(self, *shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Not a number anywhere."""
        size = torch.empty((), dtype=dtype).element_size()
        bytes_ = torch.full((*shape[:-1], shape[-1] * size), 0xFF, dtype=torch.uint8)
        return bytes_.view(dtype).to(self.device)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


class NoWaiting(TorchDispatchMode):
    """Operations that have to know what is on the device are refused; on a GPU by torch, too."""

    def __init__(self, cuda: Kernels) -> None:
        super().__init__()
        self._is_gpu = cuda.is_gpu

    def __enter__(self) -> Any:
        if self._is_gpu:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._is_gpu:
            torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [x for x in args[1:2] if isinstance(x, (list, tuple)) for x in x]
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in masks):
            name += " of a mask"
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "index of a mask")
        assert name not in waiting, name
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: our kernels by name, and torch's operations that
    compute. `kernels`: what has the functions of `ops`, for an executor.

    compute: False for kernels that do nothing.
    """

    _MEMORY_ONLY = ("empty", "empty_like", "empty_strided", "new_empty")

    def __init__(self, ops: Any, compute: bool = True) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kernels = SimpleNamespace(
            **{
                name: value if isinstance(value, type) else self._counted(value, compute)
                for name, value in vars(ops).items()
                if callable(value)
            }
        )

    def _counted(self, kernel: Callable[..., Any], compute: bool) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.counts[kernel.__name__] += 1
            return kernel(*args, **kwargs) if compute else None

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returns = zip(func._schema.returns, tree_leaves(result), strict=False)
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        computes = any(
            is_tensor(x)
            and (
                (returned.alias_info is not None and returned.alias_info.is_write)
                or x.untyped_storage()._cdata not in known
            )
            for returned, x in returns
        )
        if computes and name not in self._MEMORY_ONLY:
            self.counts[name] += 1
        return result


def multiply_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products that give a row the same bits whatever rows are beside it."""
    linear = functional.linear

    def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.cat([linear(row, weight, bias) for row in x.split(1)])

    monkeypatch.setattr(functional, "linear", by_rows)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    if want.numel() == 0:
        return 0.0
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


# ---- float8 e4m3, of which torch's own type knows little


def to_float8(x: torch.Tensor) -> torch.Tensor:
    """Its bits, saturated."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def from_float8(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn).double()


def rotated(
    x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, head_dim: int, style: str
) -> torch.Tensor:
    """Rotary embedding in float64."""
    cos, sin = table.double().cpu()[positions.cpu().long()].unsqueeze(1).chunk(2, dim=-1)
    heads = x.double().cpu().unflatten(1, (-1, head_dim))
    turned, kept = heads.tensor_split([2 * cos.shape[-1]], dim=-1)
    if style == "neox":
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned, kept), dim=-1).flatten(1)
