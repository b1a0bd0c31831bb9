"""Checkpoints: the same tensors as transformers reads, and one-line errors for broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    byte_level_vocabulary,
    model_metadata,
    model_tensors,
    random_matrix,
    write_gguf,
    write_raw_safetensors,
    write_safetensors,
)
from gguf import GGMLQuantizationType as QuantType
from gguf import quants

from fastpage.checkpoints import open_checkpoint
from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.checkpoints.safetensors import SafetensorsFile
from fastpage.errors import CheckpointError, UnsupportedArchitecture

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
TEXTS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x + 1\n"] * 3


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def write_directory(path: Path, tensors: dict[str, Any] | None = None, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if tensors is not None:
        write_safetensors(path / "model.safetensors", tensors)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


def ones(count: int) -> tuple[str, tuple[int, ...], bytes]:
    return ("F32", (count,), np.ones(count, "<f4").tobytes())


def assert_one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


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


# ---------------------------------------------------------------- other models


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["1GB", "300KB"])
def test_safetensors_equal_transformers(tmp_path, dtype, shard_size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = open_checkpoint(str(tmp_path))
    expected = model.state_dict()
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "300KB")
    assert sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.source_dtype == dtype
    assert checkpoint.name == tmp_path.name
    assert checkpoint.config["hidden_size"] == 64
    assert "bos_token_id" in checkpoint.generation_config
    for name, tensor in expected.items():
        array, array_dtype = checkpoint.tensor(name)
        assert array_dtype == dtype
        assert array.shape == checkpoint.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(as_float32(array, dtype), tensor.float().numpy())
        assert not array.flags.owndata, "a copy where a view would do"
        assert not array.flags.writeable


GGUF_KINDS = {
    "llama": [QuantType.Q4_0, QuantType.Q5_0, QuantType.F16, QuantType.Q6_K],
    "qwen2": [QuantType.Q8_0, QuantType.Q4_K, QuantType.F32, QuantType.Q5_1],
    "qwen3": [QuantType.Q2_K, QuantType.Q3_K, QuantType.BF16, QuantType.Q5_K],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", GGUF_KINDS)
def test_gguf_of_each_architecture_equals_transformers(tmp_path, architecture, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    transformers.utils.logging.disable_progress_bar()
    vocabulary = byte_level_vocabulary(TEXTS)
    vocab_size = len(vocabulary["tokenizer.ggml.tokens"])
    tensors = model_tensors(architecture, vocab_size, GGUF_KINDS[architecture], tied)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture, tensors, model_metadata(architecture) | vocabulary)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    if tied:
        expected.pop("lm_head.weight")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["architectures"] == [type(model).__name__]
    assert checkpoint.config["vocab_size"] == vocab_size
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        if key in model.config:
            assert checkpoint.config[key] == model.config.to_dict()[key]
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        array = as_float32(*checkpoint.tensor(name))
        np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ2_S", "Q6_K"]
)
def test_dequantising_in_chunks_equals_the_gguf_package(tmp_path, kind):
    quantised = QuantType[kind]
    blocks = random_matrix(np.random.default_rng(1), 300, 1024, quantised)  # several chunks
    write_gguf(tmp_path / "one.gguf", "llama", {"x": (blocks, quantised)})
    array, dtype = GgufFile(tmp_path / "one.gguf").tensor("x")
    assert (dtype, array.shape) == ("float32", (300, 1024))
    np.testing.assert_array_equal(array, quants.dequantize(blocks, quantised))


# ---------------------------------------------------------------- GGUF metadata


def tiny_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    weights = model_tensors(architecture, 40, [QuantType.F16]) | (tensors or {})
    write_gguf(path, architecture, weights, model_metadata(architecture, **changes))
    return path


def test_gguf_defaults(tmp_path):
    path = tiny_gguf(
        tmp_path / "a.gguf",
        attention__head_count_kv=None,
        attention__key_length=None,
        attention__value_length=None,
        rope__freq_base=None,
        rope__dimension_count=None,
    )
    config = open_checkpoint(path).config
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == 64
    assert config["rope_theta"] == 10000.0
    assert "rope_scaling" not in config
    assert open_checkpoint(path).source_dtype == "float16"


def test_gguf_rope_scaling(tmp_path):
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    config = open_checkpoint(tiny_gguf(tmp_path / "linear.gguf", **linear)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}

    yarn = linear | {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 64}
    config = open_checkpoint(tiny_gguf(tmp_path / "yarn.gguf", "qwen2", **yarn)).config
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }

    unknown = linear | {"rope__scaling__type": "longrope"}
    with pytest.raises(UnsupportedArchitecture, match="longrope"):
        open_checkpoint(tiny_gguf(tmp_path / "unknown.gguf", **unknown))


def test_gguf_llama3_rope_scaling_is_recovered_from_its_frequencies(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    common = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    frequencies = [
        transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
            transformers.LlamaConfig(**common, rope_parameters={"rope_theta": 500000.0, **kind})
        ).inv_freq
        for kind in ({"rope_type": "default"}, scaling)
    ]
    divisors = (frequencies[0] / frequencies[1]).to(torch.float32).numpy()
    extra = {"rope_freqs.weight": (divisors, QuantType.F32)}
    path = tiny_gguf(tmp_path / "a.gguf", tensors=extra, rope__freq_base=500000.0)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.names()

    extra["rope_freqs.weight"] = (divisors[::-1].copy(), QuantType.F32)
    with pytest.raises(UnsupportedArchitecture, match="rope_freqs"):
        open_checkpoint(tiny_gguf(tmp_path / "b.gguf", tensors=extra, rope__freq_base=500000.0))


def test_gguf_sliding_window_and_partial_rotary(tmp_path):
    config = open_checkpoint(
        tiny_gguf(tmp_path / "a.gguf", attention__sliding_window=32, rope__dimension_count=32)
    ).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32
    assert config["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_count": None}, "'llama.block_count' is missing"),
        ({"block_count": "many"}, "'llama.block_count' is 'many'"),
        ({"attention__head_count": 0}, "'llama.attention.head_count' is 0"),
        ({"attention__layer_norm_rms_epsilon": -1.0}, "epsilon' is -1.0"),
        ({"expert_count": 8}, "'llama.expert_used_count' is missing"),
        ({"attention__value_length": 32}, "keys and values of different width"),
    ],
)
def test_gguf_metadata_that_makes_no_sense(tmp_path, changes, words):
    with pytest.raises((CheckpointError, UnsupportedArchitecture)) as error:
        open_checkpoint(tiny_gguf(tmp_path / "a.gguf", **changes))
    assert_one_line(error, "a.gguf", words)


def test_gguf_of_an_unknown_architecture_or_with_unknown_tensors(tmp_path):
    with pytest.raises(UnsupportedArchitecture) as error:
        open_checkpoint(tiny_gguf(tmp_path / "a.gguf", "mamba"))
    assert_one_line(error, "mamba", "llama, qwen2, qwen3")
    extra = {"blk.0.attn_qkv.weight": (np.ones((2, 2), np.float32), QuantType.F32)}
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tiny_gguf(tmp_path / "b.gguf", tensors=extra))
    assert_one_line(error, "blk.0.attn_qkv.weight", "no place in a llama model")


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ([QuantType.F32], "float32"),
        ([QuantType.F16], "float16"),
        ([QuantType.BF16], "bfloat16"),
        ([QuantType.Q8_0, QuantType.F16], "bfloat16"),
    ],
)
def test_gguf_source_dtype(tmp_path, kinds, dtype):
    path = tmp_path / "a.gguf"
    write_gguf(path, "llama", model_tensors("llama", 40, kinds), model_metadata("llama"))
    assert open_checkpoint(path).source_dtype == dtype


def test_broken_gguf_file(tmp_path):
    path = tiny_gguf(tmp_path / "a.gguf")
    whole = path.read_bytes()
    table = whole.index(b"blk.0.attn_v.weight")
    offset = table + len(b"blk.0.attn_v.weight") + 4 + 2 * 8 + 4  # after dimensions and type
    for content, words in (
        (b"", "cannot be read"),
        (whole[:10], "truncated within the header"),
        (whole[: table + 3], "truncated"),
        (whole[:-1], "the file has"),
        (b"GGML" + whole[4:], "not a GGUF file"),
        (whole[:4] + b"\x01" + whole[5:], "GGUF version 1"),
        (whole[:4] + b"\x00\x00\x00\x03" + whole[8:], "versions 2 and 3, little-endian"),
        (whole[:offset] + bytes(8) + whole[offset + 8 :], "overlaps the one before it"),
        (whole[:table] + b"blk.0.attn_k" + whole[table + 12 :], "is there twice"),
        (whole[: offset - 4] + b"\xff" + whole[offset - 3 :], "is of type 255"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path)
        assert_one_line(error, "a.gguf", words)


def test_gguf_pieces_and_heads_that_do_not_divide(tmp_path):
    path = tmp_path / "split.gguf"
    weights = model_tensors("llama", 40, [QuantType.F16])
    write_gguf(path, "llama", weights, model_metadata("llama") | {"split.count": 3})
    with pytest.raises(CheckpointError, match="one of 3 pieces"):
        open_checkpoint(path)
    odd = {"blk.0.attn_q.weight": (np.ones((30, 256), np.float32), QuantType.F32)}
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "odd.gguf", tensors=odd))
    with pytest.raises(CheckpointError, match="30 rows do not divide into 4 heads"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")


# ---------------------------------------------------------------- finding the files


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in (tmp_path / "none", "./none", "none.gguf"):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(model)
        assert_one_line(error, "none", "no such file or directory")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint("no spaces here")
    assert_one_line(error, "'no spaces here' is neither a local directory or .gguf file nor")


def test_hub_id_that_cannot_be_reached():
    code = """
