"""pytorch_model.bin, which files of a directory are read, tied embeddings, generation_config.json:
as transformers has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import byte_level_vocabulary, model_metadata, model_tensors, write_gguf
from gguf import GGMLQuantizationType as QuantType
from oracle import SMALL, check_logits

from fastpage import LLM, EngineArgs
from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError, InvalidArgument
from fastpage.models import build_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes})).eval()


def save_pickled(path: Path, model: Any, num_files: int = 1) -> Path:
    """As save_pretrained did before safetensors."""
    path.mkdir(exist_ok=True)
    model.config.save_pretrained(path)
    state = model.state_dict()
    if num_files == 1:
        torch.save(state, path / "pytorch_model.bin")
        return path
    weight_map = {}
    for i in range(num_files):
        file = f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin"
        part = {name: state[name] for name in list(state)[i::num_files]}
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


# ---------------------------------------------------------------- pytorch_model.bin


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_files", [1, 3])
def test_pickled_tensors_equal_those_saved(tmp_path, dtype, num_files):
    model = tiny_llama().to(getattr(torch, dtype))
    checkpoint = open_checkpoint(save_pickled(tmp_path, model, num_files), load_format="pt")
    expected = model.state_dict()
    assert sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.source_dtype == dtype
    for name, tensor in expected.items():
        array, array_dtype = checkpoint.tensor(name)
        assert array_dtype == dtype
        assert array.shape == checkpoint.shape(name)
        assert not array.flags.writeable
        theirs = tensor.view(torch.uint16) if dtype == "bfloat16" else tensor
        np.testing.assert_array_equal(array, theirs.numpy())


def test_pickled_parameters(tmp_path):
    """Tensors that would take part in training, as some checkpoints hold them."""
    model = tiny_llama()
    save_pickled(tmp_path, model)
    torch.save(dict(model.named_parameters()), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, load_format="pt")
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(checkpoint.tensor(name)[0], parameter.detach().numpy())


def test_pickles_are_read_only_if_asked_for(tmp_path):
    save_pickled(tmp_path, tiny_llama())
    for load_format in ("auto", "gguf"):
        with pytest.raises(CheckpointError, match="--load-format pt"):
            open_checkpoint(tmp_path, load_format=load_format)
    with pytest.raises(CheckpointError, match=r"0 \.safetensors files"):
        open_checkpoint(tmp_path, load_format="safetensors")
    with pytest.raises(InvalidArgument, match="load_format='pickle' is not one of auto"):
        EngineArgs(model="x", load_format="pickle")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def test_pickles_that_would_run_code_or_are_none(tmp_path):
    path = save_pickled(tmp_path, tiny_llama())
    file = path / "pytorch_model.bin"
    whole = file.read_bytes()

    def message(**options: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path, load_format="pt")
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save({"x": torch.ones(3), "y": Evil()}, file)
    assert "not weights that torch loads" in message()
    torch.save({"x": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert "not a file of torch.save() since torch 1.6" in message()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(content)
        message()
    torch.save([torch.ones(3)], file)
    assert "a dict of tensors is expected" in message()
    torch.save({"x": {"y": torch.ones(3)}}, file)
    assert "'x' is not the name of a tensor" in message()
    torch.save({"x": torch.ones(1).expand(10**6, 10**6)}, file)
    assert "tensor 'x' is larger than what is stored" in message()
    torch.save({"x": torch.ones(3).to_sparse()}, file)
    assert "tensor 'x' is not dense" in message()
    torch.save({"x": torch.zeros(1000)}, file)
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(path / "new", "w", 8) as packed:
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
    (path / "new").rename(file)
    assert "is compressed" in message()


def test_pickled_tensors_that_are_not_floats(tmp_path):
    save_pickled(tmp_path, tiny_llama())
    torch.save({"x": torch.ones(3), "mask": torch.ones(3) > 0}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, load_format="pt")
    with pytest.raises(CheckpointError, match=r"tensor 'mask' is torch\.bool"):
        checkpoint.tensor("mask")
    with pytest.raises(CheckpointError, match="there is no tensor 'y'"):
        checkpoint.shape("y")


def test_index_of_pickles(tmp_path):
    path = save_pickled(tmp_path, tiny_llama(), 2)
    index = path / "pytorch_model.bin.index.json"
    for file, words in (
        ("../x.bin", "not the name of a file beside it"),
        ("/etc/passwd", "not the name of a file beside it"),
        ("a\0b", "not the name of a file beside it"),
        ("absent.bin", r"absent\.bin: not a file of torch"),
    ):
        index.write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path, load_format="pt")
    file = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps({"weight_map": {"absent": file}}))
    with pytest.raises(CheckpointError, match="tensor 'absent' is not in pytorch_model-00001"):
        open_checkpoint(path, load_format="pt")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"2 \.bin files but no pytorch_model\.bin\.index"):
        open_checkpoint(path, load_format="pt")


def test_pickles_without_torch(tmp_path):
    save_pickled(tmp_path, tiny_llama())
    code = """
import sys
sys.modules["torch"] = None
from fastpage.checkpoints import open_checkpoint
try:
    open_checkpoint(sys.argv[1], load_format="pt")
except ValueError as error:
    print(error)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "needs torch (pip install 'fastpage[torch]')" in shown


# ---------------------------------------------------------------- which files


