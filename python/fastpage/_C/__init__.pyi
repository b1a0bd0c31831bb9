"""libfastpage as Python sees it. Needs numpy only; tensors are anything with `__dlpack__`."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, overload, type_check_only

import numpy as np
import numpy.typing as npt

from . import cuda as cuda
from . import ops as ops

__version__: str
__channel_version__: int

class Error(RuntimeError): ...
class InvalidArgument(Error, ValueError): ...
class ResourceExhausted(Error): ...

@type_check_only
class DLPackTensor(Protocol):
    """numpy arrays, torch tensors, ...: CPU memory only."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

# ------------------------------------------- core (bind_core.cc, bind_scheduler.cc, bind_engine.cc)

class SamplingParams:
    """All fields of fastpage/sampling_params.h, as keyword arguments and attributes."""

    n: int
    best_of: int  # 0: n
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
    beam_width: int  # 0: no beam search
    length_penalty: float
    early_stopping: bool | Literal["never"]
    def __init__(self, **kwargs: Any) -> None: ...
    def validate(self, vocab_size: int) -> None: ...

class SchedulerConfig:
    """All fields of fastpage/scheduler.h, as keyword arguments and attributes."""

    num_blocks: int
    num_host_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    max_num_waiting_tokens: int
    long_prefill_token_threshold: int
    max_num_partial_prefills: int
    enable_prefix_caching: bool
    policy: str  # "fcfs" | "priority"
    swap_cost_per_block: float
    max_steps_in_flight: int
    num_speculative_tokens: int
    prompt_lookup_min: int
    prompt_lookup_max: int
    enable_kv_events: bool
    hash_key_lo: int
    hash_key_hi: int
    eos_token_ids: list[int]
    def __init__(self, **kwargs: Any) -> None: ...
    def validate(self) -> None: ...

