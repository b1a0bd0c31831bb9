"""Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder: Qwen3 with a mixture of experts
in most layers."""

from __future__ import annotations

import dataclasses

from fastpage.errors import CheckpointError
from fastpage.models.architectures import llama
from fastpage.models.architectures.config import (
    Config,
    base_spec,
    flag,
    num_layers,
    size,
    windows_everywhere,
)
from fastpage.models.architectures.experts import expert_sources, moe_spec
from fastpage.models.sources import Sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    attention_bias = flag(config, "attention_bias", False)
    has_windows = flag(config, "use_sliding_window", False)
    moe = moe_spec(config, 128, 8, size(config, "moe_intermediate_size", 768))
    return base_spec(
        config,
        qk_norm="head",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        sliding_windows=windows_everywhere(config) if has_windows else (),
        moe=dataclasses.replace(
            moe,
            renormalize=flag(config, "norm_topk_prob", False),
            layers=_layers_with_experts(config),
        ),
    )


def _layers_with_experts(config: Config) -> tuple[bool, ...]:
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"the model's config has mlp_only_layers {dense!r:.40}: no layers")
    step = size(config, "decoder_sparse_step", 1)
    return tuple(
        (layer + 1) % step == 0 and layer not in dense for layer in range(num_layers(config))
    )


def sources(spec: DecoderSpec) -> Sources:
    return llama.sources(spec) | expert_sources(spec, "mlp", "gate_proj", "up_proj", "down_proj")
