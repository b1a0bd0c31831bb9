"""GPT2LMHeadModel: GPT-2, DistilGPT2, Cerebras-GPT and others of that layout."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastpage.models.architectures.config import (
    Config,
    activation,
    flag,
    head_size,
    num_layers,
    number,
    refuse_other,
    size,
)
from fastpage.models.sources import AS_IS, TRANSPOSED, Sources, Transform, affine, source
from fastpage.models.spec import DecoderSpec

# The causal mask, which older checkpoints carry.
IGNORED = (".attn.bias", ".attn.masked_bias")

# For the fields that a config lacks.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}


def spec(config: Config) -> DecoderSpec:
    spec = absolute_spec({**DEFAULTS, **config})
    scales = [spec.attention_scale(layer) for layer in range(spec.num_layers)]
    if flag(config, "scale_attn_by_inverse_layer_idx", False):
        scales = [scale / (layer + 1) for layer, scale in enumerate(scales)]
    return dataclasses.replace(spec, attention_scales=tuple(scales))


def absolute_spec(config: Config) -> DecoderSpec:
    """Of GPT-2 and of what has its learned positions and biases everywhere."""
    spec = gpt_spec(config, qkv_bias=True, o_bias=True)
    # reorder_and_upcast_attn and attention_softmax_in_fp32 are what is done here in any case.
    scale = spec.head_dim**-0.5 if flag(config, "scale_attn_weights", True) else 1.0
    return dataclasses.replace(
        spec,
        learned_positions=spec.max_position_embeddings,
        attention_scales=(scale,) * spec.num_layers,
    )


def gpt_spec(config: Config, **more: Any) -> DecoderSpec:
    """What all have in common whose config uses GPT-2's names of fields."""
    refuse_other(config, "add_cross_attention", False)
    hidden_size, num_heads = size(config, "n_embd"), size(config, "n_head")
    return DecoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(config, "n_inner", 4 * hidden_size),
        num_layers=num_layers(config, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_size(hidden_size, num_heads),
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=size(config, "n_positions"),
        norm_kind="layer",
        norm_bias=True,
        activation=activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        **more,
    )


def sources(spec: DecoderSpec) -> Sources:
    return absolute_sources(spec, linear=TRANSPOSED, qkv=TRANSPOSED)


def absolute_sources(
    spec: DecoderSpec, linear: Transform = AS_IS, qkv: Transform = AS_IS
) -> Sources:
    """Of what has GPT-2's names of tensors; linear and qkv: what is done to these."""
    names = {
        "embed": source("transformer.wte.weight"),
        "positions": source("transformer.wpe.weight"),
        **affine("final_norm", "transformer.ln_f", bias=True),
    }
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        for ours, theirs, transform in (
            ("attn_norm", "ln_1", AS_IS),
            ("attn.qkv", "attn.c_attn", qkv),
            ("attn.o", "attn.c_proj", linear),
            ("mlp_norm", "ln_2", AS_IS),
            ("mlp.up", "mlp.c_fc", linear),
            ("mlp.down", "mlp.c_proj", linear),
        ):
            name = f"layers.{layer}.{ours}", f"transformer.h.{layer}.{theirs}"
            names.update(affine(*name, bias=True, transform=transform))
    return names
