"""OpenVINO GenAI: its continuous batching pipeline over an IR that optimum-intel exported."""

from __future__ import annotations

import runner

opts = runner.options()

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai  # noqa: E402

KV_CACHE_GIB = 2
PAD = 2

scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = KV_CACHE_GIB
scheduler.max_num_batched_tokens = opts["max_num_batched_tokens"]
scheduler.max_num_seqs = opts["max_num_seqs"]
scheduler.dynamic_split_fuse = True
scheduler.enable_prefix_caching = False
properties = {"INFERENCE_NUM_THREADS": opts["threads"], **opts["settings"]}
pipeline = openvino_genai.ContinuousBatchingPipeline(opts["model"], scheduler, "CPU", properties)


def config(request: runner.Request) -> openvino_genai.GenerationConfig:
    made = openvino_genai.GenerationConfig()
    made.max_new_tokens = made.min_new_tokens = request["out"]
    made.ignore_eos = True
    made.eos_token_id = PAD
    made.do_sample = False
    made.apply_chat_template = False
    return made


def generate(requests: list[runner.Request]) -> list[list[int]]:
    prompts = [openvino.Tensor(np.array([r["prompt"]], np.int64)) for r in requests]
    results = pipeline.generate(prompts, [config(request) for request in requests])
    return [list(result.m_generation_ids[0]) for result in results]


runner.serve(opts, f"openvino-genai {openvino_genai.__version__.split('-')[0]}", generate)