def test_load_format_chooses_among_files(tmp_path):
    model = tiny_llama()
    save_pickled(tmp_path, model)
    model.save_pretrained(tmp_path)
    tensors = model_tensors("llama", 40, [QuantType.F16])
    write_gguf(tmp_path / "a.gguf", "llama", tensors, model_metadata("llama"))
    kinds = {
        load_format: type(open_checkpoint(tmp_path, load_format=load_format)).__name__
        for load_format in ("auto", "safetensors", "gguf", "pt")
    }
    assert kinds == {
        "auto": "SafetensorsCheckpoint",
        "safetensors": "SafetensorsCheckpoint",
        "gguf": "GgufCheckpoint",
        "pt": "PickledCheckpoint",
    }


def test_what_is_fetched_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    tiny_llama().save_pretrained(tmp_path)
    save_pickled(tmp_path, tiny_llama())
    tensors = model_tensors("llama", 40, [QuantType.F16])
    write_gguf(tmp_path / "a.gguf", "llama", tensors, model_metadata("llama"))
    asked: list[Any] = []

    def snapshot_download(model: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns[-1])
        return str(tmp_path)

    def hf_hub_download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(tmp_path / "a.gguf")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for load_format in ("auto", "gguf", "pt"):
        open_checkpoint("owner/name", load_format=load_format)
    open_checkpoint("owner/name/a.gguf", "main")
    assert asked == ["*.safetensors", "*.gguf", "*.bin", ("owner/name", "a.gguf", "main")]
    for file in ("model.safetensors", "pytorch_model.bin", "a.gguf"):  # what was not fetched
        (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=r"owner/name: .*--load-format pt"):
        open_checkpoint("owner/name")


# ---------------------------------------------------------------- tied embeddings


def test_tied_embeddings_as_in_transformers(tmp_path):
    """A config that ties them, and a checkpoint that has one, both, or two that differ."""
    from safetensors.torch import load_file, save_file

    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "one")
    state = load_file(tmp_path / "one" / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    assert "lm_head.weight" not in state
    no_embedding = {k: v for k, v in state.items() if "embed" not in k}
    for name, changed, tied in (
        ("the same", state | {"lm_head.weight": embedding.clone()}, True),
        ("different", state | {"lm_head.weight": embedding.flip(0).contiguous()}, False),
        ("only the head", no_embedding | {"lm_head.weight": embedding}, True),
    ):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(tmp_path / name)
        assert build_model(checkpoint.config, checkpoint=checkpoint).spec.tie_embeddings == tied
        check_logits(
            tmp_path / name, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        )


def test_untied_embeddings_need_both(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path)
    model = build_model(config | {"tie_word_embeddings": False}, checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        model.load_weights(checkpoint, executor=None)  # type: ignore[arg-type]


# ---------------------------------------------------------------- generation_config.json


@pytest.fixture(scope="module")
def servable(tmp_path_factory) -> Path:
    """A directory that LLM opens."""
    path = tmp_path_factory.mktemp("servable")
    vocabulary = byte_level_vocabulary(["the quick brown fox"], 280)
    size = len(vocabulary["tokenizer.ggml.tokens"])
    tiny_llama(vocab_size=size).save_pretrained(path)
    write_gguf(path / "a.gguf", "llama", {}, vocabulary | model_metadata("llama"))
    transformers.AutoTokenizer.from_pretrained(str(path), gguf_file="a.gguf").save_pretrained(path)
    (path / "a.gguf").unlink()
    return path


def test_sampling_defaults(servable, tmp_path):
    recommended = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 7,
        "eos_token_id": [5, 9],
        "pad_token_id": None,
        "typical_p": 0.3,
    }
    (servable / "generation_config.json").write_text(json.dumps(recommended))
    options = {"max_model_len": 64, "kv_cache_memory": "4MiB"}
    llm = LLM(str(servable), **options)
    params = llm.get_default_sampling_params()
    ours = (params.temperature, params.top_k, params.top_p, params.min_p)
    assert ours == (0.6, 20, 0.9, 0.05)
    assert (params.repetition_penalty, params.max_tokens) == (1.1, 7)
    assert {5, 9} <= set(llm.info.eos_token_ids)

    plain = LLM(str(servable), generation_config="vllm", **options)
    assert plain.get_default_sampling_params().temperature == 1.0
    assert plain.info.eos_token_ids == llm.info.eos_token_ids  # ends stay ends

    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')
    other = LLM(str(servable), generation_config=str(tmp_path), **options)
    assert other.get_default_sampling_params().temperature == 0.25
    assert other.get_default_sampling_params().top_k == 0

    with pytest.raises(CheckpointError, match="cannot be read"):
        LLM(str(servable), generation_config=str(tmp_path / "absent"), **options)
    with pytest.raises(InvalidArgument, match="generation_config=''"):
        EngineArgs(model="x", generation_config="")
    for wrong in ({"temperature": "hot"}, {"top_p": 7}, {"max_new_tokens": [1]}, {"top_k": {}}):
        (servable / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"generation_config\.json: .*ignores the file"):
            LLM(str(servable), **options)


def test_architectures_as_one_string(servable, tmp_path):
    copy = shutil.copytree(servable, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": "LlamaForCausalLM"}))
    llm = LLM(str(copy), max_model_len=64, kv_cache_memory="4MiB", generation_config="vllm")
    assert llm.info.architecture == "LlamaForCausalLM"
