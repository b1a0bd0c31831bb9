"""Starcoder2ForCausalLM: StarCoder 2."""

from __future__ import annotations

from fastpage.models.architectures.config import (
    Config,
    activation,
    base_spec,
    flag,
    number,
    windows_everywhere,
)
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec

_LINEARS = {"mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)}


def spec(config: Config) -> DecoderSpec:
    has_bias = flag(config, "use_bias", True)
    return base_spec(
        config,
        norm_kind="layer",
        norm_bias=True,
        norm_eps=number(config, "norm_epsilon", 1e-5),
        activation=activation(config, "hidden_act", "gelu_pytorch_tanh"),
        gated_mlp=False,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        sliding_windows=windows_everywhere(config),
    )


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec, linears=_LINEARS)
