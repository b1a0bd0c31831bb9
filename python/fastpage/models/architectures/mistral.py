"""MistralForCausalLM: Mistral (Llama with a sliding window in every layer, where there is one)."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, windows_everywhere
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    # A config without the field is an early one, when 4,096 was the default; null means none.
    config = {"sliding_window": 4096, **config}
    return base_spec(config, sliding_windows=windows_everywhere(config))


__all__ = ["sources", "spec"]
