"""What GGUF makes of each family of models: names of tensors, their layout, fields of the config.

The names are those of the package `gguf` (gguf.constants), the layouts those of the converters of
llama.cpp, which a file is read back from: an Undo says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpage.checkpoints.gguf_config import Keys, llama_fields, norm_eps, shared_fields
from fastpage.errors import UnsupportedArchitecture

Config = dict[str, Any]


@dataclass(frozen=True)
class Undo:
    """How a stored tensor becomes the one that Hugging Face has. `apply` raises ValueError for a
    shape that cannot be; moves_rows: it only moves whole rows, so blocks can be, too."""

    apply: Callable[[np.ndarray], np.ndarray]
    is_transposing: bool = False
    is_arithmetic: bool = False

    @property
    def moves_rows(self) -> bool:
        return not self.is_transposing and not self.is_arithmetic


AS_IS = Undo(lambda array: array)
TRANSPOSE = Undo(lambda array: np.ascontiguousarray(array.T), is_transposing=True)
MINUS_ONE = Undo(lambda array: array - np.float32(1), is_arithmetic=True)


def pair_halves(heads: int) -> Undo:
    """From rotary pairs (2i, 2i + 1), llama.cpp's order, to pairs (i, i + head_dim / 2)."""

    def apply(array: np.ndarray) -> np.ndarray:
        if array.shape[0] % (2 * heads):
            raise ValueError(f"{array.shape[0]} rows do not divide into {heads} heads")
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return Undo(apply)


def group_qkv(num_heads: int, num_kv_heads: int) -> Undo:
    """From all query, then all key, then all value heads to groups of (query heads, key, value)."""

    def apply(array: np.ndarray) -> np.ndarray:
        rows = array.shape[0]
        if rows % (num_heads + 2 * num_kv_heads) or num_heads % num_kv_heads:
            raise ValueError(f"{rows} rows are not {num_heads} + 2 x {num_kv_heads} heads")
        heads = array.reshape(num_heads + 2 * num_kv_heads, -1, *array.shape[1:])
        parts = np.split(heads, (num_heads, num_heads + num_kv_heads))
        groups = [part.reshape(num_kv_heads, -1, *heads.shape[1:]) for part in parts]
        return np.concatenate(groups, axis=1).reshape(array.shape)

    return Undo(apply)


@dataclass(frozen=True)
class Family:
    """One `general.architecture`.

    config: the keys -> a Hugging Face config. top, layer: GGUF's names of modules -> Hugging
    Face's, those of a layer below `layers`. undo: by GGUF's name of a module, given the config; "*"
    is any norm. experts: GGUF's names of modules with a matrix for each expert -> Hugging Face's,
    with {} for the expert's number. joined: Hugging Face's name of a module -> those stored that it
    consists of.
    """

    config: Callable[[Keys], Config]
    top: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str = "model.layers"
    undo: Callable[[Config], Mapping[str, Undo]] = lambda config: {}
    experts: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find_family(keys: Keys) -> Family:
    family = FAMILIES.get(keys.architecture)
    if family is None:
        raise UnsupportedArchitecture(
            f"{keys.path}: GGUF architecture {keys.architecture!r:.40} is not supported; "
            f"these are: {', '.join(FAMILIES)}"
        )
    if keys.architecture == "llama" and keys.count("expert_count", 0):
        return _MIXTRAL
    return family


# ---------------------------------------------------------------- Llama and its successors

_LLAMA_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _named(architecture: str, model_type: str) -> Config:
    return {"architectures": [architecture], "model_type": model_type}


def _without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {name: value for name, value in names.items() if name not in left_out}


def _rotary_pairs(config: Config) -> Mapping[str, Undo]:
    return {
        "attn_q": pair_halves(config["num_attention_heads"]),
        "attn_k": pair_halves(config["num_key_value_heads"]),
    }


def _llama(keys: Keys) -> Config:
    config = _named("LlamaForCausalLM", "llama") | llama_fields(keys)
    window = keys.count("attention.sliding_window", 0)
    if window:  # the member of the family that has one
        config |= {**_named("MistralForCausalLM", "mistral"), "sliding_window": window}
    return config


def _mixtral(keys: Keys) -> Config:
    return {
        **_named("MixtralForCausalLM", "mixtral"),
        **llama_fields(keys),
        "num_local_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "sliding_window": keys.count("attention.sliding_window", 0) or None,
    }


def _qwen(architecture: str, model_type: str) -> Callable[[Keys], Config]:
    def config(keys: Keys) -> Config:
        fields = _named(architecture, model_type) | llama_fields(keys)
        window = keys.count("attention.sliding_window", 0)
        if window:
            fields |= {"sliding_window": window, "use_sliding_window": True}
            fields["max_window_layers"] = 0
        return fields

    return config


