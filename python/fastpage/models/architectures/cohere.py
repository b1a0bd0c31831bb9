"""CohereForCausalLM: Command R, Aya (attention and MLP read the same LayerNorm)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpage.models.architectures.config import Config, base_spec, flag, number, present, size
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import FLATTENED, Sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    qk_norm = "each_head" if flag(config, "use_qk_norm", False) else ""
    return cohere_spec({"rope_theta": 500_000.0, **config}, qk_norm=qk_norm)


def cohere_spec(config: Config, **more: Any) -> DecoderSpec:
    """What Command R and its successor have in common."""
    attention_bias = flag(config, "attention_bias", False)
    # Command R's max_position_embeddings is 8,192, though it was made for 131,072.
    limit = present(config, "model_max_length", "max_position_embeddings")
    spec = base_spec(
        {**config, "max_position_embeddings": size(config, limit)},
        norm_kind="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        residual="parallel",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        logits_scale=number(config, "logit_scale", 0.0625),
        **more,
    )
    assert spec.rotary is not None
    return replace(spec, rotary=replace(spec.rotary, style="interleaved"))


def sources(spec: DecoderSpec) -> Sources:
    # The norms of q and k are stored as [heads, head_dim].
    return llama_sources(spec, {"attn_norm": "input_layernorm"}, norm_transform=FLATTENED)
