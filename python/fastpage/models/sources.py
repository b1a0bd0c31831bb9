"""Where a model's weights come from: tensors of a checkpoint, and what is done to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A change of one tensor at load.

    shape: the tensor's shape -> that of the result; raises ValueError for one that cannot be
    changed. apply: the same of values. is_arithmetic: it computes with the values, which it must be
    given as float32; else it only moves elements of any type. moves_rows: it moves whole rows, so
    that it holds for a matrix in quantised blocks as well.
    """

    name: str
    shape: Callable[[Shape], Shape]
    apply: Callable[[Array], Array]
    is_arithmetic: bool = False
    moves_rows: bool = False


def _same(shape: Shape) -> Shape:
    return shape


AS_IS = Transform("as it is", _same, lambda values: values, moves_rows=True)

# [in, out], as GPT-2's Conv1D has it, to [out, in].
TRANSPOSED = Transform(
    "transposed",
    lambda shape: shape[::-1],
    lambda values: np.ascontiguousarray(values.T),
)

# The norms of Cohere's query and key heads, [heads, head_dim], to one vector.
FLATTENED = Transform(
    "flattened",
    lambda shape: (math.prod(shape),),
    lambda values: values.reshape(-1),
)

# Gemma's RMSNorm multiplies by 1 + weight.
PLUS_ONE = Transform("plus one", _same, lambda values: values + np.float32(1), is_arithmetic=True)


def _unit_rows(values: Array) -> Array:
    norms = np.sqrt(np.square(values).sum(axis=-1, keepdims=True))
    return (values / np.maximum(norms, np.float32(1e-12))).astype(np.float32)


# Each row divided by its Euclidean norm (Baichuan 2's output projection).
UNIT_ROWS = Transform("rows of norm 1", _same, _unit_rows, is_arithmetic=True)


def ungrouped_qkv(num_kv_heads: int, head_dim: int) -> Transform:
    """Rows in groups of (query heads, key head, value head), one group a KV head, to all query
    heads, then all key heads, then all value heads. Biases likewise."""

    def shape(stored: Shape) -> Shape:
        rows = stored[0] if stored else 0
        if rows % (num_kv_heads * head_dim) or rows < 3 * num_kv_heads * head_dim:
            raise ValueError(f"{rows} rows are not {num_kv_heads} groups of heads of {head_dim}")
        return stored

    def apply(values: Array) -> Array:
        groups = values.reshape(num_kv_heads, -1, head_dim, *values.shape[1:])
        parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])

    return Transform("ungrouped qkv", shape, apply, moves_rows=True)


def part_of(index: int, count: int) -> Transform:
    """One of `count` matrices that are stacked in a tensor of three dimensions."""

    def shape(stored: Shape) -> Shape:
        if len(stored) != 3 or stored[0] != count:
            raise ValueError(f"{list(stored)} is no stack of {count} matrices")
        return stored[1:]

    return Transform(f"matrix {index}", shape, lambda values: values[index])


@dataclass(frozen=True)
class Source:
    """What makes a weight: the tensors, each changed by `transform`, on top of each other."""

    tensors: tuple[str, ...]
    transform: Transform = AS_IS
    otherwise: Source | None = None  # for checkpoints that have its tensors, and not those


Sources = dict[str, Source]  # by canonical weight name


def source(*tensors: str, transform: Transform = AS_IS) -> Source:
    return Source(tensors, transform)


def affine(ours: str, *theirs: str, bias: bool, transform: Transform = AS_IS) -> Sources:
    """The weight `ours`, of the modules `theirs`, and its bias where `bias`."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {
        ours if part == "weight" else f"{ours}.{part}": source(
            *(f"{module}.{part}" for module in theirs), transform=transform
        )
        for part in parts
    }
