"""Gemma3ForCausalLM, Gemma3ForConditionalGeneration: Gemma 3, MedGemma; of the models that see
too, the part for text.

Most layers have a sliding window, and a rotary embedding of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastpage.errors import CheckpointError
from fastpage.models.architectures.config import (
    Config,
    every_nth_layer,
    layered_rotary,
    size,
    sliding_windows,
)
from fastpage.models.architectures.gemma2 import gemma2_spec, sources
from fastpage.models.spec import DecoderSpec

# What the configs of the models that see, too, leave out.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
_HEAD_DIM = 256

ROOTS = ("model.language_model.", "language_model.model.")
IGNORED = tuple(
    f"{root}{part}."
    for root in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)


def spec(config: Config) -> DecoderSpec:
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise CheckpointError(f"the model's config has text_config {text!r:.40}: no mapping")
    config = {**_DEFAULTS, **text}
    rotary, local_rotary = layered_rotary(
        config,
        size(config, "head_dim", _HEAD_DIM),
        size(config, "max_position_embeddings"),
        theta=1_000_000.0,
        local_theta=10_000.0,
    )
    types = every_nth_layer(config, size(config, "sliding_window_pattern", 6))
    return gemma2_spec(
        config,
        rotary=rotary,
        local_rotary=local_rotary,
        qk_norm="head",
        sliding_windows=sliding_windows(config, size(config, "sliding_window", 4096), types),
    )


__all__ = ["sources", "spec"]
