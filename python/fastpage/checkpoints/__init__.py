"""Model files: safetensors directories, GGUF files, the Hugging Face Hub; pickles if asked for."""

from __future__ import annotations

from pathlib import Path

from fastpage.checkpoints.checkpoint import Checkpoint
from fastpage.errors import CheckpointError

__all__ = ["LOAD_FORMATS", "Checkpoint", "open_checkpoint"]

LOAD_FORMATS = ("auto", "safetensors", "gguf", "pt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_checkpoint(
    model: str | Path, revision: str | None = None, load_format: str = "auto"
) -> Checkpoint:
    """Opens `model`: a directory with safetensors files, a .gguf file or a directory that holds
    just one, or an id on the Hugging Face Hub (`revision`: a branch, tag or commit there).

    load_format: which files of a directory; "auto": safetensors, or else GGUF. Only "pt" reads
    pytorch_model.bin, by torch.load(weights_only=True): a pickle, if a restricted one.

    Raises CheckpointError for files that are missing or broken, UnsupportedArchitecture for a GGUF
    file of a model that fastpage cannot run.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path, path.resolve().name, load_format)
    if path.is_file():
        return _open_gguf(path)

    from fastpage.checkpoints.hub import fetch, fetch_file, is_file_id

    if is_file_id(str(model)):
        return _open_gguf(fetch_file(str(model), revision))
    if path.suffix == ".gguf" or path.is_absolute() or str(model).startswith("."):
        raise CheckpointError(f"{model}: no such file or directory")
    fetched = fetch(str(model), revision, load_format)
    found = (*fetched.glob("*.safetensors*"), *fetched.glob("*.gguf"))
    if load_format == "auto" and not found:
        raise CheckpointError(
            f"{model}: no .safetensors file on the Hub. If it has pytorch_model.bin there: "
            "--load-format pt (load_format='pt'), which reads a pickle; if it has GGUF files: give "
            f"{model}/FILE.gguf"
        )
    return _open_directory(fetched, str(model), load_format)


def _open_directory(path: Path, name: str, load_format: str) -> Checkpoint:
    if load_format == "pt":
        from fastpage.checkpoints.pickled import PickledCheckpoint

        return PickledCheckpoint(path, name)
    has_safetensors = (
        any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file()
    )
    if load_format == "safetensors" or (load_format == "auto" and has_safetensors):
        from fastpage.checkpoints.directory import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path}: several GGUF files, name the one to open: {names:.400}")
    if ggufs:
        return _open_gguf(ggufs[0])
    pickles = [file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickles[0]}), which are read only if asked for, with "
            "--load-format pt (load_format='pt'); better, convert them with transformers: "
            "from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{path}: no .safetensors or .gguf file in this directory")


def _open_gguf(path: Path) -> Checkpoint:
    from fastpage.checkpoints.gguf import GgufCheckpoint

    return GgufCheckpoint(path)
