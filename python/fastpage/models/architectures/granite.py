"""GraniteForCausalLM: Granite 3, Llama with multipliers of its embedding, residuals and logits."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, flag, num_layers, number
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    attention_bias = flag(config, "attention_bias", False)
    return base_spec(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias", False),
        embed_scale=number(config, "embedding_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        attention_scales=(number(config, "attention_multiplier", 1.0),) * num_layers(config),
        logits_scale=1 / number(config, "logits_scaling", 1.0),
    )


__all__ = ["sources", "spec"]
