"""The work that every engine is measured on: the same token ids on every machine, from a seed.

    W1    offline throughput: 64 requests, clipped-lognormal lengths (prompt mean 160, at most 512;
          output mean 200, at most 400)
    W2    one stream: 128 tokens in, 128 out, five times with fresh ids
    W3    one long prompt: 2,048 tokens in, 1 out, five times with fresh ids
    warm  two short requests

Token ids are uniform over [100, vocab_size - 100), which leaves out the special ones. Every request
ignores EOS and is greedy. `python workload.py` writes workload.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from random import Random
from typing import TypedDict


class Request(TypedDict):
    prompt: list[int]
    out: int


class Workload(TypedDict):
    seed: int
    vocab: int
    temperature: float
    W1: list[Request]
    W2: list[Request]
    W3: list[Request]
    warm: list[Request]


def lengths(rng: Random, mean: float, sigma: float, low: int, high: int, count: int) -> list[int]:
    """Lognormal lengths clipped to [low, high]; the mean after clipping is within 0.5 of `mean`."""
    draws = [math.exp(rng.gauss(0.0, sigma)) for _ in range(count)]
    scale = mean / (sum(draws) / count)
    for _ in range(60):
        clipped = [min(high, max(low, round(draw * scale))) for draw in draws]
        reached = sum(clipped) / count
        if abs(reached - mean) < 0.5:
            break
        scale *= mean / reached
    return clipped


def build(seed: int = 2026, vocab_size: int = 49152) -> Workload:
    """Each part has a random stream of its own, so that one can change without the others."""

    def stream(part: str) -> Random:
        return Random(f"{seed}-{part}")

    def request(rng: Random, prompt_tokens: int, output_tokens: int) -> Request:
        ids = [rng.randrange(100, vocab_size - 100) for _ in range(prompt_tokens)]
        return {"prompt": ids, "out": output_tokens}

    def repeated(part: str, count: int, prompt_tokens: int, output_tokens: int) -> list[Request]:
        rng = stream(part)
        return [request(rng, prompt_tokens, output_tokens) for _ in range(count)]

    rng = stream("W1")
    prompts = lengths(rng, 160, 0.9, 8, 512, 64)
    outputs = lengths(rng, 200, 0.7, 8, 400, 64)
    return {
        "seed": seed,
        "vocab": vocab_size,
        "temperature": 0.0,
        "W1": [request(rng, *pair) for pair in zip(prompts, outputs, strict=True)],
        "W2": repeated("W2", 5, 128, 128),
        "W3": repeated("W3", 5, 2048, 1),
        "warm": repeated("warm", 2, 40, 8),
    }


def to_json(workload: Workload) -> str:
    return json.dumps(workload, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--out", type=Path, default=Path("workload.json"))
    args = parser.parse_args()
    workload = build(args.seed, args.vocab_size)
    text = to_json(workload)
    args.out.write_text(text)
    for part in ("W1", "W2", "W3", "warm"):
        requests: list[Request] = workload[part]  # type: ignore[literal-required]
        print(
            f"{part}: {len(requests)} requests,"
            f" {sum(len(r['prompt']) for r in requests)} tokens in,"
            f" {sum(r['out'] for r in requests)} out"
        )
    print("sha256", hashlib.sha256(text.encode()).hexdigest()[:16])


if __name__ == "__main__":
    main()
