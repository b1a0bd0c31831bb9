"""MistralForCausalLM: Mistral (Llama with a sliding window in every layer, where there is one)."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, num_layers, size
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    # A config without the field is an early one, when 4,096 was the default; null means none.
    windows: tuple[int, ...] = ()
    if config.get("sliding_window", 4096) is not None:
        windows = (size(config, "sliding_window", 4096),) * num_layers(config)
    return base_spec(config, sliding_windows=windows)


__all__ = ["sources", "spec"]
