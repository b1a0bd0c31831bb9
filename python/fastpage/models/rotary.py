"""Rotary position embeddings: their parameters, and the table of cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding (Su et al. 2021) of the first `dim` columns of a head, and its scaling.

    scaling: "default"; "linear" (positions divided by factor); "llama3" (Llama 3.1: low frequencies
    divided by factor); "yarn" (Peng et al. 2023); "longrope" (Ding et al. 2024: each frequency
    divided by a factor of its own).
    """

    dim: int
    theta: float = 10000.0
    style: str = "neox"  # or "interleaved": see ops.rotary
    scaling: str = "default"
    factor: float = 1.0
    original_max_position: int = 0  # all but linear: the length trained on before it was extended
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the bounds of the ramp are whole dimensions
    magnitude: float = 1.0  # yarn, longrope: cosines and sines are multiplied by it
    short_factors: tuple[float, ...] = ()  # longrope, [dim / 2]: if original_max_position suffices
    long_factors: tuple[float, ...] = ()  # longrope, [dim / 2]: if it does not

    SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


def cos_sin_table(spec: RotarySpec, num_positions: int) -> npt.NDArray[np.float32]:
    """[num_positions, dim]: cosines in the first half of a row, sines in the second.

    In float32 throughout, as models are trained. LongRoPE's factors are chosen by num_positions,
    once for all sequences, as vLLM does: keys in the cache would not bear a change half-way.
    """
    positions = np.arange(num_positions, dtype=np.float32)
    angles = np.outer(positions, inverse_frequencies(spec, num_positions))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return (table * np.float32(spec.magnitude)).astype(np.float32)


def inverse_frequencies(spec: RotarySpec, num_positions: int) -> npt.NDArray[np.float32]:
    """Radians per position, [dim / 2], for sequences of up to num_positions tokens."""
    exponents = np.arange(0, spec.dim, 2, dtype=np.float32) / np.float32(spec.dim)
    plain = (1.0 / np.float32(spec.theta) ** exponents).astype(np.float32)
    if spec.scaling == "linear":
        plain = plain / np.float32(spec.factor)
    elif spec.scaling == "llama3":
        plain = _llama3(spec, plain)
    elif spec.scaling == "yarn":
        plain = _yarn(spec, plain)
    elif spec.scaling == "longrope":
        is_long = num_positions > spec.original_max_position
        plain = plain / np.asarray(spec.long_factors if is_long else spec.short_factors)
    return plain.astype(np.float32)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature, sqrt(1 / t) of equation 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original_max_position: int) -> float:
    """LongRoPE's attention temperature."""
    if factor <= 1 or original_max_position <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position))


def _llama3(spec: RotarySpec, plain: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Long waves are divided by factor, short ones kept, those between are blended."""
    turns = spec.original_max_position * plain / (2 * np.pi)  # within the original context
    share_kept = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    share_kept = np.clip(share_kept, 0, 1)
    return (1 - share_kept) * plain / spec.factor + share_kept * plain


def _yarn(spec: RotarySpec, plain: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """NTK-by-parts: a linear ramp over the dimensions from kept to divided by factor."""
    low = min(max(_dimension_of(spec, spec.beta_fast), 0), spec.dim)
    high = min(_dimension_of(spec, spec.beta_slow), spec.dim - 1)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    ramp = (np.arange(spec.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    ramp = np.clip(ramp, 0, 1)
    return plain / spec.factor * ramp + plain * (1 - ramp)


def _dimension_of(spec: RotarySpec, turns: float) -> float:
    """The dimension that turns so many times within the original context."""
    wavelength_ratio = spec.original_max_position / (turns * 2 * math.pi)
    return spec.dim * math.log(wavelength_ratio) / (2 * math.log(spec.theta))
