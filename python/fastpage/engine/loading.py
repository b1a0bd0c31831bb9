"""From EngineArgs to a running core: checkpoint, tokenizer, size of the KV cache, weights."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpage import _C
from fastpage.checkpoints import Checkpoint, open_checkpoint
from fastpage.checkpoints.safetensors import read_json
from fastpage.engine.args import EngineArgs, parse_cpus
from fastpage.engine.memory import available_bytes, format_bytes, parse_bytes
from fastpage.errors import CheckpointError, InvalidArgument, ResourceExhausted
from fastpage.models.loader import Model, build_model
from fastpage.models.registry import architecture_names
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastpage.executors.torch import TorchExecutor

# Of generation_config.json, to our names. (Its do_sample counts for nothing, as in vLLM.)
_RECOMMENDED = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"int8": 1, "int4": 1}  # at most
_BAR_AFTER_SECONDS = 1.0
# Without kv_cache_memory, the cache takes this share of the memory left beside the weights ...
_DEFAULT_CACHE_SHARE = 0.4
# ... and at most this much.
_DEFAULT_CACHE_LIMIT = 4 << 30
# On a GPU nobody else needs what is left, but for a step's activations, logits and graphs.
_GPU_CACHE_SHARE = 0.8
# The KV cache is filled that many times with what may wait for it: who comes last waits as long as
# that takes, and the queue's memory (some 40 bytes a token, most of them in the front end) is a
# fraction of the cache's.
_DEFAULT_CACHES_WAITING = 16
# Of the KV cache: a slot, block * block_size + offset, is an int32.
_MOST_SLOTS = 2**31 - 1


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded, and how: every "auto" and None of the EngineArgs decided."""

    served_model_name: str
    model: str
    architecture: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    has_chat_template: bool
    block_size: int
    num_kv_blocks: int
    kv_block_bytes: int
    weight_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    scheduling_policy: str
    num_host_kv_blocks: int = 0
    async_scheduling: bool = False
    num_speculative_tokens: int = 0
    max_logprobs: int = 1024

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def host_cache_bytes(self) -> int:
        return self.num_host_kv_blocks * self.kv_block_bytes

    def check_priority(self, priority: int) -> None:
        if priority != 0 and self.scheduling_policy != "priority":
            raise InvalidArgument(
                f"priority={priority} has no meaning with scheduling_policy="
                f'"{self.scheduling_policy}": start with "priority", or leave it out'
            )

    def check_logprobs(self, params: _C.SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value > self.max_logprobs:
                raise InvalidArgument(
                    f"{name} must be between 0 and {self.max_logprobs} (max_logprobs), got {value}"
                )

    @property
    def max_concurrency(self) -> float:
        """How many requests of max_model_len tokens the KV cache holds at once."""
        blocks = math.ceil(self.max_model_len / self.block_size)
        return min(self.num_kv_blocks / blocks, self.max_num_seqs)


@dataclass(kw_only=True)
class ServedModel:
    """What a front end knows of a model that somebody else computes."""

    tokenizer: Tokenizer
    info: ModelInfo
    sampling_defaults: dict[str, Any]  # fields of SamplingParams
    phases: dict[str, float]  # seconds that each part of the loading took

    def default_sampling_params(self) -> SamplingParams:
        """What the generation_config.json that was chosen recommends, as vLLM reads it."""
        return SamplingParams(**self.sampling_defaults)


@dataclass(kw_only=True)
class LoadedModel(ServedModel):
    engine: _C.Engine
    runner: _C.ModelRunner  # the engine's


@dataclass
class PhaseTimer:
    """Seconds by name, in the order in which they came."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def load_model(
    args: EngineArgs,
    progress: Callable[[int, int], None] | None = None,
    look_at: Callable[[Checkpoint], None] | None = None,
) -> LoadedModel:
    """Raises InvalidArgument (or ModelError, a kind of it) or ResourceExhausted, one line each.
    `progress` is called with (weights loaded, weights in all); without it a terminal shows a bar
    if loading takes a while. `look_at` is called with the checkpoint before it is read, and may
    raise."""
    phase = PhaseTimer()
    with phase("checkpoint"):
        checkpoint = open_checkpoint(args.model, args.revision, args.load_format)
        if look_at is not None:
            look_at(checkpoint)
        model = build_model(checkpoint.config, args.max_model_len, checkpoint)
        sampling_defaults = _sampling_defaults(args, checkpoint)
    with phase("tokenizer"):
        tokenizer = open_tokenizer(args, checkpoint)
    cpus = [] if args.cpu_affinity is None else parse_cpus(args.cpu_affinity)
    pool = _C.ThreadPool(args.threads, cpus)
    info = _decide(args, checkpoint, model, tokenizer, pool.num_threads)
    config = _engine_config(args, info)
    config.scheduler.validate()  # before minutes are spent on the weights
    with phase("weights"), _LoadingBar() as bar:
        runner, weight_bytes = _load_runner(
            args, info, checkpoint, model, pool, progress or bar.update
        )
    info = replace(info, weight_bytes=weight_bytes)
    with phase("engine"):
        engine = _C.Engine(config, runner)
        if args.record_scheduler is not None:
            engine.record(args.record_scheduler)
    return LoadedModel(
        engine=engine,
        runner=runner,
        tokenizer=tokenizer,
        info=info,
        sampling_defaults=sampling_defaults,
        phases=phase.seconds,
    )


def _sampling_defaults(args: EngineArgs, checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of SamplingParams, checked before a request needs them."""
    if args.generation_config == "vllm":
        return {}
    config, source = checkpoint.generation_config, checkpoint.path / "generation_config.json"
    if args.generation_config != "auto":
        source = Path(args.generation_config) / "generation_config.json"
        config = read_json(source)
    fields: dict[str, Any] = {
        ours: config[theirs]
        for theirs, ours in _RECOMMENDED.items()
        if config.get(theirs) is not None
    }
    try:
        SamplingParams(**fields)
    except InvalidArgument as error:
        raise CheckpointError(
            f"{source}: {error} (generation_config='vllm' ignores the file's defaults)"
        ) from None
    return fields


class _LoadingBar:
    """On a terminal, once a second has passed: till then tqdm is not even imported."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _LoadingBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            if not self._is_terminal or time.perf_counter() - self._start < _BAR_AFTER_SECONDS:
                return
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="Loading weights", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)


def open_tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Tokenizer:
    if args.tokenizer is None:
        return checkpoint.tokenizer()
    path = Path(args.tokenizer)
    if path.is_dir():
        return Tokenizer.from_directory(path)
    return open_checkpoint(path).tokenizer()


def _decide(
    args: EngineArgs,
    checkpoint: Checkpoint,
    model: Model,
    tokenizer: Tokenizer,
    num_threads: int,
) -> ModelInfo:
    max_model_len = model.spec.max_position_embeddings
    dtype = checkpoint.source_dtype if args.dtype == "auto" else args.dtype
    kv_cache_dtype = dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    num_layers, num_kv_heads, head_dim = model.program.kv_cache_spec
    if kv_cache_dtype == "float8_e4m3":  # which the CPU does not know
        block_bytes = 2 * num_layers * args.block_size * num_kv_heads * head_dim
    else:
        block_bytes = _C.CpuExecutor.kv_block_bytes(
            num_layers, num_kv_heads, head_dim, kv_cache_dtype, args.block_size
        )
    weight_bytes = _QUANTIZED_BYTES.get(args.quantization, _ITEM_BYTES[dtype]) * sum(
        math.prod(buffer.shape) for buffer in model.program.buffers if buffer.kind == "weight"
    )
    num_host_kv_blocks = _num_host_kv_blocks(args, block_bytes)
    taken = weight_bytes + block_bytes * _num_blocks_beside(args.executor, num_host_kv_blocks)
    return ModelInfo(
        served_model_name=args.served_model_name or checkpoint.name,
        model=args.model,
        architecture=architecture_names(checkpoint.config)[0],
        dtype=dtype,
        quantization=args.quantization,
        kv_cache_dtype=kv_cache_dtype,
        vocab_size=model.program.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        has_chat_template=tokenizer.chat_template is not None,
        block_size=args.block_size,
        num_kv_blocks=_num_kv_blocks(args, max_model_len, block_bytes, taken),
        kv_block_bytes=block_bytes,
        weight_bytes=weight_bytes,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_threads=num_threads,
        scheduling_policy=args.scheduling_policy,
        num_host_kv_blocks=num_host_kv_blocks,
        async_scheduling=args.async_scheduling,
        num_speculative_tokens=args.num_speculative_tokens,
        max_logprobs=args.max_logprobs,
    )


def _num_host_kv_blocks(args: EngineArgs, block_bytes: int) -> int:
    if args.host_cache_memory is None:
        return 0
    size = parse_bytes(args.host_cache_memory, "host_cache_memory")
    if size < block_bytes:
        raise ResourceExhausted(
            f"host_cache_memory={args.host_cache_memory} is too little for one KV block: that "
            f"takes {block_bytes} bytes"
        )
    return min(size // block_bytes, _MOST_SLOTS // args.block_size)


def _num_blocks_beside(executor: str, num_host_kv_blocks: int) -> int:
    """In the memory that the KV cache is in."""
    if executor != "cuda":
        return num_host_kv_blocks
    if num_host_kv_blocks == 0:
        return 0
    from fastpage.executors.block_transfers import num_staging_blocks

    return num_staging_blocks(num_host_kv_blocks)


def _num_kv_blocks(args: EngineArgs, max_model_len: int, block_bytes: int, taken: int) -> int:
    """`taken`: bytes of weights and whatever else has to be there beside the cache."""
    needed = math.ceil(max_model_len / args.block_size)
    if args.num_kv_blocks is not None:
        blocks, given = args.num_kv_blocks, f"num_kv_blocks={args.num_kv_blocks}"
    elif args.kv_cache_memory is not None:
        size = parse_bytes(args.kv_cache_memory, "kv_cache_memory")
        blocks = min(size // block_bytes, _MOST_SLOTS // args.block_size)
        given = f"kv_cache_memory={args.kv_cache_memory}"
    else:
        size, free = _default_cache_size(args, taken)
        blocks = min(
            size // block_bytes, needed * args.max_num_seqs, _MOST_SLOTS // args.block_size
        )
        given = f"the memory that is free ({format_bytes(free)} beside the weights)"
    if blocks < needed:
        raise ResourceExhausted(
            f"{given} is too little for one sequence of max_model_len={max_model_len} tokens: that "
            f"takes {needed * block_bytes} bytes ({needed} blocks of {block_bytes} bytes), and "
            f"{blocks * block_bytes} ({blocks} blocks) are there; give more, or a smaller "
            "max_model_len"
        )
    return blocks


def _default_cache_size(args: EngineArgs, taken: int) -> tuple[int, int]:
    """And the memory that is free beside what is taken."""
    if args.executor == "cuda":
        from fastpage.executors.cuda import free_bytes

        free = max(0, free_bytes() - taken)
        return int(free * _GPU_CACHE_SHARE), free
    free = max(0, available_bytes() - taken)
    return min(int(free * _DEFAULT_CACHE_SHARE), _DEFAULT_CACHE_LIMIT), free


def _load_runner(
    args: EngineArgs,
    info: ModelInfo,
    checkpoint: Checkpoint,
    model: Model,
    pool: _C.ThreadPool,
    progress: Callable[[int, int], None] | None,
) -> tuple[_C.ModelRunner, int]:
    """The runner, and the bytes of weights that a step reads."""
    options: dict[str, Any] = {
        "num_kv_blocks": info.num_kv_blocks,
        "weight_dtype": info.dtype,
        "kv_cache_dtype": info.kv_cache_dtype,
        "block_size": info.block_size,
        "num_host_kv_blocks": info.num_host_kv_blocks,
    }
    max_steps_in_flight = 2 if info.async_scheduling else 1
    if args.executor == "cuda":
        runner = _load_cuda_runner(args, info, checkpoint, model, options, progress)
        return runner, info.weight_bytes
    if args.executor == "torch":
        from fastpage.executors.torch import TorchExecutor, TorchRunner

        reference = TorchExecutor(model.program, **options)
        model.load_weights(checkpoint, reference, progress=progress)
        _load_kv_scales(info, checkpoint, model, reference)
        return TorchRunner(reference, info.num_threads, max_steps_in_flight), info.weight_bytes
    executor = _C.CpuExecutor(
        model.program,
        **options,
        max_num_tokens=info.max_num_batched_tokens,
        max_num_logits=info.max_num_seqs,
        quantization="none" if info.quantization == "gguf" else info.quantization,
        activations="quantized" if args.quantize_activations else "float32",
        pool=pool,
    )
    keep_blocks = info.quantization == "gguf"
    model.load_weights(checkpoint, executor, progress=progress, keep_blocks=keep_blocks)
    return _C.ProgramRunner(executor, max_steps_in_flight), executor.weight_bytes


def _load_cuda_runner(
    args: EngineArgs,
    info: ModelInfo,
    checkpoint: Checkpoint,
    model: Model,
    options: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> _C.ModelRunner:
    from fastpage.executors.cuda import CudaExecutor, naming_what_to_reduce
    from fastpage.executors.cuda_runner import new_runner
    from fastpage.executors.decode_graphs import default_sizes

    sizes = args.cudagraph_capture_sizes or default_sizes(info.max_num_seqs)
    with naming_what_to_reduce():
        executor = CudaExecutor(
            model.program, dtype=info.dtype, batch_invariant=args.batch_invariant, **options
        )
        model.load_weights(checkpoint, executor, progress=progress)
        _load_kv_scales(info, checkpoint, model, executor)
        executor.warm_up(
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            graph_sizes=[] if args.enforce_eager else sizes,
        )
        steps = 2 if info.async_scheduling else 1
        return new_runner(executor, info.num_threads, steps, info.max_num_seqs)


def _load_kv_scales(
    info: ModelInfo, checkpoint: Checkpoint, model: Model, executor: TorchExecutor
) -> None:
    if info.kv_cache_dtype != "float8_e4m3":
        return
    for layer, scales in model.kv_scales(checkpoint).items():
        executor.set_kv_scales(layer, *scales)


def _max_num_waiting_tokens(args: EngineArgs, info: ModelInfo) -> int:
    if args.max_num_waiting_tokens is not None:
        return args.max_num_waiting_tokens
    return min(_DEFAULT_CACHES_WAITING * info.num_kv_blocks * info.block_size, _MOST_SLOTS)


def _engine_config(args: EngineArgs, info: ModelInfo) -> _C.EngineConfig:
    scheduler = _C.SchedulerConfig(
        num_blocks=info.num_kv_blocks,
        num_host_blocks=info.num_host_kv_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_num_waiting=args.max_num_waiting,
        max_num_waiting_tokens=_max_num_waiting_tokens(args, info),
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        max_num_partial_prefills=args.max_num_partial_prefills,
        enable_prefix_caching=args.enable_prefix_caching,
        enable_kv_events=bool(args.enable_kv_events),
        policy=args.scheduling_policy,
        num_speculative_tokens=info.num_speculative_tokens,
        prompt_lookup_min=args.prompt_lookup_min,
        prompt_lookup_max=args.prompt_lookup_max,
        eos_token_ids=info.eos_token_ids,
    )
    return _C.EngineConfig(
        scheduler=scheduler,
        vocab_size=info.vocab_size,
        seed=args.seed,
        async_scheduling=info.async_scheduling,
    )
