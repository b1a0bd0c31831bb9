"""What is exposed: each metric's name, type, meaning, and where it comes from.

Names with `vllm:` mean what they mean in vLLM (V1), so that dashboards and alerts made for it work
here; `fastpage:` are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastpage._C import __version__
from fastpage.serving.metrics.recorder import STEP_PHASES, EngineMetrics, Histogram

# A value, one for each value of Metric.label, or the labels of an info metric.
Reading = float | Histogram | Mapping[str, Any]
Kind = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True)
class Metric:
    name: str  # that of a counter gets "_total" when it is exposed
    kind: Kind
    meaning: str
    read: Callable[[EngineMetrics], Reading]
    label: str | None = None  # beside model_name and engine
    # Whether it is there; everything else is there from the engine's start on.
    exists: Callable[[EngineMetrics], bool] = lambda metrics: True

    @property
    def exposed_name(self) -> str:
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _total(name: str) -> Callable[[EngineMetrics], float]:
    return lambda metrics: metrics.total(name)


def _now(name: str) -> Callable[[EngineMetrics], float]:
    """Of SchedulerStats."""

    def read(metrics: EngineMetrics) -> float:
        stats = metrics.scheduler_stats()
        return 0 if stats is None else getattr(stats, name)

    return read


def _kv_cache_usage(metrics: EngineMetrics) -> float:
    stats = metrics.scheduler_stats()
    if stats is None or stats.num_blocks == 0:
        return 0.0
    return 1 - stats.num_free_blocks / stats.num_blocks


def _cache_config(metrics: EngineMetrics) -> Mapping[str, str]:
    assert metrics.engine is not None
    info = metrics.engine.info
    return {
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_kv_blocks),
        "num_cpu_blocks": str(info.num_host_kv_blocks),
        "cache_dtype": info.kv_cache_dtype,
    }


def _drafts_tokens(metrics: EngineMetrics) -> bool:
    return metrics.engine is not None and metrics.engine.info.num_speculative_tokens > 0


def _has_host_cache(metrics: EngineMetrics) -> bool:
    return metrics.engine is not None and metrics.engine.info.num_host_kv_blocks > 0


_VLLM = (
    # The scheduler and its cache, as of now.
    Metric(
        "vllm:num_requests_running",
        "gauge",
        "Sequences that steps compute on (each of the n outputs of a request is one).",
        _now("num_running"),
    ),
    Metric(
        "vllm:num_requests_waiting",
        "gauge",
        "Sequences that wait for a place: new ones and preempted ones.",
        _now("num_waiting"),
    ),
    Metric(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the KV blocks that requests hold, 0 to 1; blocks that are only cached are free.",
        _kv_cache_usage,
    ),
    Metric(
        "vllm:cache_config_info",
        "info",
        "Always 1; its labels describe the KV cache. num_gpu_blocks is vLLM's word for the blocks "
        "that the model reads, num_cpu_blocks are those of the host cache.",
        _cache_config,
    ),
    # Totals of the engine.
    Metric(
        "vllm:prefix_cache_queries",
        "counter",
        "Prompt tokens that were looked up in the prefix cache.",
        _total("scheduler.prefix_cache_queries"),
    ),
    Metric(
        "vllm:prefix_cache_hits",
        "counter",
        "Prompt tokens that were found in the prefix cache.",
        _total("scheduler.prefix_cache_hits"),
    ),
    Metric(
        "vllm:num_preemptions",
        "counter",
        "Sequences that lost their KV blocks to others and had to come back later.",
        _total("scheduler.num_preemptions"),
    ),
    Metric(
        "vllm:prompt_tokens",
        "counter",
        "Prompt tokens of the requests whose first token has come, cached ones included.",
        lambda metrics: metrics.num_prompt_tokens,
    ),
    Metric(
        "vllm:prompt_tokens_cached",
        "counter",
        "Prompt tokens of the requests whose first token has come that the prefix cache gave.",
        lambda metrics: metrics.num_cached_prompt_tokens,
    ),
    Metric(
        "vllm:prompt_tokens_by_source",
        "counter",
        "vllm:prompt_tokens by where their keys and values came from.",
        lambda metrics: {
            "local_compute": metrics.num_prompt_tokens - metrics.num_cached_prompt_tokens,
            "local_cache_hit": metrics.num_cached_prompt_tokens,
        },
        label="source",
    ),
    Metric(
        "vllm:generation_tokens",
        "counter",
        "Tokens of outputs.",
        lambda metrics: metrics.num_generation_tokens,
    ),
    Metric(
        "vllm:spec_decode_num_draft_tokens",
        "counter",
        "Tokens that speculation proposed (with --num-speculative-tokens).",
        _total("scheduler.num_draft_tokens"),
        exists=_drafts_tokens,
    ),
    Metric(
        "vllm:spec_decode_num_accepted_tokens",
        "counter",
        "Proposed tokens that the model agreed with (with --num-speculative-tokens).",
        _total("scheduler.num_accepted_tokens"),
        exists=_drafts_tokens,
    ),
    Metric(
        "vllm:request_success",
        "counter",
        "Outputs that ended, by reason: stop, length, abort (the client gave it up), error (the "
        "model failed, or the engine's process died).",
        lambda metrics: metrics.finished,
        label="finished_reason",
    ),
    # Every step.
    Metric(
        "vllm:iteration_tokens_total",
        "histogram",
        "Tokens that a step computed.",
        lambda metrics: metrics.iteration_tokens,
    ),
    Metric(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "From one token of an output to the next (tokens that come in one step are one).",
        lambda metrics: metrics.inter_token_latency,
    ),
    # Every request: times. From the second on only of those that ended by stop or length.
    Metric(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "From a request's coming to its first token.",
        lambda metrics: metrics.time_to_first_token,
    ),
    Metric(
        "vllm:e2e_request_latency_seconds",
        "histogram",
        "From a request's coming to its last token.",
        lambda metrics: metrics.e2e_latency,
    ),
    Metric(
        "vllm:request_queue_time_seconds",
        "histogram",
        "From a request's coming to the engine to the first step that computed on it.",
        lambda metrics: metrics.queue_time,
    ),
    Metric(
        "vllm:request_inference_time_seconds",
        "histogram",
        "From the first step that computed on a request to its last token.",
        lambda metrics: metrics.inference_time,
    ),
    Metric(
        "vllm:request_prefill_time_seconds",
        "histogram",
        "From the first step that computed on a request to its first token (not of beams and "
        "best_of, whose tokens come at the end, all at once).",
        lambda metrics: metrics.prefill_time,
    ),
    Metric(
        "vllm:request_decode_time_seconds",
        "histogram",
        "From the first token of a request to its last (not of beams and best_of).",
        lambda metrics: metrics.decode_time,
    ),
    Metric(
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        "Decode time of an output divided by its tokens but the first (not of outputs of one "
        "token, of beams and of best_of).",
        lambda metrics: metrics.time_per_output_token,
    ),
    # Every request that ended by stop or length: sizes.
    Metric(
        "vllm:request_prompt_tokens",
        "histogram",
        "Tokens of a prompt.",
        lambda metrics: metrics.prompt_tokens,
    ),
    Metric(
        "vllm:request_prefill_kv_computed_tokens",
        "histogram",
        "Tokens of a prompt that were not in the prefix cache.",
        lambda metrics: metrics.computed_prompt_tokens,
    ),
    Metric(
        "vllm:request_generation_tokens",
        "histogram",
        "Tokens of an output.",
        lambda metrics: metrics.generation_tokens,
    ),
    Metric(
        "vllm:request_max_num_generation_tokens",
        "histogram",
        "Tokens of the longest of a request's n outputs.",
        lambda metrics: metrics.max_generation_tokens,
    ),
    Metric(
        "vllm:request_params_n",
        "histogram",
        "The parameter n.",
        lambda metrics: metrics.params_n,
    ),
    Metric(
        "vllm:request_params_max_tokens",
        "histogram",
        "The parameter max_tokens, where it was given.",
        lambda metrics: metrics.params_max_tokens,
    ),
)

_OURS = (
    Metric(
        "fastpage:build_info",
        "info",
        "Always 1; its label is the version.",
        lambda metrics: {"version": __version__},
    ),
    Metric(
        "fastpage:startup_seconds",
        "gauge",
        "What each part of the start took.",
        lambda metrics: {} if metrics.engine is None else metrics.engine.phases,
        label="phase",
    ),
    Metric(
        "fastpage:engine_up",
        "gauge",
        "1, or 0 while the engine's process is being started again.",
        lambda metrics: int(metrics.engine_up),
    ),
    Metric(
        "fastpage:engine_restarts",
        "counter",
        "Times that the engine's process died and came back.",
        lambda metrics: metrics.num_restarts,
    ),
    Metric(
        "fastpage:engine_hangs",
        "counter",
        "Times that the engine's process was killed because it got nowhere for --engine-timeout.",
        lambda metrics: metrics.num_hangs,
    ),
    Metric(
        "fastpage:front_end_restarts",
        "counter",
        "Times that a front end's process died, or was killed because it got nowhere for "
        "--engine-timeout or was not ready in --startup-timeout, and came back (with "
        "--api-server-count).",
        lambda metrics: metrics.num_front_end_restarts,
    ),
    Metric(
        "fastpage:requests_refused",
        "counter",
        "Requests that the engine did not take, by reason: invalid_argument, resource_exhausted "
        "(the queue is full), unavailable (shutting down, or being started again), internal.",
        lambda metrics: metrics.refused,
        label="reason",
    ),
    Metric(
        "fastpage:steps",
        "counter",
        "Steps of the engine.",
        _total("num_steps"),
    ),
    Metric(
        "fastpage:step_seconds",
        "histogram",
        "Time of a step, all phases.",
        lambda metrics: metrics.step_seconds,
    ),
    Metric(
        "fastpage:step_phase_seconds",
        "counter",
        "Time in steps, by phase: schedule (taking in requests, deciding the step), prepare (its "
        "inputs), model, sample, output (taking in the tokens).",
        lambda metrics: {phase: metrics.total(name) for phase, name in STEP_PHASES.items()},
        label="phase",
    ),
    Metric(
        "fastpage:computed_tokens",
        "counter",
        "Tokens that steps computed: prompts, outputs, drafts, and again what was preempted.",
        _total("num_computed_tokens"),
    ),
    Metric(
        "fastpage:blocks_copied",
        "counter",
        "KV blocks that were copied because samples or beams that shared them went apart.",
        _total("scheduler.num_blocks_copied"),
    ),
    Metric(
        "fastpage:preempted_cache_queries",
        "counter",
        "Tokens of preempted sequences that were looked up in the cache when these came back.",
        _total("scheduler.preempted_cache_queries"),
    ),
    Metric(
        "fastpage:preempted_cache_hits",
        "counter",
        "Tokens of preempted sequences that were still there; the others were computed again.",
        _total("scheduler.preempted_cache_hits"),
    ),
    Metric(
        "fastpage:preemptions_swap",
        "counter",
        "Preemptions that kept the blocks in the host cache (with --host-cache-memory).",
        _total("scheduler.num_preemptions_swap"),
        exists=_has_host_cache,
    ),
    Metric(
        "fastpage:blocks_swapped_out",
        "counter",
        "KV blocks that went to the host cache (with --host-cache-memory).",
        _total("scheduler.num_blocks_swapped_out"),
        exists=_has_host_cache,
    ),
    Metric(
        "fastpage:blocks_swapped_in",
        "counter",
        "KV blocks that came back from the host cache (with --host-cache-memory).",
        _total("scheduler.num_blocks_swapped_in"),
        exists=_has_host_cache,
    ),
    Metric(
        "fastpage:host_cache_blocks",
        "gauge",
        "KV blocks that the host cache has room for (with --host-cache-memory).",
        _now("num_host_blocks"),
        exists=_has_host_cache,
    ),
    Metric(
        "fastpage:host_cache_blocks_used",
        "gauge",
        "KV blocks that are in the host cache (with --host-cache-memory).",
        _now("num_cached_host_blocks"),
        exists=_has_host_cache,
    ),
)

METRICS = (*_VLLM, *_OURS)