class SchedulerStats:
    """fastpage/scheduler.h says what each counts."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_waiting_tokens(self) -> int: ...  # prompt tokens never yet admitted
    @property
    def num_running(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_host_blocks(self) -> int: ...
    @property
    def num_cached_host_blocks(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_preemptions_swap(self) -> int: ...
    @property
    def prefix_cache_queries(self) -> int: ...
    @property
    def prefix_cache_hits(self) -> int: ...
    @property
    def preempted_cache_queries(self) -> int: ...
    @property
    def preempted_cache_hits(self) -> int: ...
    @property
    def num_blocks_swapped_out(self) -> int: ...
    @property
    def num_blocks_swapped_in(self) -> int: ...
    @property
    def num_blocks_copied(self) -> int: ...
    @property
    def num_draft_tokens(self) -> int: ...
    @property
    def num_accepted_tokens(self) -> int: ...
    @property
    def kv_slots_allocated(self) -> int: ...
    @property
    def kv_slots_used(self) -> int: ...

class KvEvent:
    """A block that became findable in the prefix cache, or no longer is: fastpage/kv_events.h."""

    @property
    def kind(self) -> str: ...  # "stored" | "removed" | "cleared"
    @property
    def tier(self) -> str: ...  # "device" | "host"
    @property
    def hash(self) -> bytes | None: ...
    @property
    def parent_hash(self) -> bytes | None: ...
    @property
    def token_ids(self) -> list[int]: ...

class SchedulerOutput:
    """Arrays, one entry per scheduled sequence: views that are valid until the schedule() after the
    next. Copies are the transfers, [n][2]."""

    @property
    def step_id(self) -> int: ...
    @property
    def num_scheduled_tokens(self) -> int: ...
    @property
    def num_preempted(self) -> int: ...
    @property
    def request_ids(self) -> npt.NDArray[np.uint64]: ...
    @property
    def indices(self) -> npt.NDArray[np.int32]: ...  # of the sample within its request
    @property
    def rows(self) -> npt.NDArray[np.int32]: ...
    @property
    def num_computed_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def num_new_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def num_sampling_rows(self) -> npt.NDArray[np.int32]: ...
    @property
    def swap_outs(self) -> npt.NDArray[np.int32]: ...  # [swaps][2]: device block, host block
    @property
    def block_copies(self) -> npt.NDArray[np.int32]: ...  # [copies][2]: src, dst
    @property
    def swap_ins(self) -> npt.NDArray[np.int32]: ...  # [swaps][2]: device block, host block

class SequenceUpdates:
    """Arrays, one entry per update, valid until the next update(). The tokens of all updates follow
    one another in new_token_ids; they are read from the array that update() was given, which must
    not be changed before."""

    @property
    def request_ids(self) -> npt.NDArray[np.uint64]: ...
    @property
    def indices(self) -> npt.NDArray[np.int32]: ...  # of the sample; of a finished beam: its rank
    @property
    def num_new_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def new_token_ids(self) -> npt.NDArray[np.int32]: ...  # [sum of num_new_tokens]
    @property
    def sampling_rows(self) -> npt.NDArray[np.int32]: ...  # of the first new token; -1: none
    @property
    def finish_reasons(self) -> npt.NDArray[np.uint8]: ...  # FinishReason
    @property
    def stop_token_ids(self) -> npt.NDArray[np.int32]: ...  # -1: none
    @property
    def num_output_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def num_cached_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def scores(self) -> npt.NDArray[np.float32]: ...  # beams only

class Scheduler:
    """fastpage/scheduler.h. Not to be called from several threads at once."""

    def __init__(self, config: SchedulerConfig) -> None: ...
    def add_request(
        self,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int32],
        params: SamplingParams,
        seed: int = 0,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int: ...
    @overload
    def abort(self, request_id: int) -> bool: ...
    @overload
    def abort(self, request_id: int, index: int) -> bool:
        """One sample of it; the others go on."""
    def has_unfinished(self) -> bool: ...
    def fork(self, request_id: int, index: int, seed: int) -> int:
        """Adds a sample that continues what sample `index` has so far. Returns its index."""
    def propose(
        self, request_id: int, index: int, token_ids: Sequence[int] | npt.NDArray[np.int32]
    ) -> bool:
        """Tokens that may come next, for the next step that reaches the sample's end to check."""
    def schedule(self) -> SchedulerOutput: ...
    def prepare(self, step: SchedulerOutput, batch: InputBatch) -> None: ...
    def update(
        self,
        step: SchedulerOutput,
        sampled_token_ids: Sequence[int] | npt.NDArray[np.int32],
        logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> SequenceUpdates:
        """logprobs: one per sampling row, only needed for beams."""
    def discard(self, step: SchedulerOutput) -> None:
        """The step failed or was not run; so did every later one under way."""
    def reset_prefix_cache(self) -> bool: ...
    def take_kv_events(self) -> list[KvEvent]:
        """Those since the last call; with enable_kv_events."""
    def stats(self) -> SchedulerStats: ...
    def check_integrity(self) -> None: ...
    def record(self, path: str | None) -> None:
        """From here on every call is written to a new file, for replay(); before the first request.
        It holds all prompts and outputs. None: no longer."""

def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request that has this seed."""

class ReplayResult:
    @property
    def num_calls(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def complete(self) -> bool: ...  # False: the log ends in the midst of a call
    @property
    def divergence(self) -> str: ...  # "": everything went as recorded

def replay(path: str, check_integrity: bool = True) -> ReplayResult:
    """Runs what Scheduler.record() wrote on a new scheduler, and compares: fastpage/replay.h."""

class InputBatch:
    """fastpage/input_batch.h. The arrays are views: valid until the next step."""

    @property
    def step_id(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def num_samples(self) -> int: ...  # tokens to be sampled
    @property
    def token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def positions(self) -> npt.NDArray[np.int32]: ...
    @property
    def slot_mapping(self) -> npt.NDArray[np.int32]: ...
    @property
    def query_start_loc(self) -> npt.NDArray[np.int32]: ...
    @property
    def seq_lens(self) -> npt.NDArray[np.int32]: ...
    @property
    def block_tables(self) -> npt.NDArray[np.int32]:
        """[num_seqs][stride]: gathered, one row per sequence of the batch."""
    def first_blocks(self, count: int) -> npt.NDArray[np.int32]:
        """[num_seqs][count]: of each row of block_tables."""
    @property
    def logits_indices(self) -> npt.NDArray[np.int32]: ...
    @property
    def sampling_logits_rows(self) -> npt.NDArray[np.int32]:
        """[num_samples]: the row of the logits, which samples of one prompt share."""
    @property
    def swap_outs(self) -> npt.NDArray[np.int32]: ...  # [swaps][2]: device block, host block
    @property
    def block_copies(self) -> npt.NDArray[np.int32]: ...  # [copies][2]: src, dst
    @property
    def swap_ins(self) -> npt.NDArray[np.int32]: ...  # [swaps][2]: device block, host block
    @property
    def future_tokens(self) -> npt.NDArray[np.int32]:
        """[tokens][2]: index of token_ids, sampling row of the step before."""
    def __init__(self) -> None: ...
    def resolve(self, sampled_token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Writes the future tokens, given what the step before sampled."""
    @property
    def reads_tokens(self) -> bool:
        """Whether sampling_arrays() depends on tokens' values: future ones are resolved before."""
    def sampling_arrays(self, vocab_size: int) -> SamplingArrays:
        """Of the sampling rows, for a sampler on a device."""

class SamplingArrays:
    """fastpage/sampling_arrays.h."""

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name; what changes logits only if a row asks for it."""
    @property
    def unsupported(self) -> dict[int, str]:
        """Sampling rows that only the Sampler can sample, and why."""

class TokenLogprobs:
    """Entry 0 is the chosen (or prompt) token, the rest the most likely ones, descending."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]: ...
    @property
    def rank(self) -> int: ...
    def __init__(self, token_ids: Sequence[int], logprobs: Sequence[float], rank: int) -> None: ...

class ModelRunnerOutput:
    step_id: int
    sampled_token_ids: npt.NDArray[np.int32]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    def __init__(self) -> None: ...

class ModelRunner:
    """Subclass it in Python: execute(batch) begins a step, wait(step_id) ends it.

    With max_steps_in_flight() == 2 a second step may be begun before the first is waited for; a
    batch with future_tokens is to be resolve()d first, see fastpage/model_runner.h.
    """

    def __init__(self) -> None: ...
    def execute(self, batch: InputBatch) -> None:
        """The batch must stay alive until wait(batch.step_id) has returned."""
    def max_steps_in_flight(self) -> int: ...
    def wait(self, step_id: int) -> ModelRunnerOutput: ...

class Sampler:
    def __init__(self, vocab_size: int, num_threads: int = 1) -> None: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        batch: InputBatch,
        rows: Sequence[int] | None = None,
    ) -> ModelRunnerOutput:
        """logits [num_logits, vocab_size], C-contiguous: all rows of the step.

        rows: only these of the batch's sampling rows, from a row of logits each.
        """

