"""Every architecture against transformers, on tiny random checkpoints of odd sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    BLOCK_SIZE,
    CHUNKS,
    NUM_BLOCKS,
    NUM_TOKENS,
    SMALL,
    Case,
    MakeCheckpoint,
    check_greedy,
    check_logits,
    check_rubbish,
    checkpoint_fixture,
    load,
    make_executor,
)
from paging import relative_error, run_in_chunks

from fastpage.checkpoints import open_checkpoint
from fastpage.errors import (
    CheckpointError,
    InvalidArgument,
    UnsupportedArchitecture,
)
from fastpage.models import build_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

CASES = {
    "llama": Case("Llama"),
    "llama-tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-derived-heads": Case("Llama", {"head_dim": None, "hidden_size": 48}),
    "llama-one-head": Case(
        "Llama",
        {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
    ),
    "llama-gelu": Case("Llama", {"hidden_act": "gelu"}),
    "llama-llama3-rope": Case("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn-rope": Case("Llama", {"rope_parameters": YARN_ROPE}),
    "llama-linear-rope": Case("Llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": Case("Mistral", {"sliding_window": 7}),
    "mistral-no-window": Case("Mistral", {"sliding_window": None}),
    "qwen2": Case("Qwen2"),
    "qwen2-window": Case("Qwen2", QWEN_WINDOW),
    "qwen3": Case("Qwen3"),
    "qwen3-biases-window": Case("Qwen3", {"attention_bias": True, **QWEN_WINDOW}),
}
checkpoint = checkpoint_fixture(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_logits(*checkpoint(case))


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_equal_transformers(case: str, checkpoint: MakeCheckpoint) -> None:
    check_greedy(*checkpoint(case))


def test_windows_of_the_cases_matter(checkpoint: MakeCheckpoint) -> None:
    """The sliding windows above are short enough to change the logits."""
    path, _ = checkpoint("mistral")
    tokens = list(range(NUM_TOKENS))
    config = json.loads((path / "config.json").read_text())
    opened = open_checkpoint(path)
    results = []
    for window in (7, None):
        model = build_model({**config, "sliding_window": window})
        executor = make_executor(model, "cpu")
        model.load_weights(opened, executor)
        results.append(run_in_chunks(executor, tokens, (NUM_TOKENS,), NUM_BLOCKS, BLOCK_SIZE))
    assert relative_error(results[0][:7], results[1][:7]) < 1e-5
    assert relative_error(results[0][7:], results[1][7:]) > 1e-3


def test_older_rope_fields_mean_the_same(checkpoint: MakeCheckpoint) -> None:
    path, _ = checkpoint("llama-llama3-rope")
    config = json.loads((path / "config.json").read_text())
    rope = dict(config.pop("rope_parameters"))
    new = build_model({**config, "rope_parameters": rope})
    theta = rope.pop("rope_theta")
    old = build_model({**config, "rope_theta": theta, "rope_scaling": rope})
    assert new.spec == old.spec
    assert new.spec.rotary.scaling == "llama3"
    legacy = {"type": "linear", "factor": 2.0}  # as transformers < 4.43 wrote it
    spec = build_model({**config, "rope_theta": 7.0, "rope_scaling": legacy}).spec
    assert (spec.rotary.scaling, spec.rotary.factor, spec.rotary.theta) == ("linear", 2.0, 7.0)


# ---- what does not fit


class FakeCheckpoint:
    """Tensors in a dict, to be tampered with."""

    def __init__(self, path: Path) -> None:
        opened = open_checkpoint(path)
        self.config = opened.config
        self.tensors = {name: opened.tensor(name) for name in opened.names()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0].shape

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        return self.tensors[name]

    def release(self, name: str) -> None:
        pass


def test_load_names_all_that_does_not_fit(checkpoint: MakeCheckpoint) -> None:
    fake = FakeCheckpoint(checkpoint("llama")[0])
    del fake.tensors["model.norm.weight"]
    del fake.tensors["model.layers.1.self_attn.k_proj.weight"]
    fake.tensors["model.layers.3.mlp.up_proj.weight"] = (np.zeros((2, 2), np.float32), "float32")
    fake.tensors["model.layers.0.mlp.down_proj.weight"] = (np.zeros((5, 4), np.float32), "float32")
    model = build_model(fake.config)
    with pytest.raises(CheckpointError) as error:
        model.load_weights(fake, make_executor(model, "cpu"))
    message = str(error.value)
    assert "4 fault(s)" in message
    assert "missing model.norm.weight, for final_norm [54]" in message
    assert "missing model.layers.1.self_attn.k_proj.weight" in message
    assert "surplus model.layers.3.mlp.up_proj.weight [2, 2]" in message
    assert "model.layers.0.mlp.down_proj.weight [5, 4] should make layers.0.mlp.down [54, 77]" in (
        message
    )
    assert "\n" not in message


def test_harmless_surplus_is_ignored(checkpoint: MakeCheckpoint) -> None:
    fake = FakeCheckpoint(checkpoint("llama-tied")[0])
    fake.tensors["lm_head.weight"] = fake.tensors["model.embed_tokens.weight"]
    fake.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = (
        np.zeros(5, np.float32),
        "float32",
    )
    model = build_model(fake.config)
    steps: list[tuple[int, int]] = []
    model.load_weights(
        fake, make_executor(model, "cpu"), progress=lambda done, total: steps.append((done, total))
    )
    assert steps[-1][0] == steps[-1][1] == len(steps)


def test_bfloat16_and_mixed_dtypes(checkpoint: MakeCheckpoint) -> None:
    """bfloat16 arrives as uint16; parts of one weight may differ in dtype."""
    path, _ = checkpoint("llama")
    fake = FakeCheckpoint(path)
    rounded = FakeCheckpoint(path)
    for name, (values, _) in fake.tensors.items():
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        rounded.tensors[name] = ((bits.astype(np.uint32) << 16).view(np.float32), "float32")
        if "k_proj" not in name:
            fake.tensors[name] = bits, "bfloat16"
        else:
            fake.tensors[name] = rounded.tensors[name]
    tokens = list(range(40))
    results = []
    for source in (fake, rounded):
        model = build_model(source.config)
        executor = make_executor(model, "cpu")
        model.load_weights(source, executor)
        results.append(run_in_chunks(executor, tokens, (40,), NUM_BLOCKS, BLOCK_SIZE))
    np.testing.assert_array_equal(results[0], results[1])


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        build_model({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedArchitecture, match="none given"):
        build_model({})


def test_unsupported_options_are_named() -> None:
    config = {**SMALL, "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UnsupportedArchitecture, match="hidden_act is 'mish'"):
        build_model({**config, "hidden_act": "mish"})
    with pytest.raises(UnsupportedArchitecture, match="rope_type is 'proportional'"):
        build_model({**config, "rope_scaling": {"rope_type": "proportional"}})
    with pytest.raises(CheckpointError, match="no hidden_size"):
        build_model({**config, "hidden_size": None})
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        with pytest.raises(CheckpointError, match=f"{name} 'false': true or false needed"):
            build_model({**config, name: "false"})


FAMILIES = (
    *("Bloom", "Cohere", "Cohere2", "Falcon", "GPTJ", "GPTNeoX", "Gemma", "Gemma2", "Glm", "Glm4"),
    *("Granite", "Llama", "Mistral", "Mixtral", "OPT", "Olmo2", "Phi3", "Qwen2", "Qwen3"),
    *("Qwen3Moe", "SmolLM3", "StableLm", "Starcoder2"),
)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Of a config that gives sizes alone."""
    theirs = getattr(transformers, f"{family}Config")(num_hidden_layers=4)
    sizes = {name: getattr(theirs, name) for name in SIZES if hasattr(theirs, name)}
    spec = build_model({**sizes, "architectures": [f"{family}ForCausalLM"]}).spec
    assert spec.tie_embeddings == theirs.tie_word_embeddings
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        assert spec.norm_eps == getattr(theirs, name, spec.norm_eps)
    rotary = spec.rotary or spec.local_rotary
    rope = getattr(theirs, "rope_parameters", None) or {}
    if rotary is not None and "rope_theta" in rope:
        assert rotary.theta == rope["rope_theta"]
        assert rotary.dim == spec.head_dim * rope.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_rubbish_in_a_config_is_an_error_of_one_line(family: str) -> None:
    scales = {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope = {**YARN_ROPE, **scales}
    config = {
        **SMALL,
        **QWEN_WINDOW,
        "architectures": [f"{family}ForCausalLM"],
        "layer_types": ["sliding_attention"] * 3,
        "rope_theta": 100.0,
    }
    for scaling in (rope, LLAMA3_ROPE):
        check_rubbish({**config, "rope_scaling": scaling})
    check_rubbish({**config, "layer_types": None, "max_window_layers": 1})


def test_max_model_len_bounds_positions() -> None:
    config = {**SMALL, "architectures": ["LlamaForCausalLM"]}
    model = build_model(config, max_model_len=33)
    shapes = {b.name: b.shape for b in model.program.buffers}
    assert shapes["rotary.cos_sin"] == [33, 10]
    for wrong in (0, 129):
        with pytest.raises(InvalidArgument, match=f"max_model_len is {wrong}"):
            build_model(config, max_model_len=wrong)


def test_the_real_model(smollm2_gguf: Path, smollm2_hf: Any) -> None:
    """SmolLM2-135M in fp32: transformers' logits, and the prompt in chunks as at once."""
    tokens = smollm2_hf.tokenizer("Gravity pulls an apple down; the Moon, however, ")["input_ids"]
    tokens = (tokens * 10)[:NUM_TOKENS]
    with torch.no_grad():
        expected = smollm2_hf.model(torch.tensor([tokens])).logits[0].numpy()
    executor = load(smollm2_gguf, "cpu")
    whole = run_in_chunks(executor, tokens, (NUM_TOKENS,), NUM_BLOCKS, BLOCK_SIZE)
    assert relative_error(whole, expected) < 1e-4
    chunked = run_in_chunks(executor, tokens, CHUNKS, NUM_BLOCKS, BLOCK_SIZE)
    np.testing.assert_array_equal(chunked, whole)
