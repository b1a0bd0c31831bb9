"""LlamaForCausalLM: Llama 1 to 3, SmolLM2, TinyLlama and many others."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec
from fastpage.models.sources import Sources, affine, source
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    attention_bias = bool(config.get("attention_bias", False))
    return base_spec(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def sources(spec: DecoderSpec) -> Sources:
    names = {
        "embed": source("model.embed_tokens.weight"),
        "final_norm": source("model.norm.weight"),
    }
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        names.update(_layer_sources(spec, f"layers.{layer}", f"model.layers.{layer}"))
    return names


def _layer_sources(spec: DecoderSpec, ours: str, theirs: str) -> Sources:
    names = {
        f"{ours}.attn_norm": source(f"{theirs}.input_layernorm.weight"),
        f"{ours}.mlp_norm": source(f"{theirs}.post_attention_layernorm.weight"),
    }
    if spec.qk_norm:
        names[f"{ours}.attn.q_norm"] = source(f"{theirs}.self_attn.q_norm.weight")
        names[f"{ours}.attn.k_norm"] = source(f"{theirs}.self_attn.k_norm.weight")
    for linear, parts, has_bias in (
        ("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.qkv_bias),
        ("attn.o", ("self_attn.o_proj",), spec.o_bias),
        ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias),
        ("mlp.down", ("mlp.down_proj",), spec.mlp_bias),
    ):
        modules = (f"{theirs}.{part}" for part in parts)
        names.update(affine(f"{ours}.{linear}", *modules, bias=has_bias))
    return names
