"""pytorch_model.bin, one file or several behind an index, through torch.load(weights_only=True).

That refuses pickles that would run code. It is never used unless asked for: a pickle remains a
program, if of a small language, and torch has to be installed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastpage.checkpoints.directory import DirectoryCheckpoint
from fastpage.checkpoints.safetensors import read_weight_map
from fastpage.errors import CheckpointError

_INDEX = "pytorch_model.bin.index.json"
_MAX_PICKLE_BYTES = 100_000_000  # of the description of a file's tensors


class PickledCheckpoint(DirectoryCheckpoint):
    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._tensors = _load(path)
        self.source_dtype = self._most_common_dtype(
            (_dtype_name(tensor), tensor.numel() * tensor.element_size())
            for tensor in self._tensors.values()
        )

    def names(self) -> list[str]:
        return list(self._tensors)

    def weight_files(self) -> list[Path]:
        return _files(self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise self._absent(name)
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        import torch

        self.shape(name)
        tensor = self._tensors[name].detach().contiguous()
        dtype = _dtype_name(tensor)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r:.80} is {tensor.dtype}; only float32, float16 and "
                "bfloat16 can be used as weights"
            )
        if dtype == "bfloat16":
            tensor = tensor.view(torch.uint16)
        array: np.ndarray = tensor.numpy()
        array.flags.writeable = False
        return array, dtype


def _load(directory: Path) -> dict[str, Any]:
    index = directory / _INDEX
    files = {path.name: _load_file(path) for path in _files(directory)}
    if not index.is_file():
        (tensors,) = files.values()
        return tensors
    weight_map = read_weight_map(index)
    for name, file in weight_map.items():
        if name not in files[file]:
            raise CheckpointError(f"{index}: tensor {name!r:.80} is not in {file}")
    return {name: files[file][name] for name, file in weight_map.items()}


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        return [directory / name for name in sorted(set(read_weight_map(index).values()))]
    files = sorted(directory.glob("*.bin"))
    if directory / "pytorch_model.bin" in files:
        files = [directory / "pytorch_model.bin"]
    if len(files) != 1:
        raise CheckpointError(
            f"{directory}: {len(files)} .bin files but no {_INDEX} to say what is where"
        )
    return files


def _load_file(path: Path) -> dict[str, Any]:
    """The tensors, memory-mapped."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: reading it needs torch (pip install 'fastpage[torch]')"
        ) from None
    _check_container(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, of the zip reader: no narrower base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not weights that torch loads: {reason:.200}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: a dict of tensors is expected")
    for name, tensor in loaded.items():
        _check_tensor(path, name, tensor)
    return dict(loaded)


def _check_container(path: Path) -> None:
    """A zip file whose members lie in it as they are, none of them over another."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: not a file of torch.save() since torch 1.6 (a zip file): {error!s:.200}"
        ) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(f"{path}: {member.filename!r:.80} is compressed")
        if member.filename.endswith("data.pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {member.filename!r:.80} is too large")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: its parts overlap")


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r:.80} is not the name of a tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name!r:.80} is not dense")
    # A stride of 0 can make anything of a few bytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: tensor {name!r:.80} is larger than what is stored of it")


def _dtype_name(tensor: Any) -> str | None:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name in ("float32", "float16", "bfloat16") else None
