"""vLLM's scheduler without its model, on the work of scheduler.py, which starts it.

    schedule_vllm.py TRACE REPEATS      with scheduler_work.py on PYTHONPATH

Times are CPU time of this thread, as engine core would spend it: start-up heap frozen, garbage
collection on. A step's is schedule() + update_from_output(); a request's construction includes its
block hashes. The last line is one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

import numpy as np
import scheduler_work as work
import torch
import vllm
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

S1_STEPS = 64  # fewer than of the others: each takes milliseconds
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": work.VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
HASH = "sha256"
now = time.thread_time_ns


class Driver:
    """Runs steps of a scheduler and remembers what each took, in ns."""

    def __init__(self, model: str, sizes: work.Sizes) -> None:
        limits = {
            "max_num_seqs": sizes.max_num_seqs,
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
        }
        config = VllmConfig(
            model_config=ModelConfig(
                model=model,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                max_model_len=sizes.max_model_len,
            ),
            cache_config=CacheConfig(
                block_size=work.BLOCK_SIZE,
                enable_prefix_caching=True,
                prefix_caching_hash_algo=HASH,
            ),
            scheduler_config=SchedulerConfig(
                **limits,
                max_model_len=sizes.max_model_len,
                enable_chunked_prefill=True,
                async_scheduling=False,
                is_encoder_decoder=False,
            ),
            device_config=DeviceConfig("cpu"),
        )
        # What the CPU platform may have made of them.
        for name, value in limits.items():
            setattr(config.scheduler_config, name, value)
        config.cache_config.block_size = work.BLOCK_SIZE
        config.cache_config.enable_prefix_caching = True
        config.cache_config.num_gpu_blocks = sizes.num_blocks
        one_layer = FullAttentionSpec(
            block_size=work.BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=sizes.num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], one_layer)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=work.BLOCK_SIZE,
            hash_block_size=work.BLOCK_SIZE,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name(HASH)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(work.BLOCK_SIZE, hash_function)
        self.usable_blocks = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self.num_added = 0
        self.memory = np.zeros(0, np.uint64)  # streamed through the caches between calls
        self.preemptions = 0
        self.forget()

    def forget(self) -> None:
        self.schedule: list[int] = []
        self.update: list[int] = []
        self.waste: list[float] = []

    @property
    def both(self) -> list[int]:
        return [a + b for a, b in zip(self.schedule, self.update, strict=True)]

    def add(self, prompt: list[int], max_tokens: int) -> None:
        request = Request(
            request_id=str(self.num_added),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)
        self.num_added += 1

    def step(self) -> int:
        """Returns the number of scheduled tokens."""
        self.memory += 1
        began = now()
        step = self.scheduler.schedule()
        self.schedule.append(now() - began)
        self.preemptions += len(step.preempted_req_ids or ())
        self.waste.append(self.unused_slots())
        output = self.sample(step)
        self.memory += 1
        began = now()
        self.scheduler.update_from_output(step, output)
        self.update.append(now() - began)
        return step.total_num_scheduled_tokens

    def sample(self, step: Any) -> ModelRunnerOutput:
        """What a model would answer: a token for each request whose known tokens are computed."""
        ids = list(step.num_scheduled_tokens)
        requests = [self.scheduler.requests[request_id] for request_id in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[
                [] if request.num_computed_tokens < request.num_tokens else [len(self.schedule)]
                for request in requests
            ],
        )

    def unused_slots(self) -> float:
        """The share of the allocated KV slots that holds no token once the step has run."""
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        allocated = (self.usable_blocks - free) * work.BLOCK_SIZE
        used = sum(request.num_computed_tokens for request in self.scheduler.running)
        return (allocated - used) / allocated


def settle() -> None:
    gc.collect()
    gc.freeze()


def s1(model: str, num_seqs: int, cold: bool) -> dict[str, float]:
    steps = work.S1_COLD_STEPS if cold else S1_STEPS
    driver = Driver(model, work.s1_sizes(num_seqs, steps))
    for i in range(num_seqs):
        prompt = work.tokens(i, work.s1_prompt_len(i))
        driver.add(prompt, work.S1_WARM_UP + steps + 2)
    for _ in range(work.S1_WARM_UP):
        driver.step()
    driver.forget()
    settle()
    if cold:
        driver.memory = np.zeros(work.COLD_BYTES // 8, np.uint64)
    for _ in range(steps):
        if driver.step() != num_seqs:
            raise RuntimeError("S1: not in a steady state")
    name = f"s1_{num_seqs}_py_cold" if cold else f"s1_{num_seqs}_py"
    parts = {"": driver.both, "schedule_": driver.schedule, "update_": driver.update}
    return {f"{name}_{part}us": statistics.median(ns) / 1e3 for part, ns in parts.items()}


def s2(model: str) -> dict[str, float]:
    driver = Driver(model, work.s2_sizes())
    prompts = [work.tokens(100_000 + i, work.S2_TOKENS) for i in range(work.S2_REQUESTS)]
    settle()
    began = now()
    for prompt in prompts:
        driver.add(prompt, 64)
    add = now() - began
    if driver.step() != work.S2_REQUESTS * work.S2_TOKENS:
        raise RuntimeError("S2: not all of it in one step")
    per_request = 1e-3 / work.S2_REQUESTS
    schedule, update = driver.schedule[0], driver.update[0]
    return {
        "s2_py_us": (add + schedule) * per_request,
        "s2_py_add_us": add * per_request,
        "s2_py_schedule_us": schedule * per_request,
        "s2_py_with_update_us": (add + schedule + update) * per_request,
    }


def s5(model: str, trace: list[tuple[int, int]]) -> dict[str, float]:
    driver = Driver(model, work.S5_SIZES)
    prompts = [work.tokens(300_000 + i, prompt) for i, (prompt, _) in enumerate(trace)]
    settle()
    began = now()
    for prompt, (_, output) in zip(prompts, trace, strict=True):
        driver.add(prompt, output)
    add = now() - began
    tokens = 0
    while driver.scheduler.has_unfinished_requests():
        tokens += driver.step()
    return {
        "s5_py_total_s": sum(driver.both) / 1e9,
        "s5_py_add_s": add / 1e9,
        "s5_py_steps": len(driver.schedule),
        "s5_py_preemptions": driver.preemptions,
        "s5_py_tokens": tokens,
        "s5_py_kv_waste": statistics.fmean(driver.waste),
    }


def main() -> None:
    trace_path, repeats = Path(sys.argv[1]), int(sys.argv[2])
    lines = trace_path.read_text().splitlines()
    trace = [(int(prompt), int(output)) for prompt, output in map(str.split, lines)]
    vllm.envs.enable_envs_cache()  # as engine core does
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as model:
        Path(model, "config.json").write_text(json.dumps(MODEL_CONFIG))
        for _ in range(repeats):
            parts = [s1(model, num_seqs, cold=False) for num_seqs in work.S1_SEQS]
            parts += [s1(model, 256, cold=True), s2(model), s5(model, trace)]
            for name, value in (item for part in parts for item in part.items()):
                best[name] = min(value, best.get(name, value))
    print(json.dumps(best))


if __name__ == "__main__":
    main()
