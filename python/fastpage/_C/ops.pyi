"""The CPU ops, fastpage/ops.h. Activations are float32 [rows, cols]; results are new arrays."""

import numpy as np
import numpy.typing as npt

from . import DLPackTensor, ThreadPool

def cpu_isa() -> str: ...

class PackedWeight:
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def __init__(
        self, weight: DLPackTensor, format: str, pool: ThreadPool, source_dtype: str | None = None
    ) -> None:
        """format: float32, bfloat16, float16, int8 or q4_1. source_dtype="bfloat16": `weight` is a
        uint16 array that holds bfloat16 bits."""

    @staticmethod
    def from_blocks(blocks: DLPackTensor, format: str, pool: ThreadPool) -> PackedWeight:
        """GGUF's blocks as they are: uint8 [out_features, bytes]; format: q8_0, q4_0 or q4_1."""

def linear(
    pool: ThreadPool,
    x: DLPackTensor,
    weight: PackedWeight,
    bias: DLPackTensor | None = None,
    out: npt.NDArray[np.float32] | None = None,
    activations: str = "quantized",
) -> npt.NDArray[np.float32]:
    """activations: float32, or quantized to what the weights are (fastpage/ops.h)."""

def moe(
    pool: ThreadPool,
    x: DLPackTensor,
    router_logits: DLPackTensor,
    experts: list[tuple[PackedWeight, PackedWeight]],
    top_k: int,
    renormalize: bool = False,
    kind: str = "silu_and_mul",
    activations: str = "quantized",
) -> npt.NDArray[np.float32]:
    """experts: gate_up [2 * intermediate, hidden] and down [hidden, intermediate] of each."""

def embed(
    pool: ThreadPool, ids: DLPackTensor, table: DLPackTensor | PackedWeight
) -> npt.NDArray[np.float32]: ...
def norm(
    pool: ThreadPool,
    x: DLPackTensor,
    weight: DLPackTensor,
    eps: float,
    bias: DLPackTensor | None = None,
    group: int = 0,
    kind: str = "rms",
) -> npt.NDArray[np.float32]: ...
def rotary(
    pool: ThreadPool,
    x: DLPackTensor,
    positions: DLPackTensor,
    cos_sin: DLPackTensor,
    head_dim: int,
    style: str = "neox",
) -> npt.NDArray[np.float32]: ...
def activate(pool: ThreadPool, x: DLPackTensor, kind: str) -> npt.NDArray[np.float32]: ...
def scale(pool: ThreadPool, x: DLPackTensor, factor: float) -> npt.NDArray[np.float32]: ...
def clamp(pool: ThreadPool, x: DLPackTensor, limit: float) -> npt.NDArray[np.float32]: ...
def soft_cap(pool: ThreadPool, x: DLPackTensor, cap: float) -> npt.NDArray[np.float32]: ...
def add(pool: ThreadPool, a: DLPackTensor, b: DLPackTensor) -> npt.NDArray[np.float32]: ...
def gather_rows(
    pool: ThreadPool, x: DLPackTensor, indices: DLPackTensor
) -> npt.NDArray[np.float32]: ...

class KvCache:
    """One layer's cache, zeroed; .k and .v are its storage as float32, uint16 or, of int8, uint8
    arrays, laid out as fastpage/ops.h says of KvCacheView."""

    @property
    def k(self) -> np.ndarray: ...
    @property
    def v(self) -> np.ndarray: ...
    def __init__(
        self, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
    ) -> None: ...

def reshape_and_cache(
    pool: ThreadPool, k: DLPackTensor, v: DLPackTensor, slot_mapping: DLPackTensor, cache: KvCache
) -> None: ...
def paged_attention(
    pool: ThreadPool,
    q: DLPackTensor,
    cache: KvCache,
    query_start_loc: DLPackTensor,
    seq_lens: DLPackTensor,
    block_tables: DLPackTensor,
    num_heads: int,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: DLPackTensor | None = None,
    out: npt.NDArray[np.float32] | None = None,
    activations: str = "quantized",
) -> npt.NDArray[np.float32]: ...
def copy_blocks(pool: ThreadPool, cache: KvCache, copies: DLPackTensor) -> None:
    """copies: [n][2], source and destination blocks, in order."""

def swap_blocks(
    pool: ThreadPool, device: KvCache, host: KvCache, swaps: DLPackTensor, direction: str
) -> None:
    """swaps: [n][2], blocks of `device` and of `host`, in order; direction: "out" or "in"."""
