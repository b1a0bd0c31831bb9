"""EngineArgs: all that an engine can be told, once for Python and for every command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpage.checkpoints import LOAD_FORMATS
from fastpage.engine.memory import parse_bytes
from fastpage.errors import InvalidArgument

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "int8", "float8_e4m3")
POLICIES = ("fcfs", "priority")
EXECUTORS = ("cpu", "torch", "cuda")
QUANTIZATIONS = ("none", "int8", "int4", "gguf")

_GROUPS = {
    "Model": "what to serve",
    "Memory and batching": "how many requests share a step, and the KV cache that they share",
    "Execution": "how it is computed",
}


def full_dtype_name(name: str) -> str:
    return {
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp8": "float8_e4m3",
        "fp8_e4m3": "float8_e4m3",
    }.get(name, name)


def parse_cpus(text: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]"""
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidArgument(f"cpu_affinity={text!r}: give CPUs like 0-31,64")
        begin, end = int(first), int(last or first)
        if not begin <= end < 2**16:
            raise InvalidArgument(f"cpu_affinity={text!r}: {part.strip()} is no range of CPUs")
        cpus += range(begin, end + 1)
    if len(set(cpus)) < len(cpus):
        raise InvalidArgument(f"cpu_affinity={text!r} names a CPU twice")
    return cpus


