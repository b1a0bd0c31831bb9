"""Llama's extensions and successors against transformers, on tiny random checkpoints of odd sizes.

Llama itself, Mistral and Qwen: test_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    NUM_TOKENS,
    SMALL,
    TOLERANCE,
    Case,
    MakeCheckpoint,
    check_greedy,
    check_less_precise,
    check_logits,
    check_rubbish,
    checkpoint_fixture,
    make_executor,
    random_tokens,
)
from paging import relative_error, run_in_chunks
from safetensors.numpy import load_file, save_file
from test_passes import assert_same_bits

from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models import DecoderSpec, build_model
from fastpage.models.registry import find_architecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

BIASES = {"attention_bias": True}
UNTIED = {"tie_word_embeddings": False}
# Heads that divide the hidden state: of ten columns, and of eight.
EVEN = {**SMALL, "hidden_size": 60}
EIGHTS = {**SMALL, "hidden_size": 48, "head_dim": 8}
GEMMA2 = {
    "sliding_window": 7,
    "query_pre_attn_scalar": 23,
    "attn_logit_softcapping": 0.1,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = {
    "sliding_window": 7,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 23,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.6],
    "long_factor": [1.0, 2.0, 3.5, 7.0, 20.0],
}
PHI3_LONG = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}
COHERE = {**EVEN, "layer_norm_eps": 1e-5, "logit_scale": 0.3}
YARN_BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 600.0},
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 600.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2,
    },
}
PARTIAL = {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.75}

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}

CASES = {
    "llama-dynamic-rope": Case("Llama", {"rope_parameters": DYNAMIC_ROPE}),
    "smollm3": Case(
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "pad_token_id": 0, "bos_token_id": 0},
        EIGHTS,
    ),
    "gemma": Case("Gemma"),
    "gemma-untied-biases": Case("Gemma", {**UNTIED, **BIASES, "hidden_act": "gelu"}),
    "gemma2": Case("Gemma2", GEMMA2),
    "gemma2-no-caps": Case(
        "Gemma2",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": Case("Gemma3Text", GEMMA3, model="Gemma3ForCausalLM"),
    "gemma3-layer-types": Case(
        "Gemma3Text",
        {
            **GEMMA3,
            **UNTIED,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "final_logit_softcapping": 2.0,
        },
        model="Gemma3ForCausalLM",
    ),
    "phi3": Case("Phi3", {"pad_token_id": 0, "num_key_value_heads": None}, EVEN),
    "phi3-window": Case("Phi3", {"pad_token_id": 0, "sliding_window": 9}, EVEN),
    "phi3-longrope": Case("Phi3", PHI3_LONG, EVEN),
    "phi3-partial-longrope": Case(
        "Phi3",
        {
            **PHI3_LONG,
            "rope_parameters": {
                **LONGROPE,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 4.0, 20.0],
            },
            "tie_word_embeddings": True,
        },
        EIGHTS,
    ),
    "granite": Case("Granite", GRANITE, EVEN),
    "granite-biases-tied": Case(
        "Granite", {**GRANITE, **BIASES, "mlp_bias": True, "tie_word_embeddings": True}, EVEN
    ),
    "olmo2": Case("Olmo2", base=EVEN),
    "olmo2-biases": Case("Olmo2", BIASES, EVEN),
    "olmo3": Case(
        "Olmo3",
        {"sliding_window": 7, "num_hidden_layers": 4, "rope_parameters": YARN_BY_KIND},
        EVEN,
    ),
    "cohere": Case("Cohere", base=COHERE),
    "cohere-qk-norm-biases": Case("Cohere", {**BIASES, "use_qk_norm": True}, COHERE),
    "cohere-untied": Case("Cohere", UNTIED, COHERE),
    "cohere2": Case("Cohere2", {"sliding_window": 7, "sliding_window_pattern": 2}, COHERE),
    "starcoder2": Case("Starcoder2", {"norm_epsilon": 1e-5}, EVEN),
    "starcoder2-window-untied": Case(
        "Starcoder2", {"use_bias": False, "sliding_window": 9, **UNTIED}, EVEN
    ),
    "stablelm": Case("StableLm", {"rope_parameters": PARTIAL}, EIGHTS),
    "stablelm-parallel": Case(
        "StableLm",
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
        EIGHTS,
    ),
    "glm": Case("Glm", {"pad_token_id": 0}, {**EVEN, "head_dim": 20}),
    "glm4": Case("Glm4", {"pad_token_id": 0, "attention_bias": False}, {**EVEN, "head_dim": 20}),
}
GREEDY = ["gemma2", "gemma3", "phi3-longrope", "granite", "olmo2", "cohere-qk-norm-biases"]
checkpoint = checkpoint_fixture(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_logits(*checkpoint(case))


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_greedy(*checkpoint(case))


# ---- options that change the maths: each is seen in the logits


def logits_of(
    path: Path,
    tokens: np.ndarray,
    changes: Mapping[str, Any] | None = None,
    max_model_len: int | None = None,
) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    model = build_model({**checkpoint.config, **(changes or {})}, max_model_len)
    executor = make_executor(model, "cpu")
    model.load_weights(checkpoint, executor)
    return run_in_chunks(executor, tokens, (len(tokens),), NUM_BLOCKS, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("gemma2", "sliding_window", 70),
        ("gemma2", "layer_types", ["sliding_attention"] * 3),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "query_pre_attn_scalar", 60),
        ("gemma3", "rope_parameters", {**GEMMA3["rope_parameters"], "sliding_attention": {}}),
        ("gemma3", "rope_parameters", {**GEMMA3["rope_parameters"], "full_attention": {}}),
        ("phi3-window", "sliding_window", None),
        ("phi3-longrope", "rope_parameters", {**LONGROPE, "long_factor": [1.0] * 5}),
        ("granite", "embedding_multiplier", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("granite", "attention_multiplier", 1.0),
        ("granite", "logits_scaling", 1.0),
        ("cohere", "logit_scale", 1.0),
        ("smollm3", "no_rope_layers", [1, 1, 1]),
    ],
)
def test_options_matter(case: str, field: str, value: Any, checkpoint: MakeCheckpoint) -> None:
    path, _ = checkpoint(case)
    tokens = random_tokens(131, NUM_TOKENS)
    changed = logits_of(path, tokens, {field: value})
    assert relative_error(changed, logits_of(path, tokens)) > 1e-3


def test_longrope_by_length(checkpoint: MakeCheckpoint) -> None:
    """Short factors with a max_model_len up to the original length, long ones beyond."""
    path, oracle = checkpoint("phi3-longrope")
    tokens = random_tokens(131, 32)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert relative_error(logits_of(path, tokens, max_model_len=32), expected) < TOLERANCE
    assert relative_error(logits_of(path, tokens, max_model_len=33), expected) > 1e-3


# ---- configs


def spec_of(config: Mapping[str, Any]) -> DecoderSpec:
    return find_architecture(config).spec(config)


def changed(case: str, checkpoint: MakeCheckpoint, *without: str, **fields: Any) -> dict[str, Any]:
    """The case's config with other fields."""
    config = {**open_checkpoint(checkpoint(case)[0]).config, **fields}
    return {name: value for name, value in config.items() if name not in without}


