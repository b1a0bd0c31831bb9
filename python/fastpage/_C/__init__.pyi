"""libfastpage as Python sees it. Needs numpy only; tensors are anything with `__dlpack__`."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from . import ops as ops

__version__: str

class Error(RuntimeError): ...
class InvalidArgument(Error, ValueError): ...
class ResourceExhausted(Error): ...

class DLPackTensor(Protocol):
    """numpy arrays, torch tensors, ...: CPU memory only."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

# ---------------------------------------------------------------- core (bind_core.cc)

class SamplingParams:
    """All fields of fastpage/sampling_params.h, as keyword arguments and attributes."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    allowed_token_ids: list[int]
    bad_words: list[list[int]]
    max_tokens: int  # -1: until max_model_len
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None
    logprobs: int  # -1: none
    prompt_logprobs: int  # -1: none
    def __init__(self, **kwargs: Any) -> None: ...
    def validate(self, vocab_size: int) -> None: ...

class SchedulerConfig:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    long_prefill_token_threshold: int
    enable_prefix_caching: bool
    policy: str  # "fcfs" | "priority"
    hash_key_lo: int
    hash_key_hi: int
    eos_token_ids: list[int]
    def __init__(self, **kwargs: Any) -> None: ...

class SchedulerStats:
    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    kv_slots_allocated: int
    kv_slots_used: int

class SchedulerOutput:
    """Arrays, one entry per scheduled sequence; views that are valid until the next schedule()."""

    step_id: int
    num_scheduled_tokens: int
    num_preempted: int
    request_ids: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int32]
    num_computed_tokens: npt.NDArray[np.int32]
    num_new_tokens: npt.NDArray[np.int32]
    samples: npt.NDArray[np.bool_]

class SequenceUpdates:
    request_ids: npt.NDArray[np.uint64]
    new_token_ids: npt.NDArray[np.int32]  # -1: none
    finish_reasons: npt.NDArray[np.uint8]  # FinishReason

class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None: ...
    def add_request(
        self,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int32],
        params: SamplingParams,
        seed: int = 0,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int: ...
    def abort(self, request_id: int) -> bool: ...
    def has_unfinished(self) -> bool: ...
    def schedule(self) -> SchedulerOutput: ...
    def prepare(self, step: SchedulerOutput, batch: InputBatch) -> None: ...
    def update(
        self, step: SchedulerOutput, sampled_token_ids: npt.NDArray[np.int32]
    ) -> SequenceUpdates: ...
    def reset_prefix_cache(self) -> bool: ...
    def stats(self) -> SchedulerStats: ...
    def check_integrity(self) -> None: ...

class InputBatch:
    """fastpage/input_batch.h. The arrays are views: valid until the next step."""

    step_id: int
    num_seqs: int
    num_tokens: int
    num_logits: int
    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int32]
    query_start_loc: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[
        np.int32
    ]  # [num_seqs][stride]: gathered, one row per sequence of the batch
    logits_indices: npt.NDArray[np.int32]
    block_copies: npt.NDArray[np.int32]  # [copies][2]: src, dst
    def __init__(self) -> None: ...

class TokenLogprobs:
    """Entry 0 is the chosen (or prompt) token, the rest the most likely ones, descending."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int

class ModelRunnerOutput:
    step_id: int
    sampled_token_ids: npt.NDArray[np.int32]
    def __init__(self) -> None: ...

class ModelRunner:
    """Subclass it in Python: execute(batch) begins a step, wait(step_id) ends it."""

    def __init__(self) -> None: ...
    def execute(self, batch: InputBatch) -> None: ...
    def wait(self, step_id: int) -> ModelRunnerOutput: ...

class Sampler:
    def __init__(self, vocab_size: int, num_threads: int = 1) -> None: ...
    def sample(self, logits: npt.NDArray[np.float32], batch: InputBatch) -> ModelRunnerOutput:
        """logits [num_logits, vocab_size], C-contiguous, overwritten: all rows of the step."""

def sample_logits(
    logits: npt.NDArray[np.float32],
    params: Sequence[SamplingParams],
    token_ids: Sequence[Sequence[int]],
    num_prompt_tokens: Sequence[int],
    seeds: Sequence[int],
    eos_token_ids: Sequence[int] = (),
    num_threads: int = 1,
) -> tuple[npt.NDArray[np.int32], list[TokenLogprobs | None]]:
    """The sampler without an engine: row i of `logits` under params[i]. `logits` is not changed."""

