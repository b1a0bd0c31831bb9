"""The sampler's definition, again, in float64 numpy: by sorting, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpage import _C


def philox_uniform(seed: int, position: int) -> float:
    """Philox4x32-10 (Salmon et al., SC11), 53 bits of its first two words."""
    mask = 0xFFFFFFFF
    counter = [position & mask, position >> 32, 0, 0]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def process(
    logits: np.ndarray,
    params: _C.SamplingParams,
    tokens: Sequence[int],
    num_prompt_tokens: int,
    eos_token_ids: Sequence[int] = (),
) -> np.ndarray:
    """Logits after everything that greedy requests see too."""
    x = logits.astype(np.float64)
    output = list(tokens[num_prompt_tokens:])
    if params.allowed_token_ids:
        forbidden = np.ones(len(x), bool)
        forbidden[params.allowed_token_ids] = False
        x[forbidden] = -np.inf
    for *prefix, last in params.bad_words:
        if output[len(output) - len(prefix) :] == prefix:
            x[last] = -np.inf
    if len(output) < params.min_tokens:
        x[[*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(tokens):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def kept_logits(x: np.ndarray, params: _C.SamplingParams) -> tuple[np.ndarray, float]:
    """Processed logits after temperature, min_p, top_k and top_p; what is dropped is -inf.

    Also the least distance of any token from the point where it would have been kept or dropped
    instead: rounding may decide otherwise if that is tiny.
    """
    x = x / params.temperature
    margin = np.inf
    if params.min_p > 0:
        bound = x.max() + np.log(params.min_p)
        margin = min(margin, np.abs(x - bound).min())
        x = np.where(x >= bound, x, -np.inf)
    if 0 < params.top_k < len(x):
        descending = np.sort(x)[::-1]
        kth, following = descending[params.top_k - 1 : params.top_k + 1]
        margin = min(margin, np.inf if kth == following else kth - following)
        x = np.where(x >= kth, x, -np.inf)
    if params.top_p < 1:
        probs = np.exp(log_softmax(x))
        mass_above = np.array([probs[x > value].sum() for value in x])
        margin = min(margin, np.abs(mass_above - params.top_p).min())
        x = np.where(mass_above < params.top_p, x, -np.inf)
    return x, margin


def draw(kept: np.ndarray, uniform: float) -> tuple[int, float]:
    """The token at `uniform` of the cumulative distribution, and its distance from another."""
    cumulative = np.cumsum(np.exp(log_softmax(kept)))
    cumulative /= cumulative[-1]
    return int(np.searchsorted(cumulative, uniform, side="right")), np.abs(
        cumulative - uniform
    ).min()
