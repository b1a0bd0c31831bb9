"""From a checkpoint's config to a Program, and from its tensors to an executor's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastpage._C import Program
from fastpage.checkpoints import Checkpoint
from fastpage.errors import CheckpointError, InvalidArgument
from fastpage.models.architectures.config import Config
from fastpage.models.decoder import decoder
from fastpage.models.registry import find_architecture
from fastpage.models.rotary import cos_sin_table
from fastpage.models.spec import DecoderSpec

# Computed at load, not read.
_COS_SIN = "rotary.cos_sin"
# Tensors that old checkpoints carry and no model reads.
_HARMLESS_SUFFIXES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Executor(Protocol):
    """What CpuExecutor and TorchExecutor have in common."""

    def load_weight(
        self, name: str, weight: npt.NDArray[Any], source_dtype: str | None = None
    ) -> None: ...
    def load_weight_blocks(self, name: str, blocks: npt.NDArray[np.uint8], format: str) -> None: ...
    def finish_loading(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Model:
    spec: DecoderSpec
    program: Program
    sources: dict[str, tuple[str, ...]]  # canonical name: the checkpoint's tensors that make it

    def load_weights(
        self,
        checkpoint: Checkpoint,
        executor: Executor,
        progress: Callable[[int, int], None] | None = None,
        keep_blocks: bool = False,
    ) -> None:
        """Gives every weight to `executor` and finishes its loading.

        keep_blocks: matrices that the checkpoint has in quantised blocks (Checkpoint.blocks) are
        given as they are, not as the values they stand for. progress(done, total) is called after
        each. Raises CheckpointError, listing all that does not fit, before the first weight is
        read.
        """
        shapes = {b.name: tuple(b.shape) for b in self.program.buffers if b.kind == "weight"}
        self._check(checkpoint, shapes)
        for done, name in enumerate(shapes, start=1):
            if name == _COS_SIN:
                executor.load_weight(name, cos_sin_table(self.spec.rotary, shapes[name][0]))
            elif blocks := _read_blocks(checkpoint, self.sources[name]) if keep_blocks else None:
                executor.load_weight_blocks(name, *blocks)
            else:
                values, dtype = _read(checkpoint, self.sources[name])
                executor.load_weight(name, values, dtype if dtype == "bfloat16" else None)
            if progress is not None:
                progress(done, len(shapes))
        executor.finish_loading()

    def _check(self, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
        available = set(checkpoint.names())
        wanted = {part for parts in self.sources.values() for part in parts}
        faults = [f"missing {name}" for name in sorted(wanted - available)]
        faults += [
            f"surplus {name}" for name in sorted(available - wanted - self._ignored(available))
        ]
        for name, parts in self.sources.items():
            if not available.issuperset(parts):
                continue
            found = [tuple(checkpoint.shape(part)) for part in parts]
            fits = sum(shape[0] for shape in found if shape) == shapes[name][0] and all(
                shape[1:] == shapes[name][1:] for shape in found
            )
            if not fits:
                listed = ", ".join(f"{p} {list(s)}" for p, s in zip(parts, found, strict=True))
                faults.append(f"{listed} should make {name} {list(shapes[name])}")
        if faults:
            listed = "; ".join(faults[:20]) + ("; ..." if len(faults) > 20 else "")
            raise CheckpointError(
                f"the checkpoint does not fit its config: {len(faults)} fault(s): {listed}"
            )

    def _ignored(self, available: set[str]) -> set[str]:
        ignored = {name for name in available if name.endswith(_HARMLESS_SUFFIXES)}
        return ignored | {"lm_head.weight"} if self.spec.tie_embeddings else ignored


def build_model(config: Config, max_model_len: int | None = None) -> Model:
    """Traces the model that a Hugging Face config describes.

    max_model_len bounds positions (the model's own limit unless given). Raises
    UnsupportedArchitecture, CheckpointError for a config that lacks a field, InvalidArgument.
    """
    architecture = find_architecture(config)
    spec: DecoderSpec = architecture.spec(config)
    if max_model_len is not None:
        if not 1 <= max_model_len <= spec.max_position_embeddings:
            raise InvalidArgument(
                f"max_model_len is {max_model_len}: the model takes 1 to "
                f"{spec.max_position_embeddings} tokens"
            )
        spec = dataclasses.replace(spec, max_position_embeddings=max_model_len)
    return Model(spec, decoder(spec), architecture.sources(spec))


def _read(checkpoint: Checkpoint, parts: Sequence[str]) -> tuple[npt.NDArray[Any], str]:
    """The parts on top of each other, and their dtype."""
    tensors = [checkpoint.tensor(part) for part in parts]
    dtypes = {dtype for _, dtype in tensors}
    if len(tensors) == 1:
        return tensors[0]
    if len(dtypes) > 1:
        return np.concatenate([_to_float32(*tensor) for tensor in tensors]), "float32"
    return np.concatenate([values for values, _ in tensors]), dtypes.pop()


def _read_blocks(
    checkpoint: Checkpoint, parts: Sequence[str]
) -> tuple[npt.NDArray[np.uint8], str] | None:
    """The parts on top of each other, and their format; None unless all have the same."""
    found = [checkpoint.blocks(part) for part in parts]
    formats = {part[1] for part in found if part is not None}
    if None in found or len(formats) != 1:
        return None
    blocks = [part[0] for part in found if part is not None]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), formats.pop()


def _to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
