"""FalconForCausalLM: Falcon 7B, 40B, 180B and 11B, and Falcon-RW (ALiBi).

Later Falcons (Falcon 3) call themselves LlamaForCausalLM.
"""

from __future__ import annotations

import numpy as np

from fastpage.models.architectures.bloom import body_sources
from fastpage.models.architectures.config import (
    Config,
    activation,
    flag,
    head_size,
    num_heads,
    num_kv_heads,
    num_layers,
    number,
    present,
    refuse_other,
    rotary_spec,
    size,
)
from fastpage.models.constants import alibi_slopes
from fastpage.models.sources import Sources, affine, ungrouped_qkv
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    refuse_other(config, "apply_residual_connection_post_layernorm", False)
    hidden_size = size(config, present(config, "n_embed", "hidden_size"))
    heads = num_heads(config)
    head_dim = head_size(hidden_size, heads)
    max_position = size(config, "max_position_embeddings", 2048)
    has_alibi = flag(config, "alibi", False)
    has_bias = flag(config, "bias", False)
    return DecoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(config, "ffn_hidden_size", 4 * hidden_size),
        num_layers=num_layers(config),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(config, heads),
        head_dim=head_dim,
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=max_position,
        rotary=None if has_alibi else rotary_spec(config, head_dim, max_position),
        alibi_slopes=_alibi_slopes(heads, head_dim) if has_alibi else (),
        norm_kind="layer",
        norm_bias=True,
        residual=_residual(config),
        activation=activation(config, "activation", "gelu"),
        gated_mlp=False,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
        tie_embeddings=flag(config, "tie_word_embeddings", True),
    )


def _num_kv_heads(config: Config, heads: int) -> int:
    if flag(config, "new_decoder_architecture", False):
        return num_kv_heads(config, "num_kv_heads", heads)
    return 1 if flag(config, "multi_query", True) else heads


def _residual(config: Config) -> str:
    if flag(config, "new_decoder_architecture", False):
        two_norms = size(config, "num_ln_in_parallel_attn", 2, maximum=2) == 2
        return "parallel_two_norms" if two_norms else "parallel"
    return "parallel" if flag(config, "parallel_attn", True) else "sequential"


def _alibi_slopes(heads: int, head_dim: int) -> tuple[float, ...]:
    """Falcon adds ALiBi's bias before it scales the scores, and rounds the slopes to bfloat16.

    It rounds slope * position to bfloat16, too, which is not done here: beyond position 256, or
    with slopes that are no powers of two, its biases lie up to 0.4 % off these.
    """
    bits = np.asarray(alibi_slopes(heads), np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)  # to nearest, ties to even
    return tuple(float(slope) * head_dim**-0.5 for slope in rounded.view(np.float32))


def sources(spec: DecoderSpec) -> Sources:
    names = body_sources(spec, ungrouped_qkv(spec.num_kv_heads, spec.head_dim))
    norms = {
        "sequential": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "parallel": {"attn_norm": "input_layernorm"},
        "parallel_two_norms": {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    }[spec.residual]
    for layer in range(spec.num_layers):
        for ours, theirs in norms.items():
            names |= affine(f"layers.{layer}.{ours}", f"transformer.h.{layer}.{theirs}", bias=True)
    return names
