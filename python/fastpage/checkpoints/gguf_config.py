"""GGUF metadata -> the `config.json` that Hugging Face would have beside the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.errors import CheckpointError, UnsupportedArchitecture

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def translate_config(file: GgufFile) -> dict[str, Any]:
    """The configuration of the model in `file`.

    Raises UnsupportedArchitecture for a model family that is not known, and CheckpointError for
    metadata that is missing or makes no sense.
    """
    keys = _Keys(file)
    architecture = keys.architecture
    if architecture not in _ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{file.path}: GGUF architecture {architecture!r:.40} is not supported; "
            f"these are: {', '.join(_ARCHITECTURES)}"
        )
    if keys.count("expert_count", 0):
        raise UnsupportedArchitecture(
            f"{file.path}: mixtures of experts are not supported in GGUF files"
        )
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitecture(f"{file.path}: keys and values of different width")
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        "torch_dtype": source_dtype(file),
    }
    rotary_dim = keys.count("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _rope_scaling(file, keys, config, rotary_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    _add_sliding_window(keys, config)
    return config | token_ids(file)


def source_dtype(file: GgufFile) -> str:
    """The dtype of a file's matrices: that of the floats, "bfloat16" for quantised ones."""
    matrices = {entry.dtype for entry in file.entries.values() if len(entry.shape) > 1}
    if matrices == {"F32"}:
        return "float32"
    return "float16" if matrices <= {"F16", "F32"} else "bfloat16"


def token_ids(file: GgufFile) -> dict[str, int]:
    """The special token ids that the file names, under their names in a config.json."""
    ids = {name: file.metadata.get(key) for name, key in _TOKEN_IDS.items()}
    return {name: value for name, value in ids.items() if type(value) is int}


class _Keys:
    """Typed access to the metadata keys `<architecture>.*`."""

    def __init__(self, file: GgufFile) -> None:
        self.path: Path = file.path
        self._metadata = file.metadata
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{file.path}: metadata key 'general.architecture' is missing")
        self.architecture = architecture

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < (0 if default == 0 else 1):
            raise self._wrong(key, value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(key, value)
        return float(value)

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def _wrong(self, key: str, value: Any) -> CheckpointError:
        fault = "is missing" if value is None else f"is {value!r:.40}"
        return CheckpointError(f"{self.path}: metadata key '{self.architecture}.{key}' {fault}")


def _vocab_size(file: GgufFile) -> int:
    embedding = file.entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: no matrix 'token_embd.weight'")
    return embedding.shape[0]


def _rope_scaling(
    file: GgufFile, keys: _Keys, config: dict[str, Any], rotary_dim: int
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.entries:
        return _llama3_scaling(file, config, rotary_dim)
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {
            "rope_type": "yarn",
            "factor": keys.real("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
    raise UnsupportedArchitecture(f"{file.path}: rope scaling {kind!r:.40} is not supported")


def _llama3_scaling(file: GgufFile, config: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, which GGUF stores as its result: a divisor for each frequency.

    All models so far share the parameters below except `factor`, the largest divisor; the divisors
    are computed again from them to be sure.
    """
    stored, _ = file.tensor("rope_freqs.weight")
    low, high, original = 1.0, 4.0, 8192
    factor = float(stored.max())
    frequencies = config["rope_theta"] ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise UnsupportedArchitecture(
            f"{file.path}: 'rope_freqs.weight' is not a scaling of the kind Llama 3.1 uses"
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _add_sliding_window(keys: _Keys, config: dict[str, Any]) -> None:
    window = keys.count("attention.sliding_window", 0)
    if not window:
        return
    config["sliding_window"] = window
    if keys.architecture == "llama":  # the member of the family that has one
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
    else:
        config["use_sliding_window"] = True
        config["max_window_layers"] = 0
