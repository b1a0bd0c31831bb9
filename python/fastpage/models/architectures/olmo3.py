"""Olmo3ForCausalLM: OLMo 3, which is OLMo 2 with a sliding window in three of four layers."""

from __future__ import annotations

from fastpage.models.architectures.config import (
    Config,
    every_nth_layer,
    head_size,
    layered_rotary,
    number,
    size,
    sliding_windows,
)
from fastpage.models.architectures.olmo2 import olmo2_spec, sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    share = head_size(size(config, "hidden_size"), size(config, "num_attention_heads"))
    theta = number(config, "rope_theta", 500_000.0, above=1)
    rotary, local_rotary = layered_rotary(
        config,
        size(config, "head_dim", share),
        size(config, "max_position_embeddings"),
        theta=theta,
        local_theta=theta,
    )
    windows = sliding_windows(
        config, size(config, "sliding_window", 4096), every_nth_layer(config, 4)
    )
    return olmo2_spec(config, rotary=rotary, local_rotary=local_rotary, sliding_windows=windows)


__all__ = ["sources", "spec"]
