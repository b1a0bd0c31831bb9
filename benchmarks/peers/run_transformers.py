"""Hugging Face transformers: generate() on left-padded batches in order of arrival."""

from __future__ import annotations

import os

import runner

BATCH = 32

opts = runner.options()
os.environ["OMP_NUM_THREADS"] = str(opts["threads"])
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(opts["threads"])
model = transformers.AutoModelForCausalLM.from_pretrained(
    opts["model"], dtype=getattr(torch, opts["settings"]["dtype"]), attn_implementation="sdpa"
).eval()
model.generation_config.eos_token_id = None
PAD = 2


@torch.inference_mode()
def generate_batch(requests: list[runner.Request]) -> list[list[int]]:
    width = max(len(request["prompt"]) for request in requests)
    ids = torch.full((len(requests), width), PAD)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request["prompt"]) :] = torch.tensor(request["prompt"])
        mask[row, width - len(request["prompt"]) :] = 1
    config = transformers.GenerationConfig(
        max_new_tokens=max(request["out"] for request in requests),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        use_cache=True,
    )
    outputs = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new = outputs[:, width:].tolist()
    return [row[: request["out"]] for row, request in zip(new, requests, strict=True)]


def generate(requests: list[runner.Request]) -> list[list[int]]:
    starts = range(0, len(requests), BATCH)
    return [ids for start in starts for ids in generate_batch(requests[start : start + BATCH])]


runner.serve(opts, f"transformers {transformers.__version__}", generate)
