"""Model files on disk: safetensors directories, GGUF files, the Hugging Face Hub. Never pickles."""

from __future__ import annotations

from pathlib import Path

from fastpage.checkpoints.checkpoint import Checkpoint
from fastpage.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Opens `model`: a directory with safetensors files, a .gguf file or a directory that holds
    just one, or an id on the Hugging Face Hub (`revision`: a branch, tag or commit there).

    Raises CheckpointError for files that are missing or broken, UnsupportedArchitecture for a GGUF
    file of a model that fastpage cannot run.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path, path.resolve().name)
    if path.is_file():
        return _open_gguf(path)
    if path.suffix == ".gguf" or path.is_absolute() or str(model).startswith("."):
        raise CheckpointError(f"{model}: no such file or directory")

    from fastpage.checkpoints.hub import fetch

    return _open_directory(fetch(str(model), revision), str(model))


def _open_directory(path: Path, name: str) -> Checkpoint:
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        from fastpage.checkpoints.directory import DirectoryCheckpoint

        return DirectoryCheckpoint(path, name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path}: several GGUF files, name the one to open: {names:.400}")
    if ggufs:
        return _open_gguf(ggufs[0])
    pickles = [file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickles[0]}), which are never loaded because they can "
            "run code; convert them with transformers: from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{path}: no .safetensors or .gguf file in this directory")


def _open_gguf(path: Path) -> Checkpoint:
    from fastpage.checkpoints.gguf import GgufCheckpoint

    return GgufCheckpoint(path)
