"""A checkpoint in one GGUF file, with the configuration and names that Hugging Face would use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpage.checkpoints.checkpoint import Checkpoint
from fastpage.checkpoints.gguf_config import Keys, source_dtype, token_ids
from fastpage.checkpoints.gguf_families import (
    AS_IS,
    Family,
    Undo,
    find_family,
    layer_names,
    translate_config,
)
from fastpage.checkpoints.gguf_file import GgufFile
from fastpage.errors import CheckpointError

if TYPE_CHECKING:
    from fastpage.tokenizer import Tokenizer

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PART_OF_CONFIG = re.compile(
    r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight"
)
_MAX_EXPERTS = 4096


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: in the one stored as `stored`, or in the part of it that is `expert`'s."""

    stored: str
    undo: Undo = AS_IS
    expert: int | None = None


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
        keys = Keys(self._file)
        family = find_family(keys)
        self.config = translate_config(keys, family)
        self.generation_config = token_ids(self._file)
        self.source_dtype = source_dtype(self._file)
        self._places = self._find_places(keys, family)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._shape_at(place) for place in self._places_of(name)]
        if len(shapes) == 1:
            return shapes[0]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(f"{self.path}: the parts of {name!r:.80} do not fit together")
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        self.shape(name)
        parts = [self._read(name, place) for place in self._places_of(name)]
        dtypes = {dtype for _, dtype in parts}
        if len(dtypes) > 1:
            parts = [(_as_float32(*part), "float32") for part in parts]
        arrays = [array for array, _ in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        array.flags.writeable = False
        return array, parts[0][1]

    def blocks(self, name: str) -> tuple[np.ndarray, str] | None:
        places = self._places_of(name)
        if not all(place.undo.moves_rows for place in places):
            return None
        found = [self._file.blocks(place.stored, place.expert) for place in places]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or len({kind for _, kind in parts}) > 1:
            return None
        arrays = [
            self._undo(name, place, part) for place, (part, _) in zip(places, parts, strict=True)
        ]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        array.flags.writeable = False
        return array, parts[0][1]

    def release(self, name: str) -> None:
        for place in self._places_of(name):
            self._file.release(place.stored)

    def weight_files(self) -> list[Path]:
        return [self.path]

    def tokenizer(self) -> Tokenizer:
        from fastpage.tokenizer import Tokenizer

        return Tokenizer.from_gguf_metadata(self._file.metadata, str(self.path))

    # ------------------------------------------------------------ names

    def _find_places(self, keys: Keys, family: Family) -> dict[str, tuple[_Place, ...]]:
        """By Hugging Face's names."""
        undo = family.undo(self.config)
        layer = layer_names(keys, family)
        places: dict[str, tuple[_Place, ...]] = {}
        for stored in self._file.entries:
            if _PART_OF_CONFIG.fullmatch(stored):
                continue
            found = _LAYER_TENSOR.fullmatch(stored)
            if found is None:
                base, _, kind = stored.rpartition(".")
                if base not in family.top or kind not in ("weight", "bias"):
                    raise self._out_of_place(stored, keys)
                places[f"{family.top[base]}.{kind}"] = (_Place(stored, _undo_of(undo, base)),)
                continue
            number, base, kind = found.groups()
            theirs = f"{family.layers}.{number}"
            if base in family.experts:
                for expert in range(self._num_experts(stored)):
                    name = f"{theirs}.{family.experts[base].format(expert)}.{kind}"
                    places[name] = (_Place(stored, expert=expert),)
            elif base in layer:
                places[f"{theirs}.{layer[base]}.{kind}"] = (_Place(stored, _undo_of(undo, base)),)
            else:
                raise self._out_of_place(stored, keys)
        for module, bases in family.joined.items():
            _join(places, family, module, [layer[base] for base in bases])
        return places

    def _num_experts(self, stored: str) -> int:
        shape = self._file.entries[stored].shape
        if len(shape) != 3 or shape[0] > _MAX_EXPERTS:
            raise CheckpointError(
                f"{self.path}: tensor {stored!r:.80} of shape {list(shape)} is no matrix for each "
                "expert"
            )
        return shape[0]

    def _out_of_place(self, stored: str, keys: Keys) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor {stored!r:.80} has no place in a {keys.architecture} model"
        )

    def _places_of(self, name: str) -> tuple[_Place, ...]:
        if name not in self._places:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r:.80}")
        return self._places[name]

    # ------------------------------------------------------------ values

    def _shape_at(self, place: _Place) -> tuple[int, ...]:
        shape = self._file.entries[place.stored].shape
        if place.expert is not None:
            return shape[1:]
        return shape[::-1] if place.undo.is_transposing else shape

    def _read(self, name: str, place: _Place) -> tuple[np.ndarray, str]:
        array, dtype = self._file.tensor(place.stored, place.expert)
        if place.undo.is_arithmetic:
            array, dtype = _as_float32(array, dtype), "float32"
        if place.undo is AS_IS:
            return array, dtype
        return self._undo(name, place, array), dtype

    def _undo(self, name: str, place: _Place, array: np.ndarray) -> np.ndarray:
        try:
            return place.undo.apply(array)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r:.80}: {error}") from None


def _undo_of(undo: Mapping[str, Undo], base: str) -> Undo:
    return undo.get("*" if base.endswith("norm") else base, AS_IS)


def _join(
    places: dict[str, tuple[_Place, ...]], family: Family, module: str, parts: list[str]
) -> None:
    """Puts `module` of each layer in the place of the `parts` that it consists of."""
    first = re.compile(rf"({re.escape(family.layers)}\.\d+)\.{re.escape(parts[0])}\.(weight|bias)")
    for found in list(filter(None, map(first.fullmatch, list(places)))):
        theirs, kind = found.groups()
        names = [f"{theirs}.{part}.{kind}" for part in parts]
        if all(name in places for name in names):
            places[f"{theirs}.{module}.{kind}"] = tuple(places.pop(name)[0] for name in names)


def _as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
