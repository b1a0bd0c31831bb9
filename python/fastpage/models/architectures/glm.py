"""GlmForCausalLM: GLM-4 9B (the -hf checkpoints)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpage.models.architectures.config import Config, base_spec, flag, number
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec

PACKED = {"mlp.gate_up": ("mlp.gate_up_proj",)}


def spec(config: Config) -> DecoderSpec:
    return glm_spec(config)


def glm_spec(config: Config, **more: Any) -> DecoderSpec:
    """What GlmForCausalLM and Glm4ForCausalLM have in common."""
    spec = base_spec(
        {"partial_rotary_factor": 0.5, **config},
        head_dim=128,
        norm_eps=number(config, "rms_norm_eps", 1.5625e-7),
        qkv_bias=flag(config, "attention_bias", True),
        **more,
    )
    assert spec.rotary is not None
    return replace(spec, rotary=replace(spec.rotary, style="interleaved"))


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec, linears=PACKED)
