"""BloomForCausalLM: BLOOM and BLOOMZ, with ALiBi and a norm of the embedding."""

from __future__ import annotations

from fastpage.models.architectures.config import (
    Config,
    flag,
    head_size,
    num_heads,
    num_layers,
    number,
    present,
    refuse_other,
    size,
)
from fastpage.models.constants import alibi_slopes
from fastpage.models.sources import AS_IS, Sources, Transform, affine, source, ungrouped_qkv
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    refuse_other(config, "apply_residual_connection_post_layernorm", False)
    hidden_size = size(config, present(config, "n_embed", "hidden_size"))
    heads = num_heads(config, present(config, "n_head", "num_attention_heads"))
    return DecoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers(config, present(config, "n_layer", "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_size(hidden_size, heads),
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=size(config, "seq_length", 2048),  # what it was trained with
        alibi_slopes=alibi_slopes(heads),
        norm_kind="layer",
        norm_bias=True,
        embed_norm=True,
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
    )


def sources(spec: DecoderSpec) -> Sources:
    names = {
        **affine("embed_norm", "transformer.word_embeddings_layernorm", bias=True),
        **body_sources(spec, ungrouped_qkv(spec.num_heads, spec.head_dim)),
    }
    for layer in range(spec.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        names |= affine(f"{ours}.attn_norm", f"{theirs}.input_layernorm", bias=True)
        names |= affine(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=True)
    return names


def body_sources(spec: DecoderSpec, qkv: Transform) -> Sources:
    """All but the norms of embedding and layers, as Falcon names them too."""
    names = {
        "embed": source("transformer.word_embeddings.weight"),
        **affine("final_norm", "transformer.ln_f", bias=True),
    }
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        for ours, theirs, has_bias, transform in (
            ("attn.qkv", "self_attention.query_key_value", spec.qkv_bias, qkv),
            ("attn.o", "self_attention.dense", spec.o_bias, AS_IS),
            ("mlp.up", "mlp.dense_h_to_4h", spec.mlp_bias, AS_IS),
            ("mlp.down", "mlp.dense_4h_to_h", spec.mlp_bias, AS_IS),
        ):
            names |= affine(
                f"layers.{layer}.{ours}",
                f"transformer.h.{layer}.{theirs}",
                bias=has_bias,
                transform=transform,
            )
    return names
