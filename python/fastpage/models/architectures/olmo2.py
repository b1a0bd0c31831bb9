"""Olmo2ForCausalLM: OLMo 2, with norms of what attention and MLP put out, and of all of q and k."""

from __future__ import annotations

from typing import Any

from fastpage.models.architectures.config import Config, base_spec, flag, number
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    return olmo2_spec(config)


def olmo2_spec(config: Config, **more: Any) -> DecoderSpec:
    """What OLMo 2 and 3 have in common."""
    attention_bias = flag(config, "attention_bias", False)
    return base_spec(
        config,
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        norm_place="output",
        qk_norm="all",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        **more,
    )


__all__ = ["sources", "spec"]
