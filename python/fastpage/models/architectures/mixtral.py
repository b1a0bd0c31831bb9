"""MixtralForCausalLM: Mixtral 8x7B and 8x22B, Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from fastpage.models.architectures import llama
from fastpage.models.architectures.config import Config, base_spec, size, windows_everywhere
from fastpage.models.architectures.experts import expert_sources, moe_spec
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    return base_spec(
        {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, **config},
        sliding_windows=windows_everywhere(config),
        moe=moe_spec(config, 8, 2, size(config, "intermediate_size")),
    )


def sources(spec: DecoderSpec) -> Sources:
    return llama.sources(spec) | expert_sources(spec, "block_sparse_moe", "w1", "w3", "w2")