def test_older_spellings_mean_the_same(checkpoint: MakeCheckpoint) -> None:
    gemma3 = changed(
        "gemma3",
        checkpoint,
        "rope_parameters",
        "layer_types",
        rope_theta=3000.0,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    olmo3 = changed(
        "olmo3",
        checkpoint,
        "rope_parameters",
        "layer_types",
        rope_theta=600.0,
        rope_scaling=YARN_BY_KIND["full_attention"],
    )
    olmo3["rope_scaling"].pop("rope_theta")
    phi3 = changed(
        "phi3-partial-longrope",
        checkpoint,
        "rope_parameters",
        rope_theta=5000.0,
        partial_rotary_factor=0.75,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.0, 4.0, 20.0],
        },
    )
    for case, older in (("gemma3", gemma3), ("olmo3", olmo3), ("phi3-partial-longrope", phi3)):
        assert spec_of(older) == spec_of(changed(case, checkpoint)), case
    phi3["rope_scaling"]["type"] = "yarn"  # the very first name
    assert spec_of(phi3).rotary.scaling == "longrope"


SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
LLAMA1 = {**SIZES, "architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}
QWEN2 = {**SIZES, "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}
PHI4_MINI = {
    **SIZES,
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
COMMAND_R = {
    **SIZES,
    "architectures": ["CohereForCausalLM"],
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "rope_theta": 8000000.0,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA1, {"max_position_embeddings": 2048}),
        ({**LLAMA1, "vocab_size": 32001}, {"vocab_size": 32001, "head_dim": 128}),
        (LLAMA, {"max_position_embeddings": 4096, "num_kv_heads": 32, "tie_embeddings": False}),
        ({**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}}, {"limit": 16384}),
        ({**LLAMA, "rope_scaling": {"factor": 4.0, "type": "dynamic"}}, {"limit": 4096}),
        ({**QWEN2, "rope_scaling": YARN}, {"limit": 131072}),
        (GEMMA3_4B, {"limit": 131072, "vocab_size": 262208, "num_kv_heads": 4, "head_dim": 256}),
        (GEMMA3_4B, {"tie_embeddings": True, "embed_scale": 2560**0.5, "logits_soft_cap": 0}),
        (PHI4_MINI, {"limit": 131072, "tie_embeddings": True, "norm_eps": 1e-5}),
        (COMMAND_R, {"tie_embeddings": True, "logits_scale": 0.0625, "num_kv_heads": 32}),
        (COMMAND_R, {"limit": 131072}),
    ],
)
def test_configs_as_published(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fields that they leave out mean what they mean in transformers."""
    spec = spec_of(config)
    for name, value in expected.items():
        assert getattr(spec, "max_position_embeddings" if name == "limit" else name) == value


def test_rotary_of_configs_as_published() -> None:
    gemma3 = spec_of(GEMMA3_4B)
    assert (gemma3.rotary.theta, gemma3.rotary.factor) == (1e6, 8.0)
    assert (gemma3.local_rotary.theta, gemma3.local_rotary.scaling) == (10000.0, "default")
    assert gemma3.sliding_windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    phi4 = spec_of(PHI4_MINI)
    assert (phi4.rotary.dim, phi4.rotary.factor, phi4.rotary.original_max_position) == (
        96,
        32,
        4096,
    )
    assert phi4.rotary.magnitude == pytest.approx(1.1902, abs=1e-4)
    assert spec_of(COMMAND_R).rotary.style == "interleaved"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "use_bidi"),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "mish"}, "hidden_activ"),
        ({"architectures": ["Olmo3ForCausalLM"], "layer_types": ["linear"] * 32}, "layer_types"),
        ({"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True}, "use_sliding"),
        ({"architectures": ["GraniteForCausalLM"], "rope_scaling": {"type": "mrope"}}, "rope_type"),
    ],
)
def test_unsupported_options_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=words):
        spec_of({**SIZES, "max_position_embeddings": 128, **config})


@pytest.mark.parametrize("case", [*(c for c in CASES if "-" not in c), "phi3-longrope"])
def test_rubbish_in_a_config_is_an_error_of_one_line(case: str, checkpoint: MakeCheckpoint) -> None:
    check_rubbish(changed(case, checkpoint))


# ---- a model within another


def test_text_part_of_gemma3(tmp_path: Path) -> None:
    """With the names of the checkpoints on the Hub, and with those of transformers' modules."""
    text = {**SMALL, **GEMMA3}
    vision = {
        "hidden_size": 24,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    case = Case(
        "Gemma3",
        base={"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4},
        model="Gemma3ForConditionalGeneration",
    )
    oracle = case.make(seed=0)
    oracle.save_pretrained(tmp_path)
    check_logits(tmp_path, oracle)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    tensors = {
        f"model.{name.replace('language_model.model.', 'language_model.')}": value
        for name, value in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    check_logits(tmp_path, oracle)
    tensors["vision"] = tensors.pop("model.language_model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 fault\(s\): missing .*; surplus vision"):
        logits_of(tmp_path, random_tokens(131, 3))


# ---- other precisions, and what the executor makes of these programs


@pytest.mark.parametrize("case", ["gemma2", "cohere-qk-norm-biases", "starcoder2"])
@pytest.mark.parametrize("weights", [{"weight_dtype": "bfloat16"}, {"quantization": "int8"}])
def test_less_precise_weights(
    case: str, weights: dict[str, str], checkpoint: MakeCheckpoint
) -> None:
    check_less_precise(checkpoint(case)[0], {**weights, "kv_cache_dtype": "bfloat16"})


@pytest.mark.parametrize("case", ["gemma3", "granite", "olmo2", "cohere-qk-norm-biases", "glm4"])
def test_passes_change_no_bit(case: str, checkpoint: MakeCheckpoint) -> None:
    assert_same_bits(build_model(changed(case, checkpoint)).program, [])
