"""What a checkpoint is to the rest of fastpage, whatever files it came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastpage.tokenizer import Tokenizer

FLOAT_DTYPES = ("float32", "float16", "bfloat16")


class Checkpoint(ABC):
    """A model on disk: configuration, weights under their Hugging Face names, tokenizer.

    Opening one reads and checks headers only. Tensors are views of memory-mapped files where their
    form on disk allows, so a checkpoint costs memory only for the tensors in use.
    """

    path: Path
    """The directory, or the GGUF file."""

    name: str
    """The name to serve the model under when the user gives none."""

    config: dict[str, Any]
    """The content of a Hugging Face `config.json`."""

    generation_config: dict[str, Any]
    """The content of a Hugging Face `generation_config.json`; may be empty."""

    source_dtype: str
    """One of FLOAT_DTYPES: what most of the weights are in; "bfloat16" for quantised ones."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors, as Hugging Face spells them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. Raises CheckpointError if there is none."""

    @abstractmethod
    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        """A tensor, C-contiguous and read-only, and its dtype: one of FLOAT_DTYPES.

        The array is float32 or float16, and for "bfloat16" uint16, which numpy lacks a type for.
        May be called from several threads. Raises CheckpointError if there is no such tensor, or
        if it is not of a floating-point type.
        """

    def blocks(self, name: str) -> tuple[np.ndarray, str] | None:
        """A matrix that is stored in quantised blocks of 32, as it is: uint8 [rows, bytes], and
        q8_0, q4_0 or q4_1; None for all others. Raises CheckpointError if there is no such tensor.
        """
        self.shape(name)
        return None

    def release(self, name: str) -> None:  # noqa: B027 (most can do nothing)
        """A hint that the tensor is not read again soon: its memory may go."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """Where the tensors are."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model. Raises CheckpointError if none is there."""
