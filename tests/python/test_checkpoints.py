"""Checkpoints: the same tensors as transformers reads, and one-line errors for broken files."""

from __future__ import annotations

import numpy as np

from fastpage.checkpoints import open_checkpoint


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


# ---------------------------------------------------------------- the real model


def test_gguf_tensors_equal_transformers(smollm2_gguf, smollm2_hf):
    checkpoint = open_checkpoint(smollm2_gguf)
    expected = smollm2_hf.model.state_dict()
    expected.pop("lm_head.weight")  # tied to the embedding
    assert sorted(checkpoint.names()) == sorted(expected)
    for name in checkpoint.names():
        array, dtype = checkpoint.tensor(name)
        assert dtype == "float32"
        assert array.shape == checkpoint.shape(name)
        np.testing.assert_array_equal(array, expected[name].numpy(), err_msg=name)


def test_gguf_config_equals_transformers(smollm2_gguf, smollm2_hf):
    checkpoint = open_checkpoint(smollm2_gguf)
    expected = smollm2_hf.model.config.to_dict()
    rope_theta = checkpoint.config.pop("rope_theta")
    assert rope_theta == expected["rope_parameters"]["rope_theta"]
    assert checkpoint.config.pop("architectures") == ["LlamaForCausalLM"]
    assert checkpoint.config.pop("torch_dtype") == checkpoint.source_dtype == "bfloat16"
    assert checkpoint.config == {name: expected[name] for name in checkpoint.config}
    assert checkpoint.name == smollm2_gguf.stem
    assert checkpoint.generation_config["eos_token_id"] == 2
