"""GPTNeoXForCausalLM: GPT-NeoX-20B, Pythia, Dolly v2, StableLM-alpha, RedPajama-INCITE."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, flag, head_size, number, size
from fastpage.models.sources import AS_IS, Sources, affine, source, ungrouped_qkv
from fastpage.models.spec import DecoderSpec

# The causal mask, which older checkpoints carry; the output projection, where it is tied.
IGNORED = (".attention.bias", ".attention.masked_bias", "embed_out.weight")

# For the fields that a config lacks.
_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
}


def spec(config: Config) -> DecoderSpec:
    config = {**_DEFAULTS, **config}
    # The family's own names of two fields.
    config["partial_rotary_factor"] = number(config, "rotary_pct", 0.25)
    config["rope_theta"] = number(config, "rotary_emb_base", 10000.0, above=1)
    config["head_dim"] = head_size(size(config, "hidden_size"), size(config, "num_attention_heads"))
    attention_bias = flag(config, "attention_bias", True)
    is_parallel = flag(config, "use_parallel_residual", True)
    return base_spec(
        config,
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        norm_kind="layer",
        norm_bias=True,
        residual="parallel_two_norms" if is_parallel else "sequential",
        gated_mlp=False,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=True,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


def sources(spec: DecoderSpec) -> Sources:
    names = {
        "embed": source("gpt_neox.embed_in.weight"),
        **affine("final_norm", "gpt_neox.final_layer_norm", bias=True),
    }
    if not spec.tie_embeddings:
        names["lm_head"] = source("embed_out.weight")
    qkv = ungrouped_qkv(spec.num_heads, spec.head_dim)  # each head's q, k, v are together
    for layer in range(spec.num_layers):
        for ours, theirs, bias, transform in (
            ("attn_norm", "input_layernorm", True, AS_IS),
            ("attn.qkv", "attention.query_key_value", spec.qkv_bias, qkv),
            ("attn.o", "attention.dense", spec.o_bias, AS_IS),
            ("mlp_norm", "post_attention_layernorm", True, AS_IS),
            ("mlp.up", "mlp.dense_h_to_4h", True, AS_IS),
            ("mlp.down", "mlp.dense_4h_to_h", True, AS_IS),
        ):
            name = f"layers.{layer}.{ours}", f"gpt_neox.layers.{layer}.{theirs}"
            names.update(affine(*name, bias=bias, transform=transform))
    return names
