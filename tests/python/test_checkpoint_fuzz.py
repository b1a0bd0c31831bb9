"""Mutated checkpoint files: a checkpoint or a CheckpointError, nothing else, in little memory.

FASTPAGE_FUZZ_ROUNDS=n makes n times as many inputs.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    byte_level_vocabulary,
    model_metadata,
    sentencepiece_vocabulary,
    write_gguf,
    write_safetensors,
)
from gguf import GGMLQuantizationType as QuantType

from fastpage.checkpoints import open_checkpoint
from fastpage.errors import CheckpointError, ModelError
from fastpage.tokenizer import Tokenizer

ROUNDS = int(os.environ.get("FASTPAGE_FUZZ_ROUNDS", "1"))
MAX_MEMORY = 64 << 20
NUMBERS = [0, 1, 2, 7, 8, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    None,
    True,
    -1,
    2**70,
    1.5,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    "F32",
    *NUMBERS,
]


def mutate_bytes(rng: random.Random, content: bytes, end: int) -> bytes:
    """A few edits, most of them before `end`, where the header is."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(end, len(data))))
        length = rng.choice((1, 1, 4, 8, 30))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            width = rng.choice((4, 8))
            data[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(
                width, "little"
            )
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """One value somewhere in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutate_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value, value[at]]
        return [*value[:at], mutate_json(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def replace(file: Path, content: bytes) -> None:
    """Writes a new file: cutting short one that is still mapped is slow, and unkind."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def survives(load: Callable[[], None]) -> bool:
    """Whether it loads; fails the test if it fails in any other way than it should."""
    try:
        load()
    except ModelError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
        return False
    return True


def load_all(path: Path, with_tokenizer: bool) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        array, _ = checkpoint.tensor(name)
        assert array.shape == checkpoint.shape(name)
    if with_tokenizer:
        tokenizer = checkpoint.tokenizer()
        tokenizer.decode(tokenizer.encode("hello <|end|> 12"))


@pytest.fixture(autouse=True)
def bounded_memory():
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_MEMORY


def test_safetensors(tmp_path):
    rng = random.Random(0)
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "a.weight": ("F32", (2, 3), bytes(24)),
        "b.weight": ("BF16", (4,), bytes(8)),
        "c": ("I64", (), bytes(8)),
        "d": ("F16", (0, 2), b""),
    }
    file = tmp_path / "model.safetensors"
    write_safetensors(file, tensors)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    tensors.pop("c")  # not a float: reading it is an error, and none of the file
    num_loaded = 0
    for turn in range(3000 * ROUNDS):
        if turn % 2:
            replace(file, mutate_bytes(rng, whole, 8 + length))
        else:
            text = json.dumps(mutate_json(rng, header)).encode()
            replace(file, len(text).to_bytes(8, "little") + text + whole[8 + length :])

        def load() -> None:
            checkpoint = open_checkpoint(tmp_path)
            for name in tensors:
                checkpoint.tensor(name)

        num_loaded += survives(load)
    assert 0 < num_loaded < 1000 * ROUNDS


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_gguf(tmp_path, kind):
    rng = random.Random(1)
    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    vocabulary = (
        byte_level_vocabulary(texts, 280)
        if kind == "byte-level"
        else sentencepiece_vocabulary(texts, 60)
    )
    embedding = (np.zeros((40, 34), np.uint8), QuantType.Q8_0)
    query = (np.zeros((256, 1), np.float32), QuantType.F32)
    tensors = {"token_embd.weight": embedding, "blk.0.attn_q.weight": query}
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", tensors, vocabulary | model_metadata("llama"))
    whole = file.read_bytes()
    load_all(file, with_tokenizer=True)
    num_loaded = 0
    for turn in range(1000 * ROUNDS):
        end = len(whole) if turn % 2 else 200  # the vocabulary is most of the file
        content = mutate_bytes(rng, whole, end)
        if turn % 4 == 1:  # the model's keys and the table of tensors follow the vocabulary
            at = whole.index(b"llama.block_count")
            content = whole[:at] + mutate_bytes(rng, whole[at:], 900)
        replace(file, content)
        num_loaded += survives(lambda: load_all(file, with_tokenizer=True))
    assert 0 < num_loaded < 800 * ROUNDS


def test_tokenizer_files(tmp_path):
    rng = random.Random(2)
    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    metadata = byte_level_vocabulary(texts, 280)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    backend = Tokenizer.from_gguf_metadata(metadata, "x")._backend
    files = {
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": {
            "eos_token": {"content": "<|end|>"},
            "bos_token": "<|begin|>",
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
            "added_tokens_decoder": {"283": {"content": "<|new|>", "special": True}},
        },
        "special_tokens_map.json": {"unk_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": [1, 2]},
    }

    def load() -> None:
        tokenizer = Tokenizer.from_directory(tmp_path)
        tokenizer.decode(tokenizer.encode("hello <|end|> 12"))

    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert survives(load)
    num_loaded = 0
    for _ in range(1500 * ROUNDS):
        name = rng.choice(list(files))
        replace(tmp_path / name, json.dumps(mutate_json(rng, files[name])).encode())
        num_loaded += survives(load)
        replace(tmp_path / name, json.dumps(files[name]).encode())
    assert 0 < num_loaded < 1500 * ROUNDS


def test_index(tmp_path):
    rng = random.Random(3)
    (tmp_path / "config.json").write_text("{}")
    for shard in ("one", "two"):
        write_safetensors(tmp_path / f"{shard}.safetensors", {shard: ("F32", (1,), bytes(4))})
    content = {"metadata": {}, "weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    index = tmp_path / "model.safetensors.index.json"
    for _ in range(500 * ROUNDS):
        replace(index, json.dumps(mutate_json(rng, content)).encode())
        try:
            open_checkpoint(tmp_path)
        except CheckpointError as error:
            assert "\n" not in str(error)