import sys
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError
if sys.argv[1] == "without":
    sys.modules["huggingface_hub"] = None
try:
    open_checkpoint("fastpage-tests/there-is-no-such-model")
except CheckpointError as error:
    print(error)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    for mode, reason in (("with", ""), ("without", "huggingface_hub is not installed")):
        shown = subprocess.run(
            [sys.executable, "-c", code, mode],
            env=offline | {"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert len(shown) == 1
        assert shown[0].startswith(
            "'fastpage-tests/there-is-no-such-model' is neither a local directory or .gguf file "
            f"nor reachable on the Hugging Face Hub: {reason}"
        )


def test_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(model: str, revision: str | None = None, **patterns: Any) -> str:
        asked.append((model, revision))
        return str(write_directory(tmp_path / "snapshot", {"x": ones(4)}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/model-1.5B", revision="main")
    assert asked == [("owner/model-1.5B", "main")]
    assert checkpoint.name == "owner/model-1.5B"
    assert checkpoint.names() == ["x"]


def test_directories_without_weights_to_load(tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "pickled")
    assert_one_line(error, "pytorch_model.bin", "--load-format pt", "save_pretrained")

    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors or \.gguf file"):
        open_checkpoint(tmp_path / "empty")

    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path / "empty")

    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "text")


def test_directory_without_config_or_index(tmp_path):
    path = write_directory(tmp_path / "a", {"x": ones(4)})
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(path)
    path = write_directory(tmp_path / "b")
    for name in ("one", "two"):
        write_safetensors(path / f"{name}.safetensors", {"x": ones(4)})
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files but no model\."):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"x": 1}}, "no weight_map"),
        ({"weight_map": {"x": "../one.safetensors"}}, "not the name of a file beside it"),
        ({"weight_map": {"x": "two.safetensors"}}, "two.safetensors: cannot be read"),
        ({"weight_map": {"y": "one.safetensors"}}, "tensor 'y' is not in one.safetensors"),
    ],
)
def test_broken_index(tmp_path, index, words):
    path = write_directory(tmp_path, model__safetensors__index__json=index)
    write_safetensors(path / "one.safetensors", {"x": ones(4)})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert_one_line(error, words)


