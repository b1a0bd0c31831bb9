"""A small decoder with random weights, for whatever runs a Program."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpage.models import DecoderSpec, RotarySpec
from fastpage.models.rotary import cos_sin_table

VOCAB = 67


def small_spec(head_dim: int, max_model_len: int) -> DecoderSpec:
    """Of two layers, as those of Llama."""
    return DecoderSpec(
        vocab_size=VOCAB,
        hidden_size=4 * head_dim,
        intermediate_size=6 * head_dim,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_position_embeddings=max_model_len,
        rotary=RotarySpec(dim=head_dim),
    )


def load_random_weights(executor: Any, program: Any, spec: DecoderSpec, scale: float = 1.0) -> Any:
    """The same ones for every executor of `program`, which is decoder(spec)."""
    random = np.random.default_rng(0)
    for buffer in program.buffers:
        if buffer.kind != "weight":
            continue
        values = random.standard_normal(buffer.shape, np.float32) * np.float32(scale)
        if buffer.name == "rotary.cos_sin":
            assert spec.rotary
            values = cos_sin_table(spec.rotary, spec.max_position_embeddings)
        executor.load_weight(buffer.name, values)
    executor.finish_loading()
    return executor
