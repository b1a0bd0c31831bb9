"""Mutated checkpoint files: a checkpoint or a CheckpointError, nothing else, in little memory.

FASTPAGE_FUZZ_ROUNDS=n makes n times as many inputs (`make fuzz-readers`); one round is 9,700.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
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

from fastpage import EngineArgs
from fastpage.checkpoints import open_checkpoint
from fastpage.checkpoints.gguf_families import FAMILIES
from fastpage.engine.loading import _sampling_defaults
from fastpage.errors import CheckpointError, InvalidArgument
from fastpage.models import build_model
from fastpage.tokenizer import Tokenizer

with contextlib.suppress(ModuleNotFoundError):
    import torch  # before memory is traced

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
    except InvalidArgument as error:
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


GGUF_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}


def write_gguf_fields(
    rng: random.Random, keys: dict[str, Any], tensors: list[list[Any]], data: bytes
) -> bytes:
    """A GGUF file of fields that make sense or not: keys are name -> [type, value], tensors
    [name, dimensions, type, offset]. Now and then a count, a length or a type is another."""

    def number(form: str, value: Any) -> bytes:
        if rng.random() < 0.001:
            value = rng.choice(NUMBERS)
        if form in "BHIQ":
            value = int(value) % 2 ** (8 * struct.calcsize(form))
        elif form in "bhiq":
            half = 2 ** (8 * struct.calcsize(form) - 1)
            value = (int(value) + half) % (2 * half) - half
        return struct.pack("<" + form, value)

    def text(value: Any) -> bytes:
        raw = str(value).encode(errors="surrogatepass")
        return number("Q", len(raw)) + raw

    def values(kind: int, value: Any) -> bytes:
        if kind == 8:
            return text(value)
        if kind == 9:
            inner, items = value
            head = number("I", inner) + number("Q", len(items))
            return head + b"".join(values(inner, item) for item in items)
        return number(GGUF_FORMATS.get(kind, "I"), value)

    out = b"GGUF" + number("I", 3) + number("Q", len(tensors)) + number("Q", len(keys))
    for name, (kind, value) in keys.items():
        out += text(name) + number("I", kind) + values(kind, value)
    for name, dims, kind, offset in tensors:
        out += text(name) + number("I", len(dims)) + b"".join(number("Q", d) for d in dims)
        out += number("I", kind) + number("Q", offset)
    return out + bytes(-len(out) % 32) + data


def mutate_number(rng: random.Random, value: int) -> int:
    return rng.choice([*NUMBERS, value - 1, value + 1, value * 2, -value])


def test_gguf_fields(tmp_path):
    """Files of every family, well formed but for a few fields."""
    rng = random.Random(4)
    file = tmp_path / "model.gguf"
    num_loaded = 0
    for turn in range(1500 * ROUNDS):
        family = list(FAMILIES)[turn % len(FAMILIES)]
        counts = {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 8,
            "feed_forward_length": 16,
            "attention.head_count": 2,
            "attention.head_count_kv": 2 if family in ("bloom", "gptneox") else 1,
            "rope.dimension_count": 4,
            "expert_count": 2 if rng.random() < 0.2 or family == "qwen3moe" else 0,
            "expert_used_count": 1,
            "expert_feed_forward_length": 4,
            "attention.sliding_window": rng.choice((0, 3)),
        }
        reals = {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5,
            "logit_scale": 0.5,
            "rope.freq_base": 1e4,
        }
        keys: dict[str, Any] = {"general.architecture": [8, family]}
        keys |= {f"{family}.{name}": [4, value] for name, value in counts.items()}
        keys |= {f"{family}.{name}": [6, value] for name, value in reals.items()}
        keys["tokenizer.ggml.tokens"] = [9, [8, ["a", "b"]]]
        tensors: list[list[Any]] = [["token_embd.weight", [8, 3], 0, 0]]
        position = 96
        modules = [*FAMILIES[family].layer, *FAMILIES[family].experts]
        for module in rng.sample(modules, 3):
            dims = [8, 4, 2] if module.endswith("exps") else [8] if "norm" in module else [8, 8]
            tensors.append([f"blk.0.{module}.weight", dims, 0, position])
            position += 256
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            kind = rng.randrange(4)
            if kind == 0:
                name = rng.choice(list(keys)[1:])
                old = keys[name]
                keys[name] = rng.choice(
                    [
                        [old[0], mutate_number(rng, 3)] if old[0] == 4 else old,
                        [6, rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))],
                        [8, "\ud800"],
                        [9, [9, [[4, [1]]]]],
                        [9, [4, [1, 2]]],
                        [rng.choice((12, 13, 99)), 1],
                    ]
                )
            elif kind == 1:
                keys["general.alignment"] = [4, rng.choice(NUMBERS) % 2**32]
            elif kind == 2:
                tensor = rng.choice(tensors)
                tensor[3] = mutate_number(rng, tensor[3])
            else:
                tensor = rng.choice(tensors)
                part = rng.randrange(3)
                if part == 0:
                    tensor[0] = rng.choice(tensors)[0]
                elif part == 1:
                    tensor[1] = [mutate_number(rng, 8) for _ in range(rng.randrange(6))]
                else:
                    tensor[2] = rng.choice((1, 2, 8, 14, 30, 36, 255, 2**31))
        replace(file, write_gguf_fields(rng, keys, tensors, bytes(1024)))
        num_loaded += survives(lambda: load_all(file, with_tokenizer=False))
    assert 200 * ROUNDS < num_loaded < 1400 * ROUNDS


def test_pickles(tmp_path):
    pytest.importorskip("torch")
    rng = random.Random(5)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    shared = torch.ones(4)
    torch.save({"a": torch.ones(2, 3), "b": shared, "c": shared[1:].bfloat16()}, file)
    whole = file.read_bytes()
    num_loaded = 0

    def load() -> None:
        checkpoint = open_checkpoint(tmp_path, load_format="pt")
        for name in checkpoint.names():
            checkpoint.tensor(name)

    for turn in range(400 * ROUNDS):
        # The pickle is at the beginning, the directory of the zip file at the end.
        end = 600 if turn % 2 else len(whole)
        replace(file, mutate_bytes(rng, whole, end))
        num_loaded += survives(load)
    assert 0 < num_loaded < 350 * ROUNDS


def test_configurations(tmp_path):
    """config.json and generation_config.json: what LLM() would say before it reads weights."""
    rng = random.Random(6)
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 4,
        "max_position_embeddings": 128,
        "rope_scaling": rope,
        "tie_word_embeddings": True,
    }
    generation = {"temperature": 0.5, "top_k": 5, "eos_token_id": [1], "max_new_tokens": 9}
    write_safetensors(tmp_path / "model.safetensors", {"x": ("F32", (1,), bytes(4))})
    num_built = 0

    def load() -> None:
        checkpoint = open_checkpoint(tmp_path)
        _sampling_defaults(EngineArgs(model="x"), checkpoint)
        if checkpoint.config.get("num_hidden_layers") == 1:  # more take their time
            build_model(checkpoint.config, 16, checkpoint)

    for _ in range(800 * ROUNDS):
        (tmp_path / "config.json").write_text(json.dumps(mutate_json(rng, config)))
        (tmp_path / "generation_config.json").write_text(json.dumps(mutate_json(rng, generation)))
        num_built += survives(load)
    assert 0 < num_built < 800 * ROUNDS


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