# ---------------------------------------------------------------- broken safetensors files


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "a JSON object is expected"),
        (b'{"x": 1, "x": 2}', "duplicate key 'x'"),
        (json.dumps({"__metadata__": {"a": {"b": "c"}}}).encode(), "__metadata__"),
        (json.dumps({"__metadata__": 3}).encode(), "__metadata__"),
        (json.dumps({"x": 3}).encode(), "tensor 'x' needs dtype, shape and data_offsets"),
        (json.dumps({"x": {**entry(), "extra": 1}}).encode(), "tensor 'x' needs dtype"),
        (json.dumps({"x": entry(dtype="F33")}).encode(), "tensor 'x' is of unknown dtype 'F33'"),
        (json.dumps({"x": entry(dtype=["F32"])}).encode(), "tensor 'x' is of unknown dtype"),
        (json.dumps({"x": entry(shape=[2, -2])}).encode(), "tensor 'x' has no lists of counts"),
        (json.dumps({"x": entry(shape=[2, True])}).encode(), "tensor 'x' has no lists of counts"),
        (json.dumps({"x": entry(shape=4)}).encode(), "tensor 'x' has no lists of counts"),
        (
            json.dumps({"x": entry(offsets=[0, 16, 32])}).encode(),
            "tensor 'x' has no lists of counts",
        ),
        (json.dumps({"x": entry(shape=[2, 3])}).encode(), "tensor 'x' as F32 of shape [2, 3]"),
        (
            json.dumps({"x": entry(shape=[2**62, 2**62])}).encode(),
            "is too large: [4611686018427387904",
        ),
        (json.dumps({"x": entry(shape=[0, 2**62])}).encode(), "is too large"),
        (json.dumps({"x": entry(shape=[1] * 99)}).encode(), "is too large"),
        (json.dumps({"\ud800": entry()}).encode(), "not valid JSON"),
        (json.dumps({"x": entry(offsets=[16, 0])}).encode(), "does not fill bytes 16 to 0"),
        (json.dumps({"x": entry(), "y": entry("U8", [8], [8, 16])}).encode(), "'y' overlaps"),
        (json.dumps({"x": entry(shape=[2], offsets=[8, 16])}).encode(), "'x' follows a gap"),
        (json.dumps({"x": entry(shape=[8], offsets=[0, 32])}).encode(), "'x' ends at byte"),
        (json.dumps({"x": entry(shape=[2], offsets=[0, 8])}).encode(), "8 bytes belong to no"),
    ],
)
def test_broken_safetensors_header(tmp_path, header, words):
    path = write_directory(tmp_path)
    write_raw_safetensors(path / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert_one_line(error, "model.safetensors", words)


def test_broken_safetensors_file(tmp_path):
    path = write_directory(tmp_path, {"x": ones(4)})
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for content, words in (
        (b"", "cannot be read"),
        (whole[:7], "too short"),
        (whole[:20], "truncated, or not a safetensors file"),
        (whole[:-1], "truncated"),
        (b"\xff" * 8 + whole[8:], "truncated, or not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path)
        assert_one_line(error, "model.safetensors", words)


def test_safetensors_that_are_not_floats_unaligned_or_empty(tmp_path):
    tensors = {
        "mask": ("BOOL", (3,), bytes(3)),
        "odd": ones(5),
        "scalar": ("F32", (), np.float32(7).tobytes()),
        "none": ("F16", (0, 4), b""),
    }
    path = write_directory(tmp_path, tensors)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.tensor("mask")
    assert_one_line(error, "tensor 'mask' is BOOL")
    with pytest.raises(CheckpointError) as error:
        checkpoint.tensor("absent")
    assert_one_line(error, "there is no tensor 'absent'")
    odd, _ = checkpoint.tensor("odd")
    assert odd.flags.aligned
    np.testing.assert_array_equal(odd, np.ones(5))
    assert checkpoint.tensor("scalar")[0].item() == 7
    assert checkpoint.tensor("none")[0].shape == (0, 4)
    file = SafetensorsFile(path / "model.safetensors")
    assert set(file.entries) == set(tensors)


# ---------------------------------------------------------------- start-up


def test_neither_torch_nor_transformers_is_imported(smollm2_gguf):
    code = f"""
import sys
from fastpage.checkpoints import open_checkpoint
checkpoint = open_checkpoint({str(smollm2_gguf)!r})
checkpoint.tensor("model.norm.weight")
tokenizer = checkpoint.tokenizer()
tokenizer.apply_chat_template([{{"role": "user", "content": "hello"}}])
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.strip() == "[]"
