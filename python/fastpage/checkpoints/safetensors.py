"""Reading safetensors files: one, or several behind an index.

The format (https://huggingface.co/docs/safetensors): the length of a header as a little-endian
u64, the header as JSON (name -> dtype, shape, data_offsets), the tensors without gaps.
The reader is our own because the `safetensors` package brings bfloat16 to torch only.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpage.errors import CheckpointError

# Of a header or any other JSON; the largest models' are a tenth of it. Parsed, it is up to twenty
# times as large.
_MAX_JSON_BYTES = 1 << 25
_MAX_DIMS = 8
_MAX_EXTENT = 1 << 48  # product of a shape's dimensions but zeros; numpy has a limit too

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_READABLE: dict[str, tuple[np.dtype[Any], str]] = {
    "F32": (np.dtype("<f4"), "float32"),
    "F16": (np.dtype("<f2"), "float16"),
    "BF16": (np.dtype("<u2"), "bfloat16"),
}


@dataclass(frozen=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class SafetensorsFile:
    """One file, memory-mapped; `entries` says what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        self.entries = self._read_header()

    def tensor(self, name: str) -> tuple[np.ndarray, str]:
        entry = self.entries[name]
        if entry.dtype not in _READABLE:
            raise self._broken(
                name, f"is {entry.dtype}; only F32, F16 and BF16 can be used as weights"
            )
        dtype, dtype_name = _READABLE[entry.dtype]
        count = (entry.end - entry.begin) // dtype.itemsize
        array = np.frombuffer(self._map, dtype, count, entry.begin if count else 0)
        # Writers may leave the header unpadded; kernels may not read unaligned elements.
        array = np.require(array, requirements="A").reshape(entry.shape)
        array.flags.writeable = False
        return array, dtype_name

    def float_dtype(self, name: str) -> str | None:
        """float32, float16 or bfloat16; None for a tensor that is none of these."""
        dtype = self.entries[name].dtype
        return _READABLE[dtype][1] if dtype in _READABLE else None

    def num_bytes(self, name: str) -> int:
        return self.entries[name].end - self.entries[name].begin

    def release(self, name: str) -> None:
        entry = self.entries[name]
        release_pages(self._map, entry.begin, entry.end)

    def _read_header(self) -> dict[str, TensorEntry]:
        size = len(self._map)
        if size < 8:
            raise CheckpointError(f"{self.path}: too short for a safetensors file ({size} bytes)")
        length = int.from_bytes(self._map[:8], "little")
        if length > size - 8:
            raise CheckpointError(
                f"{self.path}: the header claims {length} bytes, the file has {size}: "
                "truncated, or not a safetensors file"
            )
        if length > _MAX_JSON_BYTES:
            raise CheckpointError(f"{self.path}: a header of over {_MAX_JSON_BYTES} bytes")
        header = _parse_json(self.path, self._map[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise CheckpointError(f"{self.path}: __metadata__ is not a map of strings to strings")
        entries = {
            name: self._read_entry(name, fields, 8 + length) for name, fields in header.items()
        }
        self._check_layout(entries, 8 + length, size)
        return entries

    def _read_entry(self, name: str, fields: Any, data_begin: int) -> TensorEntry:
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self._broken(name, "needs dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._broken(name, f"is of unknown dtype {dtype!r:.40}")
        if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            raise self._broken(name, "has no lists of counts as shape and data_offsets")
        if len(shape) > _MAX_DIMS or math.prod(dim or 1 for dim in shape) > _MAX_EXTENT:
            raise self._broken(name, f"has a shape that is too large: {shape!s:.80}")
        begin, end = offsets
        bits = _BITS[dtype] * math.prod(shape)
        if end - begin != (bits + 7) // 8:
            raise self._broken(
                name, f"as {dtype} of shape {shape!s:.80} does not fill bytes {begin} to {end}"
            )
        return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)

    def _broken(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name!r:.80} {fault}")

    def _check_layout(self, entries: dict[str, TensorEntry], data_begin: int, size: int) -> None:
        position = data_begin
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.end > size:
                raise self._broken(
                    name, f"ends at byte {entry.end}, the file has {size}: truncated"
                )
            if entry.begin != position:
                fault = "overlaps the one before it" if entry.begin < position else "follows a gap"
                raise self._broken(name, fault)
            position = entry.end
        if position != size:
            raise CheckpointError(f"{self.path}: {size - position} bytes belong to no tensor")


def open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it, for the safetensors files of a directory."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _open_indexed(index)
    files = sorted(directory.glob("*.safetensors"))
    if directory / "model.safetensors" in files:
        files = [directory / "model.safetensors"]
    if len(files) != 1:
        raise CheckpointError(
            f"{directory}: {len(files)} .safetensors files but no {index.name} to say what is where"
        )
    file = SafetensorsFile(files[0])
    return dict.fromkeys(file.entries, file)


def _open_indexed(index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_weight_map(index)
    files = {
        name: SafetensorsFile(index.parent / name) for name in sorted(set(weight_map.values()))
    }
    for name, file_name in weight_map.items():
        if name not in files[file_name].entries:
            raise CheckpointError(f"{index}: tensor {name!r:.80} is not in {file_name}")
    return {name: files[file_name] for name, file_name in weight_map.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of a file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
    for file in weight_map.values():
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index}: {file!r:.80} is not the name of a file beside it")
    return weight_map


def release_pages(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Gives the memory of the pages that lie within [begin, end) back; they can be read again."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: over {_MAX_JSON_BYTES} bytes of JSON")
    return _parse_json(path, text)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            keys = [key for key, _ in pairs]
            key = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"duplicate key {key!r:.80}")
        return fields

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:  # escapes can spell half of a surrogate pair, which is no character
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error!s:.200}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return parsed


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
