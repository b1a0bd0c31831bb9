"""BaiChuanForCausalLM, BaichuanForCausalLM: Baichuan 7B and 13B, Baichuan 2 7B and 13B.

Llama with q, k and v in one matrix. The 13B has ALiBi in the place of rotary embeddings. Baichuan 2
brings each row of the output projection to norm 1.
"""

from __future__ import annotations

from fastpage.models.architectures import llama
from fastpage.models.architectures.config import (
    Config,
    base_spec,
    head_size,
    num_heads,
    present,
    refuse_other,
    size,
)
from fastpage.models.constants import alibi_slopes
from fastpage.models.sources import UNIT_ROWS, Sources, source
from fastpage.models.spec import DecoderSpec

_BAICHUAN_2_VOCAB_SIZE = 125696  # Baichuan 1 has 64,000 words; the configs say no more of it


def spec(config: Config) -> DecoderSpec:
    refuse_other(config, "tie_word_embeddings", False)
    hidden_size, heads = size(config, "hidden_size"), num_heads(config)
    # The 7B is told by its width, as its code and the 13B's share the name. (Not in Baichuan 1:
    # BaiChuan, with a capital C, is the 7B.)
    is_rotary = hidden_size == 4096 or "BaiChuanForCausalLM" in config["architectures"]
    positions = {} if is_rotary else {"rotary": None, "alibi_slopes": alibi_slopes(heads)}
    limit = present(config, "max_position_embeddings", "model_max_length")
    return base_spec(
        {**config, "max_position_embeddings": size(config, limit)},
        head_dim=head_size(hidden_size, heads),
        **positions,
    )


def sources(spec: DecoderSpec) -> Sources:
    names = llama.sources(spec)
    for layer in range(spec.num_layers):
        names[f"layers.{layer}.attn.qkv"] = source(f"model.layers.{layer}.self_attn.W_pack.weight")
    if spec.vocab_size == _BAICHUAN_2_VOCAB_SIZE:
        names["lm_head"] = source("lm_head.weight", transform=UNIT_ROWS)
    return names