class EngineConfig:
    scheduler: SchedulerConfig
    vocab_size: int
    seed: int
    random_hash_key: bool
    def __init__(self, **kwargs: Any) -> None: ...

class FinishReason:
    """An enum: NONE, STOP, LENGTH, ABORT."""

    NONE: FinishReason
    STOP: FinishReason
    LENGTH: FinishReason
    ABORT: FinishReason
    value: int
    name: str

class RequestOutput:
    request_id: int
    index: int
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_token_id: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

class StepOutput:
    step_id: int
    num_tokens: int
    outputs: list[RequestOutput]

class EngineStats:
    scheduler: SchedulerStats
    num_steps: int
    num_computed_tokens: int
    num_generated_tokens: int
    schedule_seconds: float
    model_seconds: float

class Engine:
    """step() runs without the GIL (it takes it only to call a Python ModelRunner)."""

    def __init__(self, config: EngineConfig, runner: ModelRunner) -> None: ...
    def add_request(
        self,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int32],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int: ...
    def abort(self, request_id: int) -> bool: ...
    def step(self) -> StepOutput: ...
    def has_unfinished(self) -> bool: ...
    def wait_for_work(self, timeout_seconds: float) -> bool: ...
    def wake(self) -> None: ...
    def reset_prefix_cache(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def check_integrity(self) -> None: ...

# ---------------------------------------------------------------- program (bind_program.cc)

class Operand:
    buffer: int
    offset: int
    cols: int
    def __init__(self, buffer: int, offset: int = 0, cols: int = 0) -> None: ...

class Buffer:
    name: str
    kind: str  # "activation" | "weight"
    rows: str  # "tokens" | "logits" | "fixed"
    shape: list[int]

class Op:
    kind: str
    inputs: list[Operand]
    outputs: list[Operand]
    attrs: dict[str, int | float | str]

class Program:
    def __init__(self) -> None: ...
    def add_activation(self, name: str, rows: str, cols: int) -> int: ...
    def add_weight(self, name: str, shape: Sequence[int]) -> int: ...
    def add_op(
        self,
        kind: str,
        inputs: Sequence[Operand],
        outputs: Sequence[Operand],
        attrs: dict[str, int | float | str] = ...,
    ) -> None: ...
    def set_output(self, buffer: int) -> None: ...
    @property
    def buffers(self) -> list[Buffer]: ...
    @property
    def ops(self) -> list[Op]: ...
    @property
    def output(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def kv_cache_spec(self) -> tuple[int, int, int]:
        """(num_layers, num_kv_heads, head_dim)"""
    def validate(self) -> None: ...
    def workspace_bytes(self, max_tokens: int, max_logits: int) -> int: ...
    def __str__(self) -> str: ...

class ThreadPool:
    def __init__(self, num_threads: int = 0) -> None: ...
    @property
    def num_threads(self) -> int: ...

class CpuExecutor:
    def __init__(
        self,
        program: Program,
        *,
        num_kv_blocks: int,
        weight_dtype: str = "bfloat16",
        kv_cache_dtype: str = "bfloat16",
        block_size: int = 16,
        max_num_tokens: int = 2048,
        max_num_logits: int = 256,
        pool: ThreadPool | None = None,
    ) -> None: ...
    def load_weight(self, name: str, weight: DLPackTensor, source_dtype: str | None = None) -> None:
        """source_dtype="bfloat16": `weight` is a uint16 array that holds bfloat16 bits."""
    def finish_loading(self) -> None: ...
    def forward(self, batch: InputBatch) -> npt.NDArray[np.float32]:
        """All logits of the step, [num_logits, vocab_size]: for tests."""
    def forward_arrays(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slot_mapping: npt.NDArray[np.int32],
        query_start_loc: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        logits_indices: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """forward() with an InputBatch made of arrays."""
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_cache_bytes(self) -> int: ...
    @staticmethod
    def kv_block_bytes(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: str, block_size: int
    ) -> int: ...
    def set_profiling(self, on: bool) -> None: ...
    def profile(self) -> dict[str, float]: ...

class ProgramRunner(ModelRunner):
    def __init__(self, executor: CpuExecutor) -> None: ...
