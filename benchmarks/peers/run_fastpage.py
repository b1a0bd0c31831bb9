"""fastpage itself, through the same door as its peers: LLM.generate with token ids."""

from __future__ import annotations

from typing import Any

import runner

import fastpage
from fastpage import LLM, SamplingParams
from fastpage._C.ops import cpu_isa

opts = runner.options()
llm = LLM(
    model=opts["model"],
    max_num_seqs=opts["max_num_seqs"],
    max_num_batched_tokens=opts["max_num_batched_tokens"],
    max_model_len=opts["max_model_len"],
    enable_prefix_caching=False,
    threads=opts["threads"],
    **opts["settings"],
)


def generate(requests: list[runner.Request]) -> list[list[int]]:
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=request["out"], ignore_eos=True, detokenize=False
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


measured = (0, 0)


def kv_waste(part: str) -> dict[str, Any]:
    """The share of the KV slots that requests held without a token in them, over a part's steps."""
    global measured
    stats = llm.stats().scheduler
    allocated, used = stats.kv_slots_allocated - measured[0], stats.kv_slots_used - measured[1]
    measured = stats.kv_slots_allocated, stats.kv_slots_used
    return {"kv_waste": round(1 - used / allocated, 5)}


runner.serve(
    opts,
    f"fastpage {fastpage.__version__} ({cpu_isa()})",
    generate,
    facts=kv_waste,
    about={"weight_bytes": llm.info.weight_bytes},
)
