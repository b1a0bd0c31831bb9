"""LlamaForCausalLM, LLaMAForCausalLM: Llama 1 to 3, Vicuna, Alpaca, SmolLM, TinyLlama, others."""

from __future__ import annotations

from collections.abc import Mapping

from fastpage.models.architectures.config import Config, base_spec, flag
from fastpage.models.sources import AS_IS, Sources, Transform, affine, source
from fastpage.models.spec import DecoderSpec

# Of a layer, from our names to theirs, by norm_place: what the successors of Llama agree upon.
_NORMS: Mapping[str, Mapping[str, str]] = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "output": {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "sandwich": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}
_LINEARS: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def spec(config: Config) -> DecoderSpec:
    attention_bias = flag(config, "attention_bias", False)
    return base_spec(
        {"max_position_embeddings": 2048, **config},  # the first Llama's configs have none
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


def sources(spec: DecoderSpec) -> Sources:
    return llama_sources(spec)


def llama_sources(
    spec: DecoderSpec,
    norms: Mapping[str, str] | None = None,
    linears: Mapping[str, tuple[str, ...]] | None = None,
    norm_transform: Transform = AS_IS,
) -> Sources:
    """As Llama and its successors name their tensors; `norms` and `linears`: what a model calls
    otherwise in its layers."""
    norms = _NORMS[spec.norm_place] if norms is None else norms
    linears = {**_LINEARS, **(linears or {})}
    names = {"embed": source("model.embed_tokens.weight")}
    names |= _norm(spec, "final_norm", "model.norm", norm_transform)
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for norm, module in norms.items():
            names |= _norm(spec, f"{ours}.{norm}", f"{theirs}.{module}", norm_transform)
        for norm in ("q_norm", "k_norm") if spec.qk_norm else ():
            names[f"{ours}.attn.{norm}"] = source(
                f"{theirs}.self_attn.{norm}.weight", transform=norm_transform
            )
        for linear, has_bias in _biases(spec, layer).items():
            modules = (f"{theirs}.{module}" for module in linears[linear])
            names |= affine(f"{ours}.{linear}", *modules, bias=has_bias)
    return names


def _biases(spec: DecoderSpec, layer: int) -> dict[str, bool]:
    """The linear layers that a layer has, and if with a bias."""
    biases = {"attn.qkv": spec.qkv_bias, "attn.o": spec.o_bias}
    if not spec.has_experts(layer):
        up = "mlp.gate_up" if spec.gated_mlp else "mlp.up"
        biases |= {up: spec.mlp_bias, "mlp.down": spec.mlp_bias}
    return biases


def _norm(spec: DecoderSpec, ours: str, theirs: str, transform: Transform) -> Sources:
    return affine(ours, theirs, bias=spec.norm_bias, transform=transform)
