"""MistralForCausalLM: Llama with a sliding window in every layer, where the config has one."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, required
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    # A config without the field is an early one, when 4,096 was the default; null means none.
    window = config.get("sliding_window", 4096) or 0
    return base_spec(config, sliding_windows=(window,) * required(config, "num_hidden_layers"))


__all__ = ["sources", "spec"]
