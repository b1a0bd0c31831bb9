"""The work that schedulers are measured on, without a model; scheduler.cc has the same numbers.

S1    decode steady state: R sequences of about 1,000 tokens, one more token each a step
S2    admission of 1,000 requests of 1,000 tokens that share nothing
S5    a trace of 2,000 requests, all there at the start: 256 sequences and 2,048 tokens a step,
      8,192 blocks of 16
pool  S1 with 32 sequences of about 250 tokens, in pools of 10^3 to 10^6 blocks, each full of
      cached prefixes that have to make room
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
COLD_BYTES = 64 << 20  # streamed between calls, as a model's weights would be

S1_SEQS = (16, 64, 256, 1024)
S1_WARM_UP = 24
S1_STEPS = 320  # a multiple of the block size: as many steps with a new block for any sequence
S1_COLD_STEPS = 48
S2_REQUESTS = 1000
S2_TOKENS = 1000
S5_REQUESTS = 2000
POOL_SEQS = 32
POOL_PROMPT = 240
POOL_STEPS = 160
POOL_FILL = 992  # tokens of the prompts that fill the pool
POOL_BLOCKS = (1_000, 10_000, 100_000, 1_000_000)


@dataclass
class Sizes:
    """What a scheduler is configured with."""

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


S5_SIZES = Sizes(num_blocks=8192, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096)


def s1_prompt_len(index: int, base: int = 992) -> int:
    """Spread over one block, so that each step has as many sequences that need a new one."""
    return base + index * 7 % BLOCK_SIZE


def s1_sizes(num_seqs: int, steps: int) -> Sizes:
    blocks_each = (1008 + S1_WARM_UP + steps) // BLOCK_SIZE + 2
    return Sizes(num_seqs * blocks_each + 64, num_seqs, num_seqs * 1100, 2048)


def s2_sizes() -> Sizes:
    blocks_each = S2_TOKENS // BLOCK_SIZE + 2
    return Sizes(S2_REQUESTS * blocks_each + 1000, S2_REQUESTS, S2_REQUESTS * S2_TOKENS, 2048)


def pool_sizes(num_blocks: int) -> Sizes:
    return Sizes(num_blocks, POOL_SEQS, POOL_SEQS * 1000, 1024)


def tokens(stream: int, count: int) -> list[int]:
    return np.random.default_rng(stream).integers(0, VOCAB_SIZE, size=count).tolist()


def s5_trace(seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, output) lengths like those of ShareGPT's conversations: clipped lognormal ones with
    means of 161 and 338."""
    rng = np.random.RandomState(seed)
    prompts = _clipped_lognormal(rng.standard_normal(S5_REQUESTS), 1.2, 161, 4, 2048)
    outputs = _clipped_lognormal(rng.standard_normal(S5_REQUESTS), 0.9, 338, 2, 1024)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def _clipped_lognormal(
    normals: npt.NDArray[np.float64], sigma: float, mean: float, shortest: int, longest: int
) -> npt.NDArray[np.int64]:
    """Lengths whose mean, before they are rounded, is `mean`: its logarithm is found by halving."""

    def lengths(mu: float) -> npt.NDArray[np.float64]:
        return np.exp(mu + sigma * normals).clip(1, longest)

    low, high = 0.0, 2 * math.log(longest)
    while (mu := (low + high) / 2) not in (low, high):
        low, high = (mu, high) if lengths(mu).mean() < mean else (low, mu)
    return np.rint(lengths(mu)).clip(shortest).astype(np.int64)


def write_trace(path: Path) -> None:
    path.write_text("".join(f"{prompt} {output}\n" for prompt, output in s5_trace()))
