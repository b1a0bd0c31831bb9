"""Checkpoints as the Hugging Face Hub lays them out: a directory of JSON files and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpage.checkpoints.checkpoint import FLOAT_DTYPES, Checkpoint
from fastpage.checkpoints.safetensors import open_shards, read_json
from fastpage.errors import CheckpointError

if TYPE_CHECKING:
    from fastpage.tokenizer import Tokenizer


class DirectoryCheckpoint(Checkpoint):
    """All but the weights."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json beside the weights")
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}

    def tokenizer(self) -> Tokenizer:
        from fastpage.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def _absent(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: there is no tensor {name!r:.80}")

    def _most_common_dtype(self, sizes: Iterable[tuple[str | None, int]]) -> str:
        """Of (dtype, None for one that is not of FLOAT_DTYPES; its bytes)."""
        weight: Counter[str] = Counter()
        for dtype, size in sizes:
            if dtype in FLOAT_DTYPES:
                weight[dtype] += size
        if not weight:
            raise CheckpointError(f"{self.path}: no weights in F32, F16 or BF16")
        return weight.most_common(1)[0][0]


class SafetensorsCheckpoint(DirectoryCheckpoint):
    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._shards = open_shards(path)
        self.source_dtype = self._most_common_dtype(
            (file.float_dtype(name), file.num_bytes(name)) for name, file in self._shards.items()
        )

    def names(self) -> list[str]:
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shards:
            raise self._absent(name)
        return self._shards[name].entries[name].shape

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        self.shape(name)
        return self._shards[name].tensor(name)

    def release(self, name: str) -> None:
        self.shape(name)
        self._shards[name].release(name)

    def weight_files(self) -> list[Path]:
        return sorted({file.path for file in self._shards.values()})
