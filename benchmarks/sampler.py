"""What it costs to choose a token: microseconds a row, by sampling parameters.

Also for samples of one prompt, which share a row of logits.
Rows of logits like a language model's (a few hundred likely tokens over a wide floor) and flat ones
(thousands of tokens that matter). Logits are put back before each step and lie where a model leaves
them, in the last-level cache or in memory. Compare with the time that reading them takes.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import probe

from fastpage import _C

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50, top_p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 2000": {"temperature": 0.8, "top_k": 2000},
    "greedy, 5 logprobs": {"temperature": 0, "logprobs": 5},
    "greedy, 130 logprobs": {"temperature": 0, "logprobs": 130},
    "greedy, all penalties": {
        "temperature": 0,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
    },
}
PROMPT = list(range(1000))
SAMPLES = 8


def make_logits(rows: int, vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    model = rng.normal(-5, 2.5, size=(rows, vocab))
    for row in model:
        likely = rng.integers(0, vocab, size=300)
        row[likely] = 14 - 2.2 * np.log1p(np.arange(300)) + rng.normal(0, 0.3, size=300)
    flat = rng.normal(0, 2, size=(rows, vocab))
    return {"model": model.astype(np.float32), "flat": flat.astype(np.float32)}


def make_batch(rows: int, n: int, fields: dict[str, Any]) -> tuple[_C.Scheduler, _C.InputBatch]:
    """n tokens for each of `rows` prompts; the batch borrows from the scheduler."""
    config = _C.SchedulerConfig(
        num_blocks=rows * n * 64 + 1,
        max_num_seqs=rows * n,
        max_num_batched_tokens=rows * len(PROMPT),
        max_model_len=1024,
        enable_prefix_caching=False,
    )
    scheduler = _C.Scheduler(config)
    for seed in range(rows):
        scheduler.add_request(PROMPT, _C.SamplingParams(**fields, n=n), seed)
    batch = _C.InputBatch()
    scheduler.prepare(scheduler.schedule(), batch)
    return scheduler, batch


def seconds_per_row(
    sampler: _C.Sampler, logits: np.ndarray, fields: dict[str, Any], n: int = 1
) -> float:
    """The least of many steps, by row of logits."""
    scheduler, batch = make_batch(len(logits), n, fields)
    work = np.empty_like(logits)
    best = float("inf")
    for _ in range(40):
        work[:] = logits
        began = time.perf_counter()
        sampler.sample(work, batch)
        best = min(best, time.perf_counter() - began)
    del scheduler
    return best / len(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    sampler = _C.Sampler(args.vocab_size, args.threads)
    logits = make_logits(args.rows, args.vocab_size)
    read_us = args.vocab_size * 4e-3 / probe.measure(args.threads)["read_gbs"]
    print(f"{args.rows} rows x {args.vocab_size}, {args.threads} thread(s): microseconds a row")
    print(f"{'':<24}{'model':>10}{'flat':>10}{'(of greedy)':>16}{f'{SAMPLES} samples of one':>20}")
    print(f"{'reading from memory':<24}{read_us:>10.1f}{read_us:>10.1f}")
    result: dict[str, float] = {"read_us": round(read_us, 2)}
    greedy = None
    for name, fields in CASES.items():
        us = {kind: seconds_per_row(sampler, x, fields) * 1e6 for kind, x in logits.items()}
        greedy = greedy or us
        ratios = " ".join(f"{us[kind] / greedy[kind]:.1f}" for kind in us)
        shared = seconds_per_row(sampler, logits["model"], fields, n=SAMPLES) * 1e6
        print(f"{name:<24}{us['model']:>10.1f}{us['flat']:>10.1f}{ratios:>16}{shared:>20.1f}")
        result |= {f"{name}, {kind}": round(value, 2) for kind, value in us.items()}
        result[f"{name}, {SAMPLES} samples"] = round(shared, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
