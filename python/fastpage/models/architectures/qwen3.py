"""Qwen3ForCausalLM: Qwen3 (Llama with an RMSNorm on each head of q and k)."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, flag, qwen_sliding_windows
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    attention_bias = flag(config, "attention_bias", False)
    return base_spec(
        config,
        head_dim=128,
        qk_norm="head",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        sliding_windows=qwen_sliding_windows(config),
    )


__all__ = ["sources", "spec"]
