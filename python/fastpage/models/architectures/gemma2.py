"""Gemma2ForCausalLM: Gemma 2, with norms around each part of a layer, soft caps, and a sliding
window in every other layer."""

from __future__ import annotations

from typing import Any

from fastpage.models.architectures.config import (
    Config,
    activation,
    every_nth_layer,
    num_layers,
    number,
    size,
    sliding_windows,
)
from fastpage.models.architectures.gemma import gemma_spec, sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    config = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **config}
    window = size(config, "sliding_window", 4096)
    windows = sliding_windows(config, window, every_nth_layer(config, 2))
    return gemma2_spec(config, sliding_windows=windows)


def gemma2_spec(config: Config, **more: Any) -> DecoderSpec:
    """What Gemma 2 and 3 have in common."""
    scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
    return gemma_spec(
        config,
        norm_place="sandwich",
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scales=(scale,) * num_layers(config),
        attention_soft_cap=number(config, "attn_logit_softcapping", 0),
        logits_soft_cap=number(config, "final_logit_softcapping", 0),
        **more,
    )


__all__ = ["sources", "spec"]
