"""GemmaForCausalLM: Gemma 1, CodeGemma."""

from __future__ import annotations

from typing import Any

from fastpage.models.architectures.config import (
    Config,
    activation,
    base_spec,
    flag,
    refuse_other,
    size,
)
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import PLUS_ONE, Sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    # "gelu" in the first configs was a slip: the models were trained with its approximation.
    kind = activation(config, "hidden_act", "gelu_pytorch_tanh")
    return gemma_spec(config, activation="gelu_tanh" if kind == "gelu" else kind)


def gemma_spec(config: Config, **more: Any) -> DecoderSpec:
    """What all Gemmas have in common."""
    refuse_other(config, "use_bidirectional_attention", False)
    attention_bias = flag(config, "attention_bias", False)
    return base_spec(
        config,
        head_dim=256,
        embed_scale=size(config, "hidden_size") ** 0.5,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        **more,
    )


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec, norm_transform=PLUS_ONE)
