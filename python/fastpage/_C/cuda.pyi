"""The CUDA ops, cuda/ops.h. Tensors are in CUDA memory; what comes out is written to arguments.

Kernels are launched on the stream that the tensors' library would use now. Without CUDA in the
build only is_available() and unavailable_reason() are there.
"""

from . import DLPackTensor

def is_available() -> bool: ...
def unavailable_reason() -> str:
    """In one line; empty if is_available()."""

class AttentionPlan:
    """Who computes what in a step, laid out in a buffer of fixed size for paged_attention."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_num_seqs: int,
        max_num_tokens: int,
        max_seq_len: int,
        num_multiprocessors: int,
        batch_invariant: bool = False,
        fixed_grid: bool = False,
        decode_only: bool = False,
    ) -> None:
        """batch_invariant: a row's bits depend on its query and its KV alone.

        fixed_grid: for CUDA graphs, which replay with any plan within the maxima.

        decode_only: no sequence brings more than one new token.
        """

    @property
    def plan_size(self) -> int:
        """int32s of the plan's buffer."""

    @property
    def workspace_size(self) -> int:
        """float32s of the workspace."""

    @property
    def num_counters(self) -> int:
        """int32s, zero before the first use."""

    @property
    def num_decode_items(self) -> int:
        """Of the step laid out last; batch_invariant: items of sequences with few rows."""

    @property
    def num_prefill_items(self) -> int: ...
    @property
    def max_decode_items(self) -> int:
        """Of any step: what a fixed grid is for."""

    @property
    def max_prefill_items(self) -> int: ...
    def plan(
        self, query_start_loc: DLPackTensor, seq_lens: DLPackTensor, buffer: DLPackTensor
    ) -> None:
        """All three in CPU memory; `buffer` is to be copied to the device."""

def paged_attention(
    q: DLPackTensor,
    k_cache: DLPackTensor,
    v_cache: DLPackTensor,
    block_tables: DLPackTensor,
    plan: AttentionPlan,
    plan_buffer: DLPackTensor,
    workspace: DLPackTensor,
    counters: DLPackTensor,
    out: DLPackTensor,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: DLPackTensor | None = None,
    k_scale: DLPackTensor | None = None,
    v_scale: DLPackTensor | None = None,
) -> None:
    """q and block_tables have the plan's tokens and sequences; with fixed_grid its maxima.

    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], in any order of strides;
    uint8 holds float8 e4m3 bits, which stand for value / scale of their head."""

def reshape_and_cache(
    k: DLPackTensor,
    v: DLPackTensor,
    slot_mapping: DLPackTensor,
    k_cache: DLPackTensor,
    v_cache: DLPackTensor,
    k_scale: DLPackTensor | None = None,
    v_scale: DLPackTensor | None = None,
) -> None: ...
def rotary(
    x: DLPackTensor,
    positions: DLPackTensor,
    cos_sin: DLPackTensor,
    head_dim: int,
    style: str,
    out: DLPackTensor,
) -> None:
    """style: neox or interleaved."""

def rotary_and_cache(
    q: DLPackTensor,
    k: DLPackTensor,
    v: DLPackTensor,
    positions: DLPackTensor,
    slot_mapping: DLPackTensor,
    cos_sin: DLPackTensor,
    style: str,
    k_cache: DLPackTensor,
    v_cache: DLPackTensor,
    rotated_q: DLPackTensor,
    k_scale: DLPackTensor | None = None,
    v_scale: DLPackTensor | None = None,
    q_norm: DLPackTensor | None = None,
    k_norm: DLPackTensor | None = None,
    norm_eps: float = 0.0,
) -> None:
    """q_norm, k_norm: weights of RMSNorms of each head, [head_dim]."""

def copy_blocks(cache: DLPackTensor, copies: DLPackTensor) -> None:
    """cache: [num_layers, num_blocks, elements of a block]; copies: [n, 2], in CPU memory."""

def swap_blocks(
    device: DLPackTensor, host: DLPackTensor, swaps: DLPackTensor, direction: str
) -> None:
    """host: pinned; swaps: [n, 2], (device block, host block); direction: out or in."""

def norm(
    x: DLPackTensor,
    out: DLPackTensor,
    kind: str,
    eps: float,
    weight: DLPackTensor | None = None,
    bias: DLPackTensor | None = None,
    residual: DLPackTensor | None = None,
    group: int | None = None,
) -> None:
    """kind: rms or layer. With `residual`, x + residual is normed, and left there."""

def activate(x: DLPackTensor, kind: str, out: DLPackTensor) -> None: ...
def embed(ids: DLPackTensor, table: DLPackTensor, out: DLPackTensor) -> None: ...
def sample(
    logits: DLPackTensor,
    temperature: DLPackTensor,
    top_k: DLPackTensor,
    top_p: DLPackTensor,
    min_p: DLPackTensor,
    seeds: DLPackTensor,
    positions: DLPackTensor,
    workspace: DLPackTensor,
    out: DLPackTensor,
) -> None:
    """workspace: 2 * rows * vocab_size float32s. out: -1 where no token is possible."""

def process_logits(
    logits: DLPackTensor,
    *,
    allowed: DLPackTensor | None = None,
    bias_start: DLPackTensor | None = None,
    bias_ids: DLPackTensor | None = None,
    bias: DLPackTensor | None = None,
    token_start: DLPackTensor | None = None,
    tokens: DLPackTensor | None = None,
    num_prompt_tokens: DLPackTensor | None = None,
    repetition_penalty: DLPackTensor | None = None,
    frequency_penalty: DLPackTensor | None = None,
    presence_penalty: DLPackTensor | None = None,
    counts: DLPackTensor | None = None,
) -> None:
    """In place: masks, bias, penalties (cuda/ops.h, LogitsRows)."""

def logprobs(
    logits: DLPackTensor,
    tokens: DLPackTensor,
    workspace: DLPackTensor,
    out_ids: DLPackTensor,
    out_logprobs: DLPackTensor,
    out_ranks: DLPackTensor,
) -> None: ...
