"""Glm4ForCausalLM: GLM-4-0414 9B and 32B, with norms around each part of a layer."""

from __future__ import annotations

from fastpage.models.architectures.config import Config
from fastpage.models.architectures.glm import PACKED, glm_spec
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
}


def spec(config: Config) -> DecoderSpec:
    return glm_spec(config, norm_place="sandwich")


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec, _NORMS, linears=PACKED)
