"""MPTForCausalLM, MptForCausalLM: MosaicML's MPT, with ALiBi and clipped q, k and v.

Fields and maths are those of MosaicML's own model (llm-foundry), of which transformers' MptConfig
is a part.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models.architectures.config import (
    Config,
    flag,
    head_size,
    num_heads,
    num_kv_heads,
    num_layers,
    number,
    refuse_other,
    size,
)
from fastpage.models.constants import alibi_slopes
from fastpage.models.sources import Sources, affine, source
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    attention = config.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise CheckpointError(f"the model's config has attn_config {attention!r:.40}: no mapping")
    _refuse_what_is_not_there(config, attention)
    hidden_size = size(config, "d_model")
    heads = num_heads(config, "n_heads")
    head_dim = head_size(hidden_size, heads)
    layers = num_layers(config, "n_layers")
    max_position = size(config, "max_seq_len", 2048)
    has_alibi = flag(attention, "alibi", True)
    if not has_alibi and not flag(config, "learned_pos_emb", True):
        raise UnsupportedArchitecture("neither alibi nor learned_pos_emb: one of them is needed")
    has_bias = not flag(config, "no_bias", True)
    has_qk_norm = flag(attention, "qk_ln", False)
    if has_qk_norm and has_bias:
        raise UnsupportedArchitecture("qk_ln is True: only with no_bias is it supported")
    softmax_scale = number(attention, "softmax_scale", head_dim**-0.5)
    max_bias = number(attention, "alibi_bias_max", 8.0)
    return DecoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(config, "expansion_ratio", 4) * hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_num_kv_heads(attention, heads),
        head_dim=head_dim,
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=max_position,
        alibi_slopes=alibi_slopes(heads, max_bias) if has_alibi else (),
        learned_positions=0 if has_alibi else max_position,
        norm_kind="layer",
        norm_bias=has_bias,
        qk_norm="all" if has_qk_norm else "",
        activation="gelu",
        gated_mlp=False,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        logits_scale=_logits_scale(config, hidden_size),
        attention_scales=(softmax_scale,) * layers,
        qkv_clip=number(attention, "clip_qkv", 0.0),
    )


def _refuse_what_is_not_there(config: Config, attention: Config) -> None:
    refuse_other(config, "norm_type", "low_precision_layernorm", "layernorm")
    for name in ("prefix_lm", "qk_gn", "rope"):
        refuse_other(attention, name, False)
    refuse_other(attention, "sliding_window_size", -1)
    refuse_other(attention, "attn_logit_softcapping")
    mlp = config.get("ffn_config") or {}
    if not isinstance(mlp, Mapping):
        raise CheckpointError(f"the model's config has ffn_config {mlp!r:.40}: no mapping")
    refuse_other(mlp, "ffn_type", "mptmlp")
    refuse_other(mlp, "ffn_act_fn", {"name": "gelu", "approximate": "none"})


def _num_kv_heads(attention: Config, heads: int) -> int:
    refuse_other(
        attention,
        "attn_type",
        "multihead_attention",
        "multiquery_attention",
        "grouped_query_attention",
    )
    if attention.get("attn_type") == "multiquery_attention":
        return 1
    return num_kv_heads(attention, "kv_n_heads", heads)


def _logits_scale(config: Config, hidden_size: int) -> float:
    if config.get("logit_scale") == "inv_sqrt_d_model":
        return hidden_size**-0.5
    return number(config, "logit_scale", 1.0)


def sources(spec: DecoderSpec) -> Sources:
    names = {
        "embed": source("transformer.wte.weight"),
        **affine("final_norm", "transformer.norm_f", bias=spec.norm_bias),
    }
    if spec.learned_positions:
        names["positions"] = source("transformer.wpe.weight")
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        for ours, theirs, has_bias in (
            ("attn_norm", "norm_1", spec.norm_bias),
            ("attn.qkv", "attn.Wqkv", spec.qkv_bias),
            ("attn.o", "attn.out_proj", spec.o_bias),
            ("mlp_norm", "norm_2", spec.norm_bias),
            ("mlp.up", "ffn.up_proj", spec.mlp_bias),
            ("mlp.down", "ffn.down_proj", spec.mlp_bias),
        ):
            names |= affine(
                f"layers.{layer}.{ours}", f"transformer.blocks.{layer}.{theirs}", bias=has_bias
            )
        if spec.qk_norm:
            for part in "qk":
                names[f"layers.{layer}.attn.{part}_norm"] = source(
                    f"transformer.blocks.{layer}.attn.{part}_ln.weight"
                )
    return names
