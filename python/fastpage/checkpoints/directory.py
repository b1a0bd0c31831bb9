"""A checkpoint as the Hugging Face Hub lays it out: a directory of JSON and safetensors files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpage.checkpoints.checkpoint import Checkpoint
from fastpage.checkpoints.safetensors import open_shards, read_json
from fastpage.errors import CheckpointError

if TYPE_CHECKING:
    from fastpage.tokenizer import Tokenizer

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class DirectoryCheckpoint(Checkpoint):
    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json beside the weights")
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._shards = open_shards(path)
        self.source_dtype = self._most_common_dtype()

    def names(self) -> list[str]:
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        self._require(name)
        return self._shards[name].entries[name].shape

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        self._require(name)
        return self._shards[name].tensor(name)

    def tokenizer(self) -> Tokenizer:
        from fastpage.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def _require(self, name: str) -> None:
        if name not in self._shards:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r:.80}")

    def _most_common_dtype(self) -> str:
        weight: Counter[str] = Counter()
        for name, file in self._shards.items():
            entry = file.entries[name]
            weight[entry.dtype] += entry.end - entry.begin
        floats = [dtype for dtype, _ in weight.most_common() if dtype in _DTYPE_NAMES]
        if not floats:
            raise CheckpointError(f"{self.path}: no weights in F32, F16 or BF16")
        return _DTYPE_NAMES[floats[0]]
