"""Fetching a checkpoint from the Hugging Face Hub, if huggingface_hub is installed."""

from __future__ import annotations

import re
from pathlib import Path

from fastpage.errors import CheckpointError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_SECOND_COPIES = ["*/*.safetensors", "consolidated*.safetensors"]  # of the same weights


def fetch(model: str, revision: str | None = None) -> Path:
    """The directory that holds the Hub's `model`, downloaded unless it is in the cache already.

    Of the files, only configuration, tokenizer and safetensors are fetched. Raises CheckpointError.
    """
    problem = f"'{model}' is neither a local directory or .gguf file nor "
    if not _REPO_ID.fullmatch(model):
        raise CheckpointError(problem + "the id of a model on the Hugging Face Hub (owner/name)")
    problem += "reachable on the Hugging Face Hub: "
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            problem + "huggingface_hub is not installed (pip install huggingface_hub)"
        ) from None
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=_FILES, ignore_patterns=_SECOND_COPIES
        )
    except Exception as error:  # network, file system, cache: no narrower base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{problem}{reason:.200}") from None
    return Path(path)
