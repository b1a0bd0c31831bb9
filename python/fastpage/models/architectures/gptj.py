"""GPTJForCausalLM: GPT-J, and what was tuned from it (Dolly v1, GPT4All-J)."""

from __future__ import annotations

import dataclasses

from fastpage.models.architectures import gpt2
from fastpage.models.architectures.config import Config, refuse_other, rotary_dim, size
from fastpage.models.rotary import RotarySpec
from fastpage.models.sources import Sources, affine, source
from fastpage.models.spec import DecoderSpec

IGNORED = gpt2.IGNORED

_DEFAULTS = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "tie_word_embeddings": False,
}


def spec(config: Config) -> DecoderSpec:
    refuse_other(config, "rotary", True)
    spec = gpt2.gpt_spec({**_DEFAULTS, **config}, residual="parallel", lm_head_bias=True)
    dim = rotary_dim(spec.head_dim, size(config, "rotary_dim", 64))
    return dataclasses.replace(spec, rotary=RotarySpec(dim, style="interleaved"))


def sources(spec: DecoderSpec) -> Sources:
    names = {
        "embed": source("transformer.wte.weight"),
        **affine("final_norm", "transformer.ln_f", bias=True),
        "lm_head.bias": source("lm_head.bias"),
    }
    if not spec.tie_embeddings:
        names["lm_head"] = source("lm_head.weight")
    for layer in range(spec.num_layers):
        for ours, theirs, bias in (
            ("attn_norm", ("ln_1",), True),
            ("attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), False),
            ("attn.o", ("attn.out_proj",), False),
            ("mlp.up", ("mlp.fc_in",), True),
            ("mlp.down", ("mlp.fc_out",), True),
        ):
            modules = (f"transformer.h.{layer}.{module}" for module in theirs)
            names.update(affine(f"layers.{layer}.{ours}", *modules, bias=bias))
    return names
