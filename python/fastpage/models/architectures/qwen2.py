"""Qwen2ForCausalLM: Qwen2, Qwen2.5, QwQ (Llama with biases on q, k and v)."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, qwen_sliding_windows
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    return base_spec(config, qkv_bias=True, sliding_windows=qwen_sliding_windows(config))


__all__ = ["sources", "spec"]
