"""GGUF metadata -> the fields that a Hugging Face `config.json` has beside the same weights.

Here is what families of models share; gguf_families.py has what is each one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.errors import CheckpointError, UnsupportedArchitecture

_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


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


class Keys:
    """Typed access to the metadata keys `<architecture>.*`."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.path: Path = file.path
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
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise self._wrong(key, value)
        if value == 0 and default != 0:
            raise self._wrong(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def has(self, tensor: str) -> bool:
        return tensor in self.file.entries

    def _wrong(self, key: str, value: Any) -> CheckpointError:
        fault = "is missing" if value is None else f"is {value!r:.40}"
        return CheckpointError(f"{self.path}: metadata key '{self.architecture}.{key}' {fault}")


def shared_fields(keys: Keys) -> dict[str, Any]:
    """Of every config."""
    vocab = keys.file.entries.get("token_embd.weight")
    if vocab is None or len(vocab.shape) != 2:
        raise CheckpointError(f"{keys.path}: no matrix 'token_embd.weight'")
    return {
        "vocab_size": vocab.shape[0],
        "tie_word_embeddings": not keys.has("output.weight"),
        "torch_dtype": source_dtype(keys.file),
        **token_ids(keys.file),
    }


def llama_fields(keys: Keys) -> dict[str, Any]:
    """Of Llama and its many successors."""
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", max(hidden // heads, 1))
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitecture(f"{keys.path}: keys and values of different width")
    config = {
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
        **norm_eps(keys),
    }
    rotary_dim = keys.count("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _rope_scaling(keys, config, rotary_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def norm_eps(keys: Keys) -> dict[str, float]:
    """Both names that configs have for a LayerNorm's."""
    if keys.get("attention.layer_norm_epsilon") is None:
        return {"rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon")}
    eps = keys.real("attention.layer_norm_epsilon")
    return {"layer_norm_eps": eps, "layer_norm_epsilon": eps}


def _rope_scaling(keys: Keys, config: dict[str, Any], rotary_dim: int) -> dict[str, Any] | None:
    if keys.has("rope_freqs.weight"):
        return _llama3_scaling(keys.file, config, rotary_dim)
    if keys.has("rope_factors_long.weight"):
        return _longrope_scaling(keys, config)
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
    raise UnsupportedArchitecture(f"{keys.path}: rope scaling {kind!r:.40} is not supported")


def _longrope_scaling(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    factors = {}
    for kind in ("long", "short"):
        name = f"rope_factors_{kind}.weight"
        if not keys.has(name):
            raise CheckpointError(f"{keys.path}: no tensor {name!r}")
        factors[f"{kind}_factor"] = keys.file.tensor(name)[0].astype(float).tolist()
    original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}


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