def sample_logits(
    logits: npt.NDArray[np.float32],
    params: Sequence[SamplingParams],
    token_ids: Sequence[Sequence[int]],
    num_prompt_tokens: Sequence[int],
    seeds: Sequence[int],
    eos_token_ids: Sequence[int] = (),
    num_threads: int = 1,
) -> tuple[npt.NDArray[np.int32], list[TokenLogprobs | None]]:
    """The sampler without an engine: row i of `logits` under params[i]."""

class EngineConfig:
    scheduler: SchedulerConfig
    vocab_size: int
    seed: int
    random_hash_key: bool
    async_scheduling: bool
    def __init__(self, **kwargs: Any) -> None: ...

class FinishReason:
    """An enum: NONE, STOP, LENGTH, ABORT."""

    NONE: FinishReason
    STOP: FinishReason
    LENGTH: FinishReason
    ABORT: FinishReason
    @property
    def value(self) -> int: ...
    @property
    def name(self) -> str: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    __members__: ClassVar[dict[str, FinishReason]]

class RequestOutput:
    @property
    def request_id(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def new_token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[TokenLogprobs]: ...
    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def stop_token_id(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def cumulative_logprob(self) -> float: ...  # logprobs, best_of > n, beams; otherwise 0
    @property
    def score(self) -> float: ...  # beams only
    @property
    def queue_seconds(self) -> float: ...  # until the first step that computed something of it

class StepOutput:
    @property
    def step_id(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def outputs(self) -> list[RequestOutput]: ...
    @property
    def kv_events(self) -> list[KvEvent]: ...

class EngineStats:
    def __init__(self) -> None: ...
    @property
    def scheduler(self) -> SchedulerStats: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...
    @property
    def schedule_seconds(self) -> float: ...
    @property
    def prepare_seconds(self) -> float: ...
    @property
    def model_seconds(self) -> float: ...
    @property
    def sample_seconds(self) -> float: ...
    @property
    def output_seconds(self) -> float: ...

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
    @overload
    def abort(self, request_id: int) -> bool: ...
    @overload
    def abort(self, request_id: int, index: int) -> bool:
        """One sample of it; the others go on. False for one of beams or best_of > n."""
    def step(self) -> StepOutput: ...
    def has_unfinished(self) -> bool: ...
    def wait_for_work(self, timeout_seconds: float) -> bool: ...
    def wake(self) -> None: ...
    def record(self, path: str) -> None:
        """See Scheduler.record(). Before the first request."""
    def reset_prefix_cache(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def check_integrity(self) -> None: ...

# ---------------------------------------------------------------- channel (bind_channel.cc)

class EngineNews:
    """One message from the engine to a front end: fastpage/engine_channel.h says which fields
    belong to which kind."""

    class Kind:
        """An enum: ACCEPTED, REFUSED, STEP, STEP_FAILED, RESET, ALIVE."""

        ACCEPTED: EngineNews.Kind
        REFUSED: EngineNews.Kind
        STEP: EngineNews.Kind
        STEP_FAILED: EngineNews.Kind
        RESET: EngineNews.Kind
        ALIVE: EngineNews.Kind
        @property
        def value(self) -> int: ...
        @property
        def name(self) -> str: ...
        def __int__(self) -> int: ...
        def __index__(self) -> int: ...
        __members__: ClassVar[dict[str, EngineNews.Kind]]

    class Refusal:
        """An enum: INVALID_ARGUMENT, RESOURCE_EXHAUSTED, NAME_IN_USE."""

        INVALID_ARGUMENT: EngineNews.Refusal
        RESOURCE_EXHAUSTED: EngineNews.Refusal
        NAME_IN_USE: EngineNews.Refusal
        @property
        def value(self) -> int: ...
        @property
        def name(self) -> str: ...
        def __int__(self) -> int: ...
        def __index__(self) -> int: ...
        __members__: ClassVar[dict[str, EngineNews.Refusal]]

    @property
    def kind(self) -> EngineNews.Kind: ...
    @property
    def request_id(self) -> int: ...
    @property
    def error(self) -> str: ...
    @property
    def refusal(self) -> EngineNews.Refusal: ...
    @property
    def done(self) -> bool: ...
    @property
    def progress(self) -> int: ...
    @property
    def step(self) -> StepOutput: ...
    @property
    def stats(self) -> EngineStats: ...

class EngineServer:
    """Steps an engine for the front ends at the other ends of some sockets, which it takes over:
    detach() them."""

    def __init__(
        self, engine: Engine, sockets: Sequence[int], *, takes_more: bool = False
    ) -> None: ...
    def add_front_end(self, socket: int) -> None:
        """From any thread, with takes_more: another one, whose socket it takes over."""
    def run(self) -> None:
        """Until every front end has closed its socket or stop() is called. Without the GIL. On
        Python's main thread, no Python signal handler runs meanwhile."""
    def stop(self) -> None:
        """From any thread."""

class EngineClient:
    """An engine behind a socket, which it takes over. No call waits."""

    def __init__(self, socket: int) -> None: ...
    def fileno(self) -> int: ...
    def add_request(
        self,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int32],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        name: str = "",
    ) -> int:
        """ACCEPTED or REFUSED will follow. Raises InvalidArgument for a request of more than 64
        MiB."""
    @overload
    def abort(self, request_id: int) -> None: ...
    @overload
    def abort(self, request_id: int, index: int) -> None: ...
    def reset_prefix_cache(self) -> None:
        """RESET will follow."""
    def ping(self) -> None:
        """ALIVE will follow, also amid a step."""
    @property
    def has_unsent(self) -> bool: ...
    @property
    def num_unsent_bytes(self) -> int: ...
    def flush(self) -> None:
        """When the socket is writable, while has_unsent."""
    def receive(self) -> list[EngineNews]:
        """When the socket is readable. Raises Error, once, for what is no news of an engine."""
    @property
    def closed(self) -> bool:
        """The engine's process has gone, and receive() has returned all that it said."""

# ---------------------------------------------------------------- program (bind_program.cc)

class Operand:
    @property
    def buffer(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def cols(self) -> int: ...
    def __init__(self, buffer: int, offset: int = 0, cols: int = 0) -> None: ...

class Buffer:
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...  # "activation" | "weight"
    @property
    def rows(self) -> str: ...  # "tokens" | "logits" | "fixed"
    @property
    def shape(self) -> list[int]: ...

class Op:
    @property
    def kind(self) -> str: ...
    @property
    def inputs(self) -> list[Operand]: ...
    @property
    def outputs(self) -> list[Operand]: ...
    @property
    def attrs(self) -> dict[str, int | float | str]: ...

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

def passes(target: str = "cpu") -> list[tuple[str, str]]:
    """Names and summaries of the rewrites of a Program that save time on the target ("cpu", "gpu"),
    in the order in which they are applied."""

def apply_passes(program: Program, disabled: Sequence[str] = (), *, target: str = "cpu") -> Program:
    """All of the target's passes but those named; "all" names all."""

def optimized(program: Program, disabled: Sequence[str] = (), *, target: str = "cpu") -> Program:
    """What an executor runs: validated, and all passes applied but those named here or by
    FASTPAGE_DISABLED_PASSES in the environment."""

class ThreadPool:
    def __init__(self, num_threads: int = 0, cpus: list[int] = []) -> None:
        """num_threads 0: the physical cores, or as many as cpus. cpus: where each thread stays."""
    @property
    def num_threads(self) -> int: ...
    @property
    def num_loops(self) -> int:
        """Loops so far that all threads took part in."""
    def run_empty_loops(self, count: int) -> None:
        """To time what a loop costs at least."""

class CpuExecutor:
    def __init__(
        self,
        program: Program,
        *,
        num_kv_blocks: int,
        num_host_kv_blocks: int = 0,
        weight_dtype: str = "bfloat16",
        quantization: str = "none",
        activations: str = "quantized",
        kv_cache_dtype: str = "bfloat16",
        block_size: int = 16,
        max_num_tokens: int = 2048,
        max_num_logits: int = 256,
        disabled_passes: Sequence[str] = (),
        pool: ThreadPool | None = None,
    ) -> None: ...
    def load_weight_blocks(self, name: str, blocks: DLPackTensor, format: str) -> None:
        """The blocks of a GGUF tensor as they are: uint8 [rows, bytes]; q8_0, q4_0 or q4_1."""

    @property
    def program(self) -> Program:
        """As it is run: after the passes."""
    def load_weight(self, name: str, weight: DLPackTensor, source_dtype: str | None = None) -> None:
        """source_dtype="bfloat16": `weight` is a uint16 array that holds bfloat16 bits."""
    def finish_loading(self) -> None: ...
    def apply_transfers(
        self, swap_outs: DLPackTensor, block_copies: DLPackTensor, swap_ins: DLPackTensor
    ) -> None:
        """[n][2] each, in every layer: device and host blocks; source and destination; again."""
    def forward(self, batch: InputBatch) -> npt.NDArray[np.float32]:
        """All logits of the step, [num_logits, vocab_size], its transfers done first: for tests."""
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
    @property
    def kv_host_cache_bytes(self) -> int: ...
    @staticmethod
    def kv_block_bytes(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: str, block_size: int
    ) -> int: ...
    def set_profiling(self, on: bool) -> None: ...
    def profile(self) -> dict[str, float]: ...

class ProgramRunner(ModelRunner):
    """With max_steps_in_flight=2 a thread of its own computes; execute() only enqueues."""

    def __init__(self, executor: CpuExecutor, max_steps_in_flight: int = 1) -> None: ...
