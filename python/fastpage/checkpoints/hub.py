"""Fetching a checkpoint from the Hugging Face Hub, if huggingface_hub is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpage.errors import CheckpointError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_ID = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
_FILES = ["*.json", "*.jinja"]
_WEIGHTS = {
    "auto": ["*.safetensors"],
    "safetensors": ["*.safetensors"],
    "gguf": ["*.gguf"],
    "pt": ["*.bin"],
}
# Other copies of the same weights.
_SECOND_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors", "training_args.bin"]


def is_file_id(model: str) -> bool:
    """owner/name/file.gguf."""
    return _FILE_ID.fullmatch(model) is not None


def fetch(model: str, revision: str | None = None, load_format: str = "auto") -> Path:
    """The directory that holds the Hub's `model`, downloaded unless it is in the cache already.

    Of the files, only configuration, tokenizer and weights are fetched. Raises CheckpointError.
    """
    if not _REPO_ID.fullmatch(model):
        raise CheckpointError(
            f"'{model}' is neither a local directory or .gguf file nor the id of a model on the "
            "Hugging Face Hub (owner/name)"
        )

    def download(hub: Any) -> str:
        path: str = hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_FILES, *_WEIGHTS[load_format]],
            ignore_patterns=_SECOND_COPIES,
        )
        return path

    return _download(model, download)


def fetch_file(model: str, revision: str | None = None) -> Path:
    """A file, owner/name/file.gguf, downloaded unless it is in the cache already."""
    found = _FILE_ID.fullmatch(model)
    assert found is not None
    repo, file = found.groups()

    def download(hub: Any) -> str:
        path: str = hub.hf_hub_download(repo, file, revision=revision)
        return path

    return _download(model, download)


def _download(model: str, download: Callable[[Any], str]) -> Path:
    problem = (
        f"'{model}' is neither a local directory or .gguf file nor reachable on the Hugging Face "
        "Hub: "
    )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            problem + "huggingface_hub is not installed (pip install 'fastpage[hub]')"
        ) from None
    try:
        return Path(download(huggingface_hub))
    except Exception as error:  # network, file system, cache: no narrower base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{problem}{reason:.200}; without a network, copy the model's files here and give "
            "their directory, or let HF_HOME name a cache that has it"
        ) from None