def _arg(default: Any, group: str, text: str, **options: Any) -> Any:
    """A field that is a command line option too; `options` go to add_argument."""
    metadata = {"group": group, "help": text, "options": options}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class EngineArgs:
    model: str = _arg(
        dataclasses.MISSING,
        "Model",
        "a GGUF file, a directory of safetensors, or a Hugging Face Hub id",
        metavar="PATH",
    )
    tokenizer: str | None = _arg(
        None,
        "Model",
        "a directory or GGUF file with a tokenizer (default: the model's own)",
        metavar="PATH",
    )
    revision: str | None = _arg(
        None, "Model", "branch, tag or commit of a Hub model (default: its main branch)"
    )
    load_format: str = _arg(
        "auto",
        "Model",
        "which files of a directory: safetensors; gguf; pt, pytorch_model.bin, a pickle, read by "
        "torch.load(weights_only=True); auto: safetensors or else gguf (default: %(default)s)",
        choices=LOAD_FORMATS,
    )
    generation_config: str = _arg(
        "auto",
        "Model",
        "where default sampling parameters come from: auto, the model's generation_config.json; "
        "vllm, nowhere: fastpage's own; or a directory with such a file (default: %(default)s)",
        metavar="auto|vllm|PATH",
    )
    served_model_name: str | None = _arg(
        None, "Model", "the name clients call it by (default: --model as given)", metavar="NAME"
    )
    dtype: str = _arg(
        "auto",
        "Model",
        "how weights are kept; auto: as the checkpoint has them",
        choices=DTYPES,
        type=full_dtype_name,
    )
    quantization: str = _arg(
        "none",
        "Model",
        "of the weights at load: int8, one scale a row; int4, a scale and a minimum for each 32 "
        "(embeddings and logits int8); gguf, the Q8_0, Q4_0 and Q4_1 blocks of a GGUF file as they "
        "are; none: --dtype (default: %(default)s)",
        choices=QUANTIZATIONS,
    )
    quantize_activations: bool = _arg(
        True,
        "Model",
        "let activations of the weights' own precision meet them: int8 for int8 and int4 weights, "
        "bf16 for bf16 ones and a bf16 KV cache where the CPU multiplies bf16; off, only the "
        "weights and the cache are rounded, and it is slower (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    max_model_len: int | None = _arg(
        None,
        "Model",
        "longest prompt + output, in tokens (default: what the model was made for)",
        metavar="TOKENS",
        type=int,
    )

    max_logprobs: int = _arg(
        20,
        "Model",
        "most logprobs, and prompt_logprobs, that a request may ask for, up to 1024; each takes "
        "some 170 bytes until the request is done (default: %(default)s)",
        metavar="N",
        type=int,
    )

    kv_cache_memory: int | str | None = _arg(
        None,
        "Memory and batching",
        "memory for the KV cache, e.g. 2GiB (default: 40%% of what is free beside the weights, at "
        "most 4GiB, and no more than could ever be used)",
        metavar="SIZE",
    )
    num_kv_blocks: int | None = _arg(
        None,
        "Memory and batching",
        "the same as a number of blocks; goes before --kv-cache-memory",
        metavar="BLOCKS",
        type=int,
    )
    host_cache_memory: int | str | None = _arg(
        None,
        "Memory and batching",
        "memory for KV blocks that the KV cache has no room for, e.g. 4GiB: they are moved there "
        "and back instead of being computed again (default: none)",
        metavar="SIZE",
    )
    kv_cache_dtype: str = _arg(
        "auto",
        "Memory and batching",
        "how keys and values are kept; auto: as --dtype; int8: with a scale per token and head; "
        "float8_e4m3 (or fp8; with --executor cuda and 16 bits): with the checkpoint's scales",
        choices=KV_CACHE_DTYPES,
        type=full_dtype_name,
    )
    block_size: int = _arg(
        16, "Memory and batching", "tokens in a KV block", metavar="TOKENS", type=int
    )
    enable_prefix_caching: bool = _arg(
        True,
        "Memory and batching",
        "let prompts that begin alike share KV blocks (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    max_num_seqs: int = _arg(
        64, "Memory and batching", "most sequences computed at once", metavar="N", type=int
    )
    max_num_batched_tokens: int = _arg(
        2048,
        "Memory and batching",
        "most tokens in a step: long prompts are computed in chunks of this size",
        metavar="TOKENS",
        type=int,
    )
    long_prefill_token_threshold: int = _arg(
        0,
        "Memory and batching",
        "most tokens of one prompt in a step; 0: no limit of its own",
        metavar="TOKENS",
        type=int,
    )
    max_num_partial_prefills: int = _arg(
        0,
        "Memory and batching",
        "most prompts that are partly computed at once: shorter ones go past those that wait; 0: "
        "no limit",
        metavar="N",
        type=int,
    )
    max_num_waiting: int = _arg(
        4096,
        "Memory and batching",
        "most sequences in the queue; more are refused",
        metavar="N",
        type=int,
    )
    max_num_waiting_tokens: int | None = _arg(
        None,
        "Memory and batching",
        "most prompt tokens of the sequences in the queue; more are refused, but for one request "
        "alone; 0: no limit of its own (default: 16 times what the KV cache holds)",
        metavar="TOKENS",
        type=int,
    )
    enable_kv_events: bool | None = _arg(
        None,
        "Memory and batching",
        "tell gateways which prefixes are cached, so that they send a request where its own is "
        "(default: on where the worker protocol is served, see the extra smg)",
        action=argparse.BooleanOptionalAction,
    )
    scheduling_policy: str = _arg(
        "fcfs",
        "Memory and batching",
        "first come, first served; or by each request's priority",
        choices=POLICIES,
    )

    threads: int = _arg(
        0, "Execution", "CPU threads of the model; 0: all physical cores", metavar="N", type=int
    )
    cpu_affinity: str | None = _arg(
        None,
        "Execution",
        "CPUs that the threads stay on, one each, e.g. 0-31,64; this many threads, unless "
        "--threads says fewer (default: wherever the system puts them)",
        metavar="CPUS",
    )
    executor: str = _arg(
        "cpu",
        "Execution",
        "cpu: libfastpage's own kernels; torch: the reference, needs torch; cuda: on a GPU, needs "
        "torch and a build with FASTPAGE_CUDA",
        choices=EXECUTORS,
    )
    enforce_eager: bool = _arg(
        False,
        "Execution",
        "executor cuda: launch every step anew, and capture none into a CUDA graph (default: off)",
        action=argparse.BooleanOptionalAction,
    )
    cudagraph_capture_sizes: Sequence[int] | None = _arg(
        None,
        "Execution",
        "executor cuda: numbers of sequences whose decode steps are captured into CUDA graphs; a "
        "step runs as the next larger one (default: 1, 2, 4, ... and --max-num-seqs)",
        metavar="N",
        type=int,
        nargs="+",
    )
    batch_invariant: bool = _arg(
        False,
        "Execution",
        "outputs that are the same to the bit whatever else is in the batch, however a prompt is "
        "cut into steps, and whether or not it was preempted or found in the prefix cache. "
        "executor cpu: always so; cuda: slower (default: off)",
        action=argparse.BooleanOptionalAction,
    )
    async_scheduling: bool = _arg(
        False,
        "Execution",
        "prepare each step while the one before is computed (default: off)",
        action=argparse.BooleanOptionalAction,
    )
    engine_timeout: float = _arg(
        300.0,
        "Execution",
        "seconds without any progress after which a server kills its engine's process, and starts "
        "it again. A step that takes long makes progress, op by op; with the other executors than "
        "cpu, only its end is. Of several front ends, one that says nothing for as long is killed, "
        "too. 0: wait for ever (default: %(default)g)",
        metavar="SECONDS",
        type=float,
    )
    num_speculative_tokens: int = _arg(
        0,
        "Execution",
        "speculative decoding: check up to that many tokens a step, proposed by looking the last "
        "ones up in the prompt and the output so far; 0: off. Outputs are the same",
        metavar="TOKENS",
        type=int,
    )
    prompt_lookup_min: int = _arg(
        2, "Execution", "fewest tokens that are looked up", metavar="TOKENS", type=int
    )
    prompt_lookup_max: int = _arg(
        4, "Execution", "most tokens that are looked up", metavar="TOKENS", type=int
    )
    seed: int = _arg(0, "Execution", "of requests that bring no seed of their own", type=int)
    record_scheduler: str | None = _arg(
        None,
        "Execution",
        "for bug reports: a new file for the scheduler's calls, which python -m fastpage.replay "
        "runs again. It holds all prompts and outputs",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        """The checks that need no model; raises InvalidArgument naming the field."""
        self.dtype = full_dtype_name(self.dtype)
        self.kv_cache_dtype = full_dtype_name(self.kv_cache_dtype)
        for name, allowed in (
            ("dtype", DTYPES),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("scheduling_policy", POLICIES),
            ("executor", EXECUTORS),
            ("quantization", QUANTIZATIONS),
            ("load_format", LOAD_FORMATS),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.cpu_affinity is not None:
            parse_cpus(self.cpu_affinity)
        for name in (
            "enable_prefix_caching",
            "async_scheduling",
            "batch_invariant",
            "enforce_eager",
        ):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name}={getattr(self, name)!r} is not True or False")
        if not isinstance(self.enable_kv_events, bool | None):
            raise InvalidArgument(
                f"enable_kv_events={self.enable_kv_events!r} is not True or False"
            )
        if not self.generation_config or not isinstance(self.generation_config, str):
            raise InvalidArgument(
                f"generation_config={self.generation_config!r} is not auto, vllm or a directory"
            )
        for name in ("revision", "served_model_name", "record_scheduler"):
            value = getattr(self, name)
            if value is not None and (not value or not isinstance(value, str)):
                raise InvalidArgument(f"{name}={value!r} is not a text: leave it out, or give one")
        for name, least in (
            ("max_model_len", 1),
            ("max_logprobs", 0),
            ("num_kv_blocks", 1),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("long_prefill_token_threshold", 0),
            ("max_num_partial_prefills", 0),
            ("max_num_waiting", 1),
            ("max_num_waiting_tokens", 0),
            ("num_speculative_tokens", 0),
            ("prompt_lookup_min", 1),
            ("prompt_lookup_max", 1),
            ("threads", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidArgument(f"{name}={value!r} is not a whole number")
            if not least <= value < 2**31:
                raise InvalidArgument(f"{name}={value}: must be at least {least} and below 2**31")
        self._check_engine_timeout()
        for name in ("kv_cache_memory", "host_cache_memory"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), name)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InvalidArgument(
                f"prompt_lookup_min={self.prompt_lookup_min} is more than "
                f"prompt_lookup_max={self.prompt_lookup_max}"
            )
        if self.executor != "cpu" and self.quantization != "none":
            raise InvalidArgument(
                f"quantization={self.quantization!r} needs executor='cpu': the others take weights "
                "that are not quantized"
            )
        if self.executor == "cpu" and self.kv_cache_dtype == "float8_e4m3":
            raise InvalidArgument(
                "kv_cache_dtype='float8_e4m3' needs executor='cuda': 'cpu' has int8, which "
                "is as small"
            )
        if self.executor == "torch" and self.batch_invariant:
            raise InvalidArgument(
                "batch_invariant=True needs executor='cuda', or 'cpu', which is so anyway"
            )
        self._check_capture_sizes()
        if not self.model or not isinstance(self.model, str):
            raise InvalidArgument(f"model={self.model!r} is not a path or the name of a model")

    def _check_engine_timeout(self) -> None:
        value = self.engine_timeout
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidArgument(f"engine_timeout={value!r} is not a number of seconds")
        if value != 0 and not 1 <= value < float("inf"):
            raise InvalidArgument(
                f"engine_timeout={value}: must be 0, for none, or at least 1 (second)"
            )

    def _check_capture_sizes(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        given = f"cudagraph_capture_sizes={sizes!r}"
        is_list = isinstance(sizes, list | tuple) and len(sizes) > 0
        if not is_list or not all(type(n) is int and 1 <= n <= self.max_num_seqs for n in sizes):
            raise InvalidArgument(
                f"{given} is not a list of numbers between 1 and max_num_seqs={self.max_num_seqs}"
            )
        if self.enforce_eager:
            raise InvalidArgument(f"{given} with enforce_eager: leave out one of them")

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        groups = {title: parser.add_argument_group(title, text) for title, text in _GROUPS.items()}
        for field in dataclasses.fields(cls):
            options = dict(field.metadata["options"])
            text = field.metadata["help"]
            if field.default is dataclasses.MISSING:
                options["required"] = True
            elif "default" not in text and field.default is not None:
                text += " (default: %(default)s)"
            if field.default is not dataclasses.MISSING:
                options["default"] = field.default
            groups[field.metadata["group"]].add_argument(
                "--" + field.name.replace("_", "-"), help=text, **options
            )

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> EngineArgs:
        return cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)})
