"""OPTForCausalLM: OPT 125M to 66B, Galactica."""

from __future__ import annotations

from fastpage.models.architectures.config import (
    Config,
    activation,
    flag,
    head_size,
    num_layers,
    size,
)
from fastpage.models.sources import Sources, affine, source
from fastpage.models.spec import DecoderSpec

_POSITION_OFFSET = 2  # of fairseq's padding token and one more


def spec(config: Config) -> DecoderSpec:
    hidden_size = size(config, "hidden_size", 768)
    num_heads = size(config, "num_attention_heads", 12)
    embed_size = size(config, "word_embed_proj_dim", hidden_size)
    max_position = size(config, "max_position_embeddings", 2048)
    bias = flag(config, "enable_bias", True)
    has_norm_weights = flag(config, "layer_norm_elementwise_affine", True)
    is_pre_norm = flag(config, "do_layer_norm_before", True)
    return DecoderSpec(
        vocab_size=size(config, "vocab_size", 50272),
        hidden_size=hidden_size,
        intermediate_size=size(config, "ffn_dim", 3072),
        num_layers=num_layers(config, default=12),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_size(hidden_size, num_heads),
        norm_eps=1e-5,
        max_position_embeddings=max_position,
        learned_positions=max_position + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        norm_kind="layer",
        norm_weight=has_norm_weights,
        norm_bias=has_norm_weights,
        norm_place="pre" if is_pre_norm else "post",
        final_norm=is_pre_norm and not flag(config, "_remove_final_layer_norm", False),
        activation=activation(config, "activation_function", "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        embed_size=0 if embed_size == hidden_size else embed_size,
    )


def sources(spec: DecoderSpec) -> Sources:
    names = {
        "embed": source("model.decoder.embed_tokens.weight"),
        "positions": source("model.decoder.embed_positions.weight"),
    }
    if spec.embed_size:
        names["embed_in"] = source("model.decoder.project_in.weight")
        names["embed_out"] = source("model.decoder.project_out.weight")
    if spec.final_norm and spec.norm_weight:
        names.update(affine("final_norm", "model.decoder.final_layer_norm", bias=True))
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        names.update(_layer_sources(spec, f"layers.{layer}", f"model.decoder.layers.{layer}"))
    return names


def _layer_sources(spec: DecoderSpec, ours: str, theirs: str) -> Sources:
    names: Sources = {}
    if spec.norm_weight:
        names.update(affine(f"{ours}.attn_norm", f"{theirs}.self_attn_layer_norm", bias=True))
        names.update(affine(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm", bias=True))
    qkv = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
    names.update(affine(f"{ours}.attn.qkv", *qkv, bias=spec.qkv_bias))
    names.update(affine(f"{ours}.attn.o", f"{theirs}.self_attn.out_proj", bias=spec.o_bias))
    names.update(affine(f"{ours}.mlp.up", f"{theirs}.fc1", bias=spec.mlp_bias))
    names.update(affine(f"{ours}.mlp.down", f"{theirs}.fc2", bias=spec.mlp_bias))
    return names
