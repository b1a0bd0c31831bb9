"""Phi3ForCausalLM: Phi-3, Phi-3.5 and Phi-4, their mini and medium models.

LongRoPE's factors, short or long, are chosen by max_model_len, as vLLM does: the long ones where it
exceeds original_max_position_embeddings. transformers chooses anew for each sequence by its length,
and so agrees with the short ones up to that length, with the long ones beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastpage.models.architectures.config import Config, base_spec, number, windows_everywhere
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec

_PACKED = {"attn.qkv": ("self_attn.qkv_proj",), "mlp.gate_up": ("mlp.gate_up_proj",)}


def spec(config: Config) -> DecoderSpec:
    return base_spec(
        {"original_max_position_embeddings": 4096, **_with_longrope(config)},
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        sliding_windows=windows_everywhere(config),
    )


def _with_longrope(config: Config) -> Config:
    """Early configs call LongRoPE "yarn"."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field)
    if not isinstance(rope, Mapping) or "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return config
    return {**config, field: {**rope, "rope_type": "longrope"}}


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec, linears=_PACKED)
