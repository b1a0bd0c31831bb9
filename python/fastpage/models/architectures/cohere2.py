"""Cohere2ForCausalLM: Command R7B, Command A (three of four layers have a sliding window, the
fourth knows no positions)."""

from __future__ import annotations

from dataclasses import replace

from fastpage.models.architectures.cohere import cohere_spec, sources
from fastpage.models.architectures.config import Config, every_nth_layer, size, sliding_windows
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    types = every_nth_layer(config, size(config, "sliding_window_pattern", 4))
    windows = sliding_windows(config, size(config, "sliding_window", 4096), types)
    spec = cohere_spec(config, sliding_windows=windows)
    return replace(spec, rotary=None, local_rotary=spec.rotary)


__all__ = ["sources", "spec"]
