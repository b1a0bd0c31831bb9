"""GPT-2, GPTBigCode, GPT-J, GPT-NeoX and OPT against transformers, on tiny random checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    Case,
    MakeCheckpoint,
    check_greedy,
    check_less_precise,
    check_logits,
    check_rubbish,
    checkpoint_fixture,
    random_tokens,
)
from paging import run_in_chunks
from safetensors.numpy import load_file, save_file
from test_passes import assert_same_bits

from fastpage import _C
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models import build_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Odd sizes on purpose: heads of 9 or 11, a vocabulary and an MLP of no multiples of anything.
GPT = {
    "vocab_size": 131,
    "n_positions": 128,
    "n_embd": 54,
    "n_layer": 3,
    "n_head": 6,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX = {
    "vocab_size": 131,
    "hidden_size": 66,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "rotary_pct": 0.75,
    "rotary_emb_base": 500,
}
OPT = {
    "vocab_size": 131,
    "hidden_size": 54,
    "ffn_dim": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 29}


def gpt2(**changes: Any) -> Case:
    return Case("GPT2", changes, GPT, "GPT2LMHeadModel")


CASES = {
    "gpt2": gpt2(),
    "gpt2-inner": gpt2(n_inner=77, activation_function="gelu"),
    "gpt2-untied": gpt2(tie_word_embeddings=False),
    "gpt2-inverse-layers": gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2-unscaled": gpt2(scale_attn_weights=False),
    "bigcode": Case("GPTBigCode", {}, GPT),
    "bigcode-multi-head": Case("GPTBigCode", {"multi_query": False, "n_inner": 77}, GPT),
    "bigcode-unscaled": Case("GPTBigCode", {"scale_attn_weights": False}, GPT),
    "gptj": Case("GPTJ", {"rotary_dim": 4}, GPT),
    "gptj-tied": Case("GPTJ", {"rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 77}, GPT),
    "neox": Case("GPTNeoX", {}, NEOX),
    "neox-sequential": Case("GPTNeoX", {"use_parallel_residual": False}, NEOX),
    "neox-no-bias": Case("GPTNeoX", {"attention_bias": False, "hidden_act": "gelu_fast"}, NEOX),
    "neox-quarter": Case("GPTNeoX", {"hidden_size": 96, "rotary_pct": 0.25}, NEOX),
    "neox-tied": Case("GPTNeoX", {"tie_word_embeddings": True}, NEOX),
    "neox-linear-rope": Case(
        "GPTNeoX", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, NEOX
    ),
    "opt": Case("OPT", {}, OPT),
    "opt-350m": Case("OPT", OPT_350M, OPT),
    "opt-projected-pre-norm": Case("OPT", {"word_embed_proj_dim": 60}, OPT),
    "opt-no-final-norm": Case("OPT", {"_remove_final_layer_norm": True}, OPT),
    "opt-untied": Case("OPT", {"tie_word_embeddings": False}, OPT),
    "opt-galactica": Case("OPT", {"enable_bias": False, "activation_function": "gelu"}, OPT),
    "opt-bare": Case("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}, OPT),
    "opt-350m-bare-norms": Case("OPT", {**OPT_350M, "layer_norm_elementwise_affine": False}, OPT),
}
FAMILIES = ["gpt2", "bigcode", "gptj", "neox", "opt"]
checkpoint = checkpoint_fixture(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_logits(*checkpoint(case))


@pytest.mark.parametrize("case", [*FAMILIES, "bigcode-multi-head", "neox-sequential", "opt-350m"])
def test_greedy_tokens_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_greedy(*checkpoint(case))


@pytest.mark.parametrize("case", FAMILIES)
def test_passes_change_no_bit(case: str, checkpoint: MakeCheckpoint) -> None:
    program = build_model(open_checkpoint(checkpoint(case)[0]).config).program
    assert_same_bits(program, [], weight_dtype="float32", kv_cache_dtype="float32")


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"weight_dtype": "bfloat16"}, {"quantization": "int8"}], ids=str
)
def test_less_precise_weights(
    case: str, options: dict[str, str], checkpoint: MakeCheckpoint
) -> None:
    check_less_precise(checkpoint(case)[0], options)


# ---- checkpoints as they are on the Hub


def logits(path: Path, max_model_len: int | None = None) -> np.ndarray:
    opened = open_checkpoint(path)
    model = build_model(opened.config, max_model_len)
    executor = _C.CpuExecutor(
        model.program,
        num_kv_blocks=4,
        weight_dtype="float32",
        kv_cache_dtype="float32",
        max_num_tokens=33,
        max_num_logits=33,
    )
    model.load_weights(opened, executor)
    return run_in_chunks(executor, random_tokens(131, 33), (33,), 4, 16)


def renamed(path: Path, to: Path, prefix: str, **more: np.ndarray) -> Path:
    """The same checkpoint without `prefix` in its tensors' names, and with `more` tensors."""
    (to / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    save_file(
        {name.removeprefix(prefix): values for name, values in tensors.items()} | more,
        to / "model.safetensors",
    )
    return to


MASK, MASKED = np.ones((1, 1, 128, 128), np.uint8), np.float32([-1e9])


@pytest.mark.parametrize(
    "case, prefix, more",
    [
        ("gpt2", "transformer.", {"h.0.attn.bias": MASK, "h.2.attn.masked_bias": MASKED}),
        ("bigcode", "transformer.", {"lm_head.weight": np.zeros((131, 54), np.float32)}),
        (
            "gptj",
            "",
            {
                "transformer.h.0.attn.bias": MASK,
                "transformer.h.0.attn.masked_bias": MASKED,
            },
        ),
        (
            "neox",
            "",
            {
                "gpt_neox.layers.0.attention.bias": MASK,
                "gpt_neox.layers.0.attention.masked_bias": MASKED,
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
            },
        ),
        ("neox-tied", "", {"embed_out.weight": np.zeros((131, 66), np.float32)}),
        ("opt-350m", "model.", {"lm_head.weight": np.zeros((131, 29), np.float32)}),
    ],
)
def test_names_of_older_checkpoints(
    case: str,
    prefix: str,
    more: dict[str, np.ndarray],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    path, _ = checkpoint(case)
    old = renamed(path, tmp_path, prefix, **more)
    np.testing.assert_array_equal(logits(old), logits(path))


def test_a_surplus_bias_is_no_mask(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    surplus = {"transformer.h.0.attn.o_attn.bias": np.zeros(54, np.float32)}
    path = renamed(checkpoint("gptj")[0], tmp_path, "", **surplus)
    with pytest.raises(CheckpointError, match=r"surplus transformer\.h\.0\.attn\.o_attn\.bias"):
        logits(path)


@pytest.mark.parametrize("case", FAMILIES)
def test_max_model_len_changes_no_logits(case: str, checkpoint: MakeCheckpoint) -> None:
    """A table of positions stays as long as it is."""
    path, _ = checkpoint(case)
    np.testing.assert_array_equal(logits(path, max_model_len=33), logits(path))


# What models are known to have, from their config.json, with what old ones leave out.
REAL_CONFIGS = {
    "gpt2": ("GPT2LMHeadModel", {"n_ctx": 1024, "n_embd": 768}, 124_439_808),
    "gpt2-xl": ("GPT2LMHeadModel", {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
    "starcoder": (
        "GPTBigCodeForCausalLM",
        {
            "activation_function": "gelu",
            "n_embd": 6144,
            "n_head": 48,
            "n_inner": 24576,
            "n_layer": 40,
            "n_positions": 8192,
            "vocab_size": 49152,
        },
        15_517_456_384,
    ),
    "gpt-j-6b": (
        "GPTJForCausalLM",
        {"rotary": True, "rotary_dim": 64, "n_inner": None, "tie_word_embeddings": False},
        6_050_882_784,
    ),
    "gpt-neox-20b": (
        "GPTNeoXForCausalLM",
        {"hidden_act": "gelu_fast", "rotary_emb_base": 10000, "rotary_pct": 0.25},
        20_554_567_680,
    ),
    "pythia-160m": (
        "GPTNeoXForCausalLM",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 50304,
        },
        162_322_944,
    ),
    "dolly-v2-3b": (
        "GPTNeoXForCausalLM",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "vocab_size": 50280,
        },
        2_775_086_080,
    ),
    "opt-125m": ("OPTForCausalLM", {"prefix": "</s>", "word_embed_proj_dim": 768}, 125_239_296),
    "opt-350m": (
        "OPTForCausalLM",
        {
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "word_embed_proj_dim": 512,
        },
        331_196_416,
    ),
}


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_parameters_of_real_models(name: str) -> None:
    architecture, config, expected = REAL_CONFIGS[name]
    model = build_model({"architectures": [architecture], **config})
    found = sum(
        math.prod(buffer.shape)
        for buffer in model.program.buffers
        if buffer.kind == "weight" and buffer.name in model.sources
    )
    assert found == expected


@pytest.mark.parametrize("case", FAMILIES)
def test_defaults_are_those_of_transformers(case: str) -> None:
    """Of fields that a config.json lacks."""
    family, name = CASES[case].family, CASES[case].model or f"{CASES[case].family}ForCausalLM"
    full = getattr(transformers, f"{family}Config")().to_dict()
    assert build_model({"architectures": [name]}).spec == (
        build_model({**full, "architectures": [name]}).spec
    )


def test_older_rope_fields_mean_the_same(checkpoint: MakeCheckpoint) -> None:
    config = dict(open_checkpoint(checkpoint("neox-linear-rope")[0]).config)
    new = build_model(config).spec
    rope = config.pop("rope_parameters")
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (500, 0.75)
    older = {
        "rotary_emb_base": 500,
        "rotary_pct": 0.75,
        "rope_scaling": {"type": "linear", "factor": 2.5},
    }
    assert build_model({**config, **older}).spec == new
    assert new.max_position_embeddings == 320


# ---- configs that make no sense, or none that is supported


@pytest.mark.parametrize("case", FAMILIES)
def test_rubbish_in_a_config_is_an_error_of_one_line(case: str, checkpoint: MakeCheckpoint) -> None:
    check_rubbish(open_checkpoint(checkpoint(case)[0]).config)


@pytest.mark.parametrize(
    "architecture, changes, message",
    [
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("GPTBigCodeForCausalLM", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("GPT2LMHeadModel", {"activation_function": "mish"}, "activation_function is 'mish'"),
        ("GPTJForCausalLM", {"rotary": False}, "rotary is False"),
        ("GPTNeoXForCausalLM", {"hidden_act": "relu6"}, "hidden_act is 'relu6'"),
        ("OPTForCausalLM", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ],
)
def test_unsupported_options_are_named(
    architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        build_model({"architectures": [architecture], **changes})


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("GPT2LMHeadModel", {"n_head": 7}),
        ("GPTJForCausalLM", {"n_head": 7}),
        ("GPTNeoXForCausalLM", {"num_attention_heads": 7}),
        ("OPTForCausalLM", {"num_attention_heads": 7}),
    ],
)
def test_heads_that_do_not_divide_the_hidden_size(
    architecture: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="7 heads, which do not divide a hidden size of"):
        build_model({"architectures": [architecture], **changes})


@pytest.mark.parametrize("columns", [5, 300])
def test_impossible_rotary_embeddings(columns: int) -> None:
    message = f"a rotary embedding of {columns} of a head's (256|96) columns"
    with pytest.raises(CheckpointError, match=message):
        build_model({"architectures": ["GPTJForCausalLM"], "rotary_dim": columns})
    with pytest.raises(CheckpointError, match=message):
        build_model({"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": columns / 96})
