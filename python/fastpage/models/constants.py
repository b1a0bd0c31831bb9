"""Weights that are computed from a DecoderSpec rather than read."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastpage.models.rotary import cos_sin_table
from fastpage.models.spec import DecoderSpec

COS_SIN, LOCAL_COS_SIN = "rotary.cos_sin", "rotary.local_cos_sin"
ALIBI_SLOPES = "alibi.slopes"
NORM_ONES = "norm.ones"


def constants(spec: DecoderSpec) -> dict[str, npt.NDArray[np.float32]]:
    """The values of each, by canonical name."""
    values = {}
    for name, rotary in ((COS_SIN, spec.rotary), (LOCAL_COS_SIN, spec.local_rotary)):
        if rotary is not None:
            values[name] = cos_sin_table(rotary, spec.max_position_embeddings)
    if spec.alibi_slopes:
        values[ALIBI_SLOPES] = np.asarray(spec.alibi_slopes, np.float32)
    if not spec.norm_weight:
        values[NORM_ONES] = np.ones(spec.hidden_size, np.float32)
    return values


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al. 2022): a geometric sequence down to 2 ** -max_bias.

    Where num_heads is no power of two: those of the next smaller power, then every other one of
    twice as many, as the authors' code has it.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(power, max_bias)
    more = _geometric(2 * power, max_bias)[::2]
    return tuple((slopes + more)[:num_heads])


def _geometric(count: int, max_bias: float) -> list[float]:
    return [math.pow(2.0, -max_bias * (i + 1) / count) for i in range(count)]
