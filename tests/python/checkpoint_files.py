"""Writes small checkpoint files for tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

# Text enough to learn some thousand tokens from.
CORPUS = [Path(argparse.__file__).read_text(encoding="utf-8")]

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS = 256, 4, 2, 512, 2
HEAD_DIM = {"qwen3": 128}  # transformers does not read it from Qwen3 files, but assumes this


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], pad: int = 0
) -> None:
    """`tensors`: name -> (dtype as the format names it, shape, values)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [position, position + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += len(data)
    write_raw_safetensors(
        path,
        json.dumps(header).encode() + b" " * pad,
        b"".join(data for _, _, data in tensors.values()),
    )


def write_raw_safetensors(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[np.ndarray, QuantType]],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """`tensors`: name -> (values, or the blocks of a quantised type as bytes; its type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        add_key(writer, key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def model_metadata(architecture: str, **changes: Any) -> dict[str, Any]:
    """The keys of a decoder of the sizes above."""
    head_dim = HEAD_DIM.get(architecture, HIDDEN // HEADS)
    values = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
        "rope.dimension_count": head_dim,
    }
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def model_tensors(
    architecture: str, vocab_size: int, kinds: Iterable[QuantType], tied: bool = False
) -> dict[str, tuple[np.ndarray, QuantType]]:
    """Random weights, the matrices in `kinds` by turns."""
    rng = np.random.default_rng(0)
    turn = list(kinds)
    tensors: dict[str, tuple[np.ndarray, QuantType]] = {}

    def vector(name: str, size: int) -> None:
        tensors[name] = (rng.standard_normal(size, np.float32), QuantType.F32)

    def matrix(name: str, rows: int, columns: int) -> None:
        kind = turn[len(tensors) % len(turn)]
        tensors[name] = (random_matrix(rng, rows, columns, kind), kind)

    head_dim = HEAD_DIM.get(architecture, HIDDEN // HEADS)
    matrix("token_embd.weight", vocab_size, HIDDEN)
    vector("output_norm.weight", HIDDEN)
    if not tied:
        matrix("output.weight", vocab_size, HIDDEN)
    for layer in range(LAYERS):
        rows = {"q": HEADS * head_dim, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
        for part, size in rows.items():
            matrix(f"blk.{layer}.attn_{part}.weight", size, HIDDEN)
            if architecture == "qwen2":
                vector(f"blk.{layer}.attn_{part}.bias", size)
        if architecture == "qwen3":
            vector(f"blk.{layer}.attn_q_norm.weight", head_dim)
            vector(f"blk.{layer}.attn_k_norm.weight", head_dim)
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * head_dim)
        matrix(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE)
        vector(f"blk.{layer}.attn_norm.weight", HIDDEN)
        vector(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    return tensors


def random_matrix(rng: np.random.Generator, rows: int, columns: int, kind: QuantType) -> np.ndarray:
    """Values, or for a quantised type random blocks, all of whose fp16 fields are finite."""
    if kind in (QuantType.F32, QuantType.F16):
        dtype = np.float32 if kind == QuantType.F32 else np.float16
        return rng.standard_normal((rows, columns), np.float32).astype(dtype)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // block_values * block_bytes), np.uint8)
    # The exponents of an fp16 are in its odd byte: no block then holds an inf or nan as its scale.
    return raw & np.uint8(0xBB)


def byte_level_vocabulary(texts: Iterable[str], size: int = 800) -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary, with three control tokens at its end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, "<|begin|>", "<|end|>", "<|endoftext|>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_vocabulary(texts: Iterable[str], size: int = 800) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE vocabulary with byte tokens, scored as SentencePiece does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocab = backend.get_vocab()
    learnt = sorted((token for token in vocab if len(token) > 1), key=vocab.__getitem__)
    single = sorted(token for token in vocab if len(token) == 1)
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    # Merges come first in a SentencePiece model, then characters, each scoring less than the last.
    tokens = [*special, *learnt, *single]
    scores = [0.0] * len(special) + [-float(rank) for rank in range(len(learnt) + len(single))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(learnt) + len(single)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