def _qwen3_moe(keys: Keys) -> Config:
    # The width of the layers without experts, which no model so far has, may be left out.
    width = keys.count("expert_feed_forward_length")
    keys.file.metadata.setdefault(f"{keys.architecture}.feed_forward_length", width)
    return {
        **_qwen("Qwen3MoeForCausalLM", "qwen3_moe")(keys),
        "moe_intermediate_size": width,
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _granite(keys: Keys) -> Config:
    return {
        **_named("GraniteForCausalLM", "granite"),
        **llama_fields(keys),
        "attention_multiplier": keys.real("attention.scale", 1.0),
        "embedding_multiplier": keys.real("embedding_scale", 1.0),
        "residual_multiplier": keys.real("residual_scale", 1.0),
        "logits_scaling": keys.real("logit_scale", 1.0),
    }


def _olmo2(keys: Keys) -> Config:
    return _named("Olmo2ForCausalLM", "olmo2") | llama_fields(keys)


def _phi3(keys: Keys) -> Config:
    config = _named("Phi3ForCausalLM", "phi3") | llama_fields(keys)
    original = keys.get("rope.scaling.original_context_length")
    if original is not None:
        config["original_max_position_embeddings"] = original
    config["sliding_window"] = keys.count("attention.sliding_window", 0) or None
    return config


def _command_r(keys: Keys) -> Config:
    return {
        **_named("CohereForCausalLM", "cohere"),
        **llama_fields(keys),
        "logit_scale": keys.real("logit_scale"),
        "use_qk_norm": keys.has("blk.0.attn_q_norm.weight"),
    }


def _baichuan(keys: Keys) -> Config:
    # The 13B, the only one of 40 layers, has ALiBi and goes by the other spelling.
    is_13b = keys.count("block_count") == 40
    name = "BaichuanForCausalLM" if is_13b else "BaiChuanForCausalLM"
    config = _named(name, "baichuan") | llama_fields(keys)
    return {**config, "tie_word_embeddings": False}


# ---------------------------------------------------------------- Gemma


def _gemma(keys: Keys, model_type: str, layers_of_27b: int) -> Config:
    config = llama_fields(keys)
    # The one size whose scores are not scaled by the width of a head; no key says so.
    is_27b = config["num_hidden_layers"] == layers_of_27b
    config |= {
        **_named(f"{model_type.capitalize()}ForCausalLM", f"{model_type}"),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if is_27b
        else config["head_dim"],
        "sliding_window": keys.count("attention.sliding_window", 4096),
    }
    del config["hidden_act"]
    return config


def _gemma2(keys: Keys) -> Config:
    return {
        **_gemma(keys, "gemma2", layers_of_27b=46),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> Config:
    config = _gemma(keys, "gemma3", layers_of_27b=62)
    return {
        **config,
        "model_type": "gemma3_text",
        "rope_local_base_freq": keys.real("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _minus_one(config: Config) -> Mapping[str, Undo]:
    return {"*": MINUS_ONE}


# ---------------------------------------------------------------- GPT-2 and its contemporaries

_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BLOOM_TOP = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def _gpt2(keys: Keys) -> Config:
    return _named("GPT2LMHeadModel", "gpt2") | _gpt2_fields(keys)


def _starcoder(keys: Keys) -> Config:
    return {
        **_named("GPTBigCodeForCausalLM", "gpt_bigcode"),
        **_gpt2_fields(keys),
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": keys.count("attention.head_count_kv", 1) == 1,
    }


def _gpt2_fields(keys: Keys) -> Config:
    return {
        "n_embd": keys.count("embedding_length"),
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "n_inner": keys.count("feed_forward_length"),
        "n_positions": keys.count("context_length"),
        **norm_eps(keys),
    }


def _transposed(config: Config) -> Mapping[str, Undo]:
    return dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), TRANSPOSE)


def _gptneox(keys: Keys) -> Config:
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = max(hidden // heads, 1)
    return {
        **_named("GPTNeoXForCausalLM", "gpt_neox"),
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": keys.count("context_length"),
        "rotary_pct": keys.count("rope.dimension_count", head_dim) / head_dim,
        "rotary_emb_base": keys.real("rope.freq_base", 10000.0),
        "use_parallel_residual": keys.flag("use_parallel_residual", True),
        "hidden_act": "gelu",
        **norm_eps(keys),
    }


def _group_each_head(config: Config) -> Mapping[str, Undo]:
    heads = config.get("num_attention_heads") or config["n_head"]
    return {"attn_qkv": group_qkv(heads, heads)}


def _bloom(keys: Keys) -> Config:
    return {
        **_named("BloomForCausalLM", "bloom"),
        "hidden_size": keys.count("embedding_length"),
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "seq_length": keys.count("context_length"),
        **norm_eps(keys),
    }


def _falcon(keys: Keys) -> Config:
    heads = keys.count("attention.head_count")
    kv_heads = keys.count("attention.head_count_kv", 1)
    two_norms = keys.has("blk.0.attn_norm_2.weight")
    hidden = keys.count("embedding_length")
    return {
        **_named("FalconForCausalLM", "falcon"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.count("feed_forward_length", 4 * hidden),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": kv_heads > 1 or two_norms,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": keys.has("blk.0.attn_qkv.bias"),
        "max_position_embeddings": keys.count("context_length"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        **norm_eps(keys),
    }


def _group_qkv(config: Config) -> Mapping[str, Undo]:
    return {"attn_qkv": group_qkv(config["num_attention_heads"], config["num_kv_heads"])}


def _mpt(keys: Keys) -> Config:
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    kv_heads = keys.count("attention.head_count_kv", heads)
    clip, bias = keys.real("attention.clamp_kqv", 0.0), keys.real("attention.max_alibi_bias", 0.0)
    return {
        **_named("MPTForCausalLM", "mpt"),
        "d_model": hidden,
        "n_layers": keys.count("block_count"),
        "n_heads": heads,
        "expansion_ratio": max(keys.count("feed_forward_length", 4 * hidden) // hidden, 1),
        "max_seq_len": keys.count("context_length"),
        "no_bias": not keys.has("blk.0.attn_qkv.bias"),
        "learned_pos_emb": keys.has("position_embd.weight"),
        "attn_config": {
            "alibi": bias > 0,
            "alibi_bias_max": bias or 8.0,
            "clip_qkv": clip or None,
            "qk_ln": keys.has("blk.0.attn_q_norm.weight"),
            **({"attn_type": "grouped_query_attention"} if kv_heads != heads else {}),
            "kv_n_heads": kv_heads,
        },
        **norm_eps(keys),
    }


# ---------------------------------------------------------------- all of them

_LLAMA = Family(_llama, _LLAMA_TOP, _LLAMA_LAYER, undo=_rotary_pairs)
_MIXTRAL = Family(
    _mixtral,
    _LLAMA_TOP,
    {
        **_without(_LLAMA_LAYER, "ffn_gate", "ffn_up", "ffn_down"),
        "ffn_gate_inp": "block_sparse_moe.gate",
    },
    undo=_rotary_pairs,
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "qwen2": Family(_qwen("Qwen2ForCausalLM", "qwen2"), _LLAMA_TOP, _LLAMA_LAYER),
    "qwen3": Family(_qwen("Qwen3ForCausalLM", "qwen3"), _LLAMA_TOP, _LLAMA_LAYER),
    "qwen3moe": Family(
        _qwen3_moe,
        _LLAMA_TOP,
        {**_LLAMA_LAYER, "ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate_exps": "mlp.experts.{}.gate_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj",
            "ffn_up_exps": "mlp.experts.{}.up_proj",
        },
    ),
    "granite": Family(_granite, _LLAMA_TOP, _LLAMA_LAYER, undo=_rotary_pairs),
    "olmo2": Family(
        _olmo2, _LLAMA_TOP, {**_without(_LLAMA_LAYER, "attn_norm", "ffn_norm"), **_SANDWICH}
    ),
    "phi3": Family(
        _phi3,
        _LLAMA_TOP,
        {**_LLAMA_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "command-r": Family(_command_r, _LLAMA_TOP, _LLAMA_LAYER),
    "baichuan": Family(
        _baichuan,
        _LLAMA_TOP,
        _LLAMA_LAYER,
        undo=_rotary_pairs,
        joined={"self_attn.W_pack": ("attn_q", "attn_k", "attn_v")},
    ),
    "gemma2": Family(_gemma2, _LLAMA_TOP, {**_LLAMA_LAYER, **_SANDWICH}, undo=_minus_one),
    "gemma3": Family(_gemma3, _LLAMA_TOP, {**_LLAMA_LAYER, **_SANDWICH}, undo=_minus_one),
    "gpt2": Family(_gpt2, _GPT2_TOP, _GPT2_LAYER, "transformer.h", _transposed),
    "starcoder": Family(_starcoder, _GPT2_TOP, _GPT2_LAYER, "transformer.h"),
    "gptneox": Family(
        _gptneox,
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        {
            **_BLOOM_LAYER,
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
        },
        "gpt_neox.layers",
        _group_each_head,
    ),
    "bloom": Family(_bloom, _BLOOM_TOP, _BLOOM_LAYER, "transformer.h", _group_each_head),
    "falcon": Family(_falcon, _BLOOM_TOP, _BLOOM_LAYER, "transformer.h", _group_qkv),
    "mpt": Family(
        _mpt,
        {**_GPT2_TOP, "output_norm": "transformer.norm_f"},
        {
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_q_norm": "attn.q_ln",
            "attn_k_norm": "attn.k_ln",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        "transformer.blocks",
    ),
}


def translate_config(keys: Keys, family: Family) -> Config:
    """The configuration of the model in a file.

    Raises CheckpointError for metadata that is missing or makes no sense, UnsupportedArchitecture
    for what no architecture here can do.
    """
    return shared_fields(keys) | family.config(keys)


def layer_names(keys: Keys, family: Family) -> Mapping[str, str]:
    """family.layer, as it is in the file at hand."""
    if keys.architecture == "falcon" and keys.has("blk.0.attn_norm_2.weight"):
        return {**family.layer, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
    return family.layer
