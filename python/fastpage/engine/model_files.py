"""What was in the files that a model was loaded from: an engine that is started again must have the
same weights and the same tokenizer as the front end that it is started for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastpage.checkpoints import Checkpoint
from fastpage.engine.args import EngineArgs
from fastpage.errors import CheckpointError

# Beside the weights in a directory: what is read of it.
_CONFIGURATION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*.index.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
# Of all files together, what is read of their beginnings: a GGUF file has its tokenizer there.
_START_BYTES = 16 << 20
_LEAST_START_BYTES = 1 << 20
_NUM_PIECES = 64
_PIECE_BYTES = 1 << 14


def digests(args: EngineArgs, checkpoint: Checkpoint) -> dict[str, str]:
    """By name. Of large files the size, the beginning and pieces from all over: to read them whole
    would take as long as to load them, and other weights differ everywhere. Times and inodes do not
    count: the same file may be fetched again. Raises CheckpointError."""
    files = dict(_files(args, checkpoint))
    start_bytes = max(_LEAST_START_BYTES, _START_BYTES // len(files))
    return {name: _digest(path, start_bytes) for name, path in files.items()}


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names."""
    return sorted(name for name in before | now if before.get(name) != now.get(name))


def replaced_files(names: list[str]) -> str:
    return (
        f"{', '.join(names):.300} of the model was replaced after the server began to load it, and "
        "its tokenizer is not that of the new files: start the server again"
    )


def _files(args: EngineArgs, checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    for path in checkpoint.weight_files():
        yield path.name, path
    yield from _configuration(checkpoint.path)
    if args.tokenizer is not None:
        tokenizer = Path(args.tokenizer)
        for name, path in (tokenizer.name, tokenizer), *_configuration(tokenizer):
            if path.is_file():
                yield f"{args.tokenizer} {name}", path


def _configuration(folder: Path) -> Iterator[tuple[str, Path]]:
    for pattern in _CONFIGURATION:
        for path in folder.glob(pattern):
            yield str(path.relative_to(folder)), path


def _digest(path: Path, start_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size} ".encode())
            digest.update(file.read(start_bytes))
            last = size - _PIECE_BYTES
            for i in range(1, _NUM_PIECES + 1 if last > start_bytes else 1):
                file.seek(start_bytes + i * (last - start_bytes) // _NUM_PIECES)
                digest.update(file.read(_PIECE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
