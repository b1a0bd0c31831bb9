"""Reading GGUF files: metadata, the table of tensors, their values.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package brings the
dequantisation; its reader takes 15 to 30 times as long as this one for a vocabulary of 50,000.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fastpage.checkpoints.safetensors import release_pages
from fastpage.errors import CheckpointError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING = 8
_ARRAY = 9
_MAX_DIMS = 4
_PLAIN: dict[str, tuple[np.dtype[Any], str]] = {
    "F32": (np.dtype("<f4"), "float32"),
    "F16": (np.dtype("<f2"), "float16"),
    "BF16": (np.dtype("<u2"), "bfloat16"),
}
_BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1")
# Dequantising goes through several temporaries; at this many values they stay in the cache.
_CHUNK_VALUES = 1 << 17


@dataclass(frozen=True)
class TensorEntry:
    dtype: str  # as ggml names it: F32, Q4_1, ...
    shape: tuple[int, ...]  # row-major: the reverse of the order in the file
    begin: int  # bytes from the start of the file
    end: int


class GgufFile:
    """One file, memory-mapped. `metadata` holds int, float, bool, str, list[str], np.ndarray."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, TensorEntry] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        self._size = len(self._map)
        self._position = 0
        try:
            self._read_header()
        except struct.error:
            raise CheckpointError(f"{path}: truncated within the header") from None

    def tensor(self, name: str, index: int | None = None) -> tuple[np.ndarray, str]:
        """The values and "float32", "float16" or "bfloat16" (as uint16); read-only. With `index`
        only that one along the first dimension."""
        entry = self.entries[name]
        raw, shape = self._raw(entry, index)
        if entry.dtype in _PLAIN:
            dtype, dtype_name = _PLAIN[entry.dtype]
            array = np.require(raw.view(dtype), requirements="A").reshape(shape)
        else:
            dtype_name = "float32"
            array = self._dequantise(raw, entry.dtype, name).reshape(shape)
        array.flags.writeable = False
        return array, dtype_name

    def blocks(self, name: str, index: int | None = None) -> tuple[np.ndarray, str] | None:
        """A matrix of Q8_0, Q4_0 or Q4_1 as it is stored: uint8 [rows, bytes of a row], read-only,
        and the type in lower case; None for all others. `index` as for tensor()."""
        entry = self.entries[name]
        raw, shape = self._raw(entry, index)
        if entry.dtype not in _BLOCK_TYPES or len(shape) != 2:
            return None
        return raw.reshape(shape[0], -1), entry.dtype.lower()

    def _raw(self, entry: TensorEntry, index: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
        size, begin, shape = entry.end - entry.begin, entry.begin, entry.shape
        if index is not None:
            size //= shape[0]
            begin, shape = begin + index * size, shape[1:]
        return np.frombuffer(self._map, np.uint8, size, begin), shape

    def release(self, name: str) -> None:
        entry = self.entries[name]
        release_pages(self._map, entry.begin, entry.end)

    def _dequantise(self, raw: np.ndarray, dtype: str, name: str) -> np.ndarray:
        method = getattr(quants, dtype, None)
        if method is None:
            raise self._broken(name, f"is {dtype}, which the gguf package cannot dequantise")
        method.init_grid()
        block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        blocks = raw.reshape(-1, block_bytes)
        values = np.empty((len(blocks), block_values), np.float32)
        step = max(1, _CHUNK_VALUES // block_values)
        with np.errstate(all="ignore"):  # a broken scale becomes inf or nan, as in every reader
            for begin in range(0, len(blocks), step):
                chunk = blocks[begin : begin + step]
                values[begin : begin + step] = method.dequantize_blocks(chunk)
        return values

    # ------------------------------------------------------------ header

    def _read_header(self) -> None:
        if self._map[:4] != b"GGUF":
            raise CheckpointError(
                f"{self.path}: not a GGUF file (for safetensors, give the directory)"
            )
        self._position = 4
        version = self._u32()
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path}: GGUF version {version}; versions 2 and 3, little-endian, can be read"
            )
        num_tensors, num_keys = self._u64(), self._u64()
        for _ in range(num_keys):
            self._read_key()
        table = [self._read_tensor_info() for _ in range(self._bounded(num_tensors, 24))]
        self._place_tensors(table)

    def _read_key(self) -> None:
        key = self._string("a metadata key")
        if key in self.metadata:
            raise CheckpointError(f"{self.path}: metadata key {key!r:.80} is there twice")
        kind = self._u32()
        if kind == _STRING:
            self.metadata[key] = self._string(key)
        elif kind == _ARRAY:
            self.metadata[key] = self._array(key)
        else:
            self.metadata[key] = self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self._u32(), self._u64()
        if kind != _STRING:
            return self._numbers(key, kind, count)
        # The hot loop: a vocabulary and its merges are some 100,000 strings.
        data, position, size = self._map, self._position, self._size
        unpack = _U64.unpack_from
        raw: list[bytes] = []
        for _ in range(self._bounded(count, 8)):
            (length,) = unpack(data, position)
            position += 8
            if length > size - position:
                raise CheckpointError(f"{self.path}: metadata key {key!r:.80}: truncated")
            raw.append(data[position : position + length])
            position += length
        self._position = position
        try:
            return [item.decode() for item in raw]
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: metadata key {key!r:.80}: not UTF-8") from None

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata key {key!r:.80} is of type {kind}")
        dtype = _SCALARS[kind]
        array = np.frombuffer(
            self._map, dtype, self._bounded(count, dtype.itemsize), self._position
        )
        self._position += array.nbytes
        return array

    def _read_tensor_info(self) -> tuple[str, list[int], int, int]:
        name = self._string("a tensor's name")
        num_dims = self._u32()
        if num_dims > _MAX_DIMS:
            raise self._broken(name, f"has {num_dims} dimensions")
        dims = [self._u64() for _ in range(num_dims)]
        return name, dims, self._u32(), self._u64()

    def _place_tensors(self, table: list[tuple[str, list[int], int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r:.40}")
        data_begin = -(-self._position // alignment) * alignment
        for name, dims, kind, offset in table:
            if name in self.entries:
                raise self._broken(name, "is there twice")
            dtype, size = self._tensor_size(name, dims, kind)
            begin = data_begin + offset
            if begin + size > self._size:
                raise self._broken(
                    name, f"ends at byte {begin + size}, the file has {self._size}: truncated"
                )
            self.entries[name] = TensorEntry(dtype, tuple(reversed(dims)), begin, begin + size)
        self._check_overlaps()

    def _tensor_size(self, name: str, dims: list[int], kind: int) -> tuple[str, int]:
        try:
            dtype = GGMLQuantizationType(kind)
            block_values, block_bytes = GGML_QUANT_SIZES[dtype]
        except (ValueError, KeyError):
            raise self._broken(
                name, f"is of type {kind}, which the installed gguf package does not know"
            ) from None
        if not dims or 0 in dims or dims[0] % block_values:
            raise self._broken(name, f"cannot be {dtype.name} of dimensions {dims}")
        return dtype.name, math.prod(dims) // block_values * block_bytes

    def _broken(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name!r:.80} {fault}")

    def _check_overlaps(self) -> None:
        position = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].begin):
            if entry.begin < position:
                raise self._broken(name, "overlaps the one before it")
            position = entry.end

    # ------------------------------------------------------------ primitives

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self._map, self._position)
        self._position += 4
        return int(value)

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self._map, self._position)
        self._position += 8
        return int(value)

    def _bounded(self, count: int, item_bytes: int) -> int:
        """`count`, if that many items of at least `item_bytes` can still be in the file."""
        if count * item_bytes > self._size - self._position:
            raise CheckpointError(f"{self.path}: truncated: {count} items are announced")
        return count

    def _string(self, what: str) -> str:
        length = self._bounded(self._u64(), 1)
        raw = self._map[self._position : self._position + length]
        self._position += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what!r:.80}: not UTF-8") from None
