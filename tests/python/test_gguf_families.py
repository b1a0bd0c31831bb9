"""GGUF files of every family of models: the tensors and logits of the checkpoint that they were
made of. They are made here as llama.cpp's converters do it, with the names of the package gguf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import random_matrix, write_gguf
from gguf import GGMLQuantizationType as QuantType
from gguf import quants
from oracle import SMALL, Case, check_logits
from safetensors.numpy import load_file

from fastpage.checkpoints import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Tensors = dict[str, np.ndarray]
Change = Callable[[str, np.ndarray, Any], np.ndarray]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama_change(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if ".q_proj." in name:
        return interleave(values, config.num_attention_heads)
    return interleave(values, config.num_key_value_heads) if ".k_proj." in name else values


def gpt2_change(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    is_conv = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return np.ascontiguousarray(values.T) if is_conv else values


def each_head_change(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "query_key_value" not in name:
        return values
    heads = config.num_attention_heads
    split = values.reshape(heads, 3, -1, *values.shape[1:])
    return np.concatenate([split[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])


def falcon_change(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "query_key_value" not in name:
        return values
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    head_dim = config.hidden_size // config.num_attention_heads
    groups = values.reshape(kv_heads, -1, head_dim, *values.shape[1:])
    parts = groups[:, :-2], groups[:, [-2]], groups[:, [-1]]
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])


def gemma_change(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    return values + np.float32(1) if name.endswith("norm.weight") else values


def same(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    return values


def llama_keys(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        **(
            {"attention.layer_norm_epsilon": config.layer_norm_eps}
            if hasattr(config, "layer_norm_eps")
            else {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
        ),
    }


def mixtral_keys(config: Any) -> dict[str, Any]:
    return {
        **llama_keys(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def qwen3moe_keys(config: Any) -> dict[str, Any]:
    return {
        **llama_keys(config),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def granite_keys(config: Any) -> dict[str, Any]:
    return {
        **llama_keys(config),
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def gemma2_keys(config: Any) -> dict[str, Any]:
    return {
        **llama_keys(config),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attention.sliding_window": config.sliding_window,
    }


def gemma3_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters["full_attention"]
    return {
        **llama_keys(config),
        "rope.freq_base": rope["rope_theta"],
        "attention.sliding_window": config.sliding_window,
    }


def command_r_keys(config: Any) -> dict[str, Any]:
    return {**llama_keys(config), "logit_scale": config.logit_scale}


def gpt2_keys(config: Any) -> dict[str, Any]:
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def starcoder_keys(config: Any) -> dict[str, Any]:
    return {**gpt2_keys(config), "attention.head_count_kv": 1}


def gptneox_keys(config: Any) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_attention_heads
    partial = config.rope_parameters["partial_rotary_factor"]
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": int(partial * head_dim),
        "use_parallel_residual": config.use_parallel_residual,
    }


def bloom_keys(config: Any) -> dict[str, Any]:
    return {
        "block_count": config.n_layer,
        "context_length": 2048,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def falcon_keys(config: Any) -> dict[str, Any]:
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    return {
        "block_count": config.num_hidden_layers,
        "context_length": 2048,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def mpt_keys(config: Any) -> dict[str, Any]:
    clip = config.attn_config.clip_qkv
    return {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "feed_forward_length": config.expansion_ratio * config.d_model,
        "attention.head_count": config.n_heads,
        "attention.layer_norm_epsilon": 1e-5,
        **({"attention.clamp_kqv": clip} if clip else {}),
        "attention.max_alibi_bias": float(config.attn_config.alibi_bias_max),
    }


GPT2 = {"vocab_size": 131, "n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 128}
NEOX = {**SMALL, "hidden_size": 48, "rotary_pct": 0.25, "intermediate_size": 70}
BLOOM = {"vocab_size": 131, "hidden_size": 30, "n_layer": 2, "n_head": 3}
FALCON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
}
MPT = {"vocab_size": 131, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
MOE = {**SMALL, "num_hidden_layers": 2, "num_experts_per_tok": 2}
COHERE = {
    name: value for name, value in SMALL.items() if name not in ("head_dim", "rms_norm_eps")
} | {"hidden_size": 60}


@dataclass(frozen=True)
class GgufCase:
    architecture: str  # GGUF's
    case: Case
    keys: Callable[[Any], Mapping[str, Any]] = llama_keys
    change: Change = same


CASES = {
    "llama": GgufCase("llama", Case("Llama"), change=llama_change),
    "llama-tied": GgufCase(
        "llama", Case("Llama", {"tie_word_embeddings": True}), change=llama_change
    ),
    "mixtral": GgufCase(
        "llama", Case("Mixtral", {"num_local_experts": 5}, MOE), mixtral_keys, llama_change
    ),
    "qwen2": GgufCase("qwen2", Case("Qwen2")),
    "qwen3": GgufCase("qwen3", Case("Qwen3")),
    "qwen3moe": GgufCase(
        "qwen3moe",
        Case(
            "Qwen3Moe",
            {"num_experts": 5, "moe_intermediate_size": 21, "norm_topk_prob": True},
            MOE,
        ),
        qwen3moe_keys,
    ),
    "granite": GgufCase(
        "granite",
        Case(
            "Granite",
            {
                "hidden_size": 60,
                "attention_multiplier": 0.3,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.7,
                "logits_scaling": 1.5,
            },
        ),
        granite_keys,
        llama_change,
    ),
    "olmo2": GgufCase("olmo2", Case("Olmo2", {"hidden_size": 60})),
    "phi3": GgufCase("phi3", Case("Phi3", {"hidden_size": 60, "pad_token_id": 0})),
    "command-r": GgufCase("command-r", Case("Cohere", base=COHERE), command_r_keys),
    "gemma2": GgufCase(
        "gemma2",
        Case("Gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 10}),
        gemma2_keys,
        gemma_change,
    ),
    "gemma3": GgufCase(
        "gemma3",
        Case(
            "Gemma3Text",
            {"sliding_window": 7, "num_hidden_layers": 7, "query_pre_attn_scalar": 10},
            model="Gemma3ForCausalLM",
        ),
        gemma3_keys,
        gemma_change,
    ),
    "gpt2": GgufCase(
        "gpt2", Case("GPT2", base=GPT2, model="GPT2LMHeadModel"), gpt2_keys, gpt2_change
    ),
    "starcoder": GgufCase("starcoder", Case("GPTBigCode", base=GPT2), starcoder_keys),
    "gptneox": GgufCase("gptneox", Case("GPTNeoX", base=NEOX), gptneox_keys, each_head_change),
    "gptneox-sequential": GgufCase(
        "gptneox",
        Case("GPTNeoX", {"use_parallel_residual": False}, NEOX),
        gptneox_keys,
        each_head_change,
    ),
    "bloom": GgufCase("bloom", Case("Bloom", base=BLOOM), bloom_keys, each_head_change),
    "falcon-7b": GgufCase("falcon", Case("Falcon", base=FALCON), falcon_keys, falcon_change),
    "falcon-40b": GgufCase(
        "falcon",
        Case("Falcon", {"new_decoder_architecture": True}, FALCON),
        falcon_keys,
        falcon_change,
    ),
    "mpt": GgufCase("mpt", Case("Mpt", {"attn_config": {"clip_qkv": 0.3}}, base=MPT), mpt_keys),
}


def stack_experts(tensors: Tensors) -> Tensors:
    """The matrices of all experts in one tensor, whose name has no number."""
    stacked: dict[str, list[np.ndarray]] = {}
    for name, values in tensors.items():
        head, found, tail = name.partition(".experts.")
        number, _, rest = tail.partition(".")
        key = f"{head}.experts.{rest}" if found else name
        stacked.setdefault(key, []).append(values)
        assert not found or int(number) == len(stacked[key]) - 1
    return {
        name: np.stack(values) if ".experts." in name else values[0]
        for name, values in stacked.items()
    }


def sorted_by_expert(tensors: Tensors) -> Tensors:
    def number(name: str) -> int:
        _, found, tail = name.partition(".experts.")
        return int(tail.partition(".")[0]) if found else 0

    return {name: tensors[name] for name in sorted(tensors, key=number)}


def convert(tensors: Tensors, config: Any, case: GgufCase, path: Path) -> None:
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == case.architecture)
    names = gguf.get_tensor_name_map(kind, 16)
    converted = {}
    for name, values in stack_experts(sorted_by_expert(tensors)).items():
        changed = case.change(name, values, config)
        # Of some models the package knows the base model's names only.
        for known in (name, name.removeprefix("transformer.")):
            new_name = names.get_name(known, try_suffixes=(".weight", ".bias"))
            if new_name is not None:
                break
        assert new_name is not None, name
        converted[new_name] = (np.ascontiguousarray(changed, np.float32), QuantType.F32)
    keys = {f"{case.architecture}.{key}": value for key, value in case.keys(config).items()}
    write_gguf(path, case.architecture, converted, keys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensors, Any]]:
    """The GGUF file of a case, the tensors of the checkpoint that it was made of, the oracle."""
    files: dict[str, tuple[Path, Tensors, Any]] = {}

    def make(name: str) -> tuple[Path, Tensors, Any]:
        if name not in files:
            folder = tmp_path_factory.mktemp(name)
            oracle = CASES[name].case.make(seed=len(files))
            oracle.save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            convert(tensors, oracle.config, CASES[name], folder / "model.gguf")
            files[name] = folder / "model.gguf", tensors, oracle
        return files[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_the_checkpoint(made, name):
    path, expected, _ = made(name)
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.names()) == sorted(expected)
    for tensor, values in expected.items():
        array, dtype = checkpoint.tensor(tensor)
        assert dtype == "float32"
        assert array.shape == checkpoint.shape(tensor) == values.shape
        assert not array.flags.writeable
        if "gemma" in name and tensor.endswith("norm.weight"):  # + 1 - 1
            np.testing.assert_allclose(array, values, atol=2e-7, err_msg=tensor)
        else:
            np.testing.assert_array_equal(array, values, err_msg=tensor)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(made, name):
    path, _, oracle = made(name)
    check_logits(path, oracle)


def test_baichuan(tmp_path):
    """transformers has none: its packed q, k and v, which are apart in GGUF, q and k permuted."""
    rng = np.random.default_rng(0)
    packed = rng.standard_normal((3 * 48, 48), np.float32)
    q, k, v = np.split(packed, 3)
    stored = {"q": interleave(q, 4), "k": interleave(k, 4), "v": v}
    tensors = {
        f"blk.0.attn_{part}.weight": (values, QuantType.F32) for part, values in stored.items()
    }
    tensors["token_embd.weight"] = (rng.standard_normal((40, 48), np.float32), QuantType.F32)
    keys = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 48,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }

    def write(**changes: Any) -> Path:
        changed = {f"baichuan.{key}": value for key, value in (keys | changes).items()}
        write_gguf(tmp_path / "a.gguf", "baichuan", tensors, changed)
        return tmp_path / "a.gguf"

    checkpoint = open_checkpoint(write())
    name = "model.layers.0.self_attn.W_pack.weight"
    assert sorted(checkpoint.names()) == ["model.embed_tokens.weight", name]
    assert checkpoint.shape(name) == (144, 48)
    np.testing.assert_array_equal(checkpoint.tensor(name)[0], packed)
    assert checkpoint.config["architectures"] == ["BaiChuanForCausalLM"]
    larger = open_checkpoint(write(block_count=40))  # the 13B
    assert larger.config["architectures"] == ["BaichuanForCausalLM"]


def test_blocks_of_experts_and_of_packed_heads(tmp_path):
    """Quantised blocks take the same way as values do."""
    rng = np.random.default_rng(0)
    experts, rows = 3, 64
    kinds = {"ffn_gate_exps": QuantType.Q8_0, "attn_q": QuantType.Q4_0}
    shapes = {"ffn_gate_exps": (experts, rows, 64), "attn_q": (rows, 64)}
    tensors = {"token_embd.weight": (np.ones((40, 64), np.float32), QuantType.F32)}
    for base, shape in shapes.items():
        blocks = random_matrix(rng, int(np.prod(shape[:-1])), 64, kinds[base])
        tensors[f"blk.0.{base}.weight"] = (blocks.reshape(*shape[:-1], -1), kinds[base])
    keys = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": rows,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_count": experts,
        "expert_used_count": 2,
    }
    path = tmp_path / "a.gguf"
    write_gguf(path, "llama", tensors, {f"llama.{key}": value for key, value in keys.items()})
    checkpoint = open_checkpoint(path)
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(experts)]
    names.append("model.layers.0.self_attn.q_proj.weight")
    for name in names:
        blocks, kind = checkpoint.blocks(name)
        values, _ = checkpoint.tensor(name)
        assert checkpoint.shape(name) == values.shape == (rows, 64)
        np.testing.assert_array_equal(quants.dequantize(blocks, QuantType[kind.upper()]), values)
    assert len({checkpoint.tensor(name)[0].tobytes() for name in names}) == experts + 1
