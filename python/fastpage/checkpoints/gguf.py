"""A checkpoint in one GGUF file, with the configuration and names that Hugging Face would use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpage.checkpoints.checkpoint import Checkpoint
from fastpage.checkpoints.gguf_config import source_dtype, token_ids, translate_config
from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.errors import CheckpointError

if TYPE_CHECKING:
    from fastpage.tokenizer import Tokenizer

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PART_OF_CONFIG = re.compile(r"(blk\.\d+\.)?rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


class GgufCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._file = GgufFile(path)
        pieces = self._file.metadata.get("split.count", 1)
        if pieces != 1 and pieces != 0:
            raise CheckpointError(
                f"{path}: one of {pieces!r:.40} pieces of a model; join them with llama-gguf-split"
            )
        self.config = translate_config(self._file)
        self.generation_config = token_ids(self._file)
        self.source_dtype = source_dtype(self._file)
        self._stored_names = {
            self._translate_name(stored): stored
            for stored in self._file.entries
            if not _PART_OF_CONFIG.fullmatch(stored)
        }

    def names(self) -> list[str]:
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.entries[self._stored_name(name)].shape

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        array, dtype = self._file.tensor(self._stored_name(name))
        heads = self._interleaved_heads(name)
        return (array, dtype) if heads is None else (self._deinterleave(name, array, heads), dtype)

    def blocks(self, name: str) -> tuple[np.ndarray, str] | None:
        found = self._file.blocks(self._stored_name(name))
        heads = self._interleaved_heads(name)
        if found is None or heads is None:
            return found
        return self._deinterleave(name, found[0], heads), found[1]

    def release(self, name: str) -> None:
        self._file.release(self._stored_name(name))

    def tokenizer(self) -> Tokenizer:
        from fastpage.tokenizer import Tokenizer

        return Tokenizer.from_gguf_metadata(self._file.metadata, str(self.path))

    def _stored_name(self, name: str) -> str:
        if name not in self._stored_names:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r:.80}")
        return self._stored_names[name]

    def _translate_name(self, stored: str) -> str:
        layer = _LAYER_TENSOR.fullmatch(stored)
        if layer and layer[2] in _LAYER:
            return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
        base, _, kind = stored.rpartition(".")
        if base in _TOP and kind == "weight":
            return f"{_TOP[base]}.weight"
        architecture = self._file.metadata["general.architecture"]
        raise CheckpointError(
            f"{self.path}: tensor {stored!r:.80} has no place in a {architecture} model"
        )

    def _interleaved_heads(self, name: str) -> int | None:
        """The number of heads, if the tensor's rows are in the order of interleaved rotary."""
        if self._file.metadata["general.architecture"] != "llama":
            return None
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else None

    def _deinterleave(self, name: str, array: np.ndarray, heads: int) -> np.ndarray:
        """From rotary pairs (2i, 2i + 1), llama.cpp's order, to pairs (i, i + head_dim / 2)."""
        if array.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: tensor {name!r:.80} of {array.shape[0]} rows does not divide into "
                f"{heads} heads"
            )
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        ordered = pairs.swapaxes(1, 2).reshape(array.shape)
        ordered.flags.writeable = False
        return ordered
