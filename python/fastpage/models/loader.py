"""From a checkpoint's config to a Program, and from its tensors to an executor's weights."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastpage._C import Program
from fastpage.checkpoints import Checkpoint
from fastpage.errors import CheckpointError, InvalidArgument
from fastpage.models.architectures.config import Config
from fastpage.models.registry import find_architecture
from fastpage.models.sources import Source, Sources

# Tensors that old checkpoints carry and no model reads.
_HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)
# Of a layer's keys and values in float8, which only a cache of that type needs.
_KV_SCALE = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.([kv])_scale")


class Executor(Protocol):
    """What CpuExecutor and TorchExecutor have in common."""

    def load_weight(
        self, name: str, weight: npt.NDArray[Any], source_dtype: str | None = None
    ) -> None: ...
    def load_weight_blocks(self, name: str, blocks: npt.NDArray[np.uint8], format: str) -> None: ...
    def finish_loading(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Model:
    spec: Any  # a DecoderSpec, unless the architecture has a program of its own
    program: Program
    sources: Sources
    constants: Callable[[], dict[str, npt.NDArray[np.float32]]]
    roots: tuple[str, ...] = ()  # as Architecture has them
    ignored: tuple[str, ...] = ()

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
        sources = _as_named_there(self.sources, checkpoint, self.roots)
        self._check(checkpoint, shapes, sources)
        constants = self.constants()
        for done, name in enumerate(shapes, start=1):
            if name in constants:
                executor.load_weight(name, constants[name])
            elif blocks := _read_blocks(checkpoint, sources[name]) if keep_blocks else None:
                executor.load_weight_blocks(name, *blocks)
                del blocks
            else:
                values, dtype = _read(checkpoint, sources[name])
                executor.load_weight(name, values, dtype if dtype == "bfloat16" else None)
                del values
            for tensor in sources[name].tensors if name in sources else ():
                checkpoint.release(tensor)
            if progress is not None:
                progress(done, len(shapes))
        executor.finish_loading()

    def kv_scales(self, checkpoint: Checkpoint) -> dict[int, list[npt.NDArray[np.float32]]]:
        """What the checkpoint has keys and values of a layer divided by, where a cache keeps them
        in float8: [num_kv_heads] each. Layers of which it says nothing are left out.

        Raises CheckpointError for what are no scales.
        """
        num_layers, num_kv_heads, _ = self.program.kv_cache_spec
        scales: dict[int, list[npt.NDArray[np.float32]]] = {}
        for name in checkpoint.names():
            match = _KV_SCALE.fullmatch(name)
            if match is None or int(match[1]) >= num_layers:
                continue
            values = _to_float32(*checkpoint.tensor(name)).reshape(-1)
            if values.size not in (1, num_kv_heads) or not (values > 0).all():
                raise CheckpointError(
                    f"{name} {list(checkpoint.shape(name))} should be one positive scale, or one "
                    f"for each of {num_kv_heads} heads"
                )
            ones = np.ones(num_kv_heads, np.float32)
            both = scales.setdefault(int(match[1]), [ones, ones])
            both["kv".index(match[2])] = values * ones
        return scales

    def _check(
        self, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], sources: Sources
    ) -> None:
        available = set(checkpoint.names())
        wanted = {
            tensor: f"{name} {list(shapes[name])}"
            for name, source in sources.items()
            for tensor in source.tensors
        }
        faults = [
            f"missing {name}, for {wanted[name]}" for name in sorted(wanted.keys() - available)
        ]
        faults += [
            f"surplus {name} {list(checkpoint.shape(name))}"
            for name in sorted(available - wanted.keys())
            if not self._is_ignored(name)
        ]
        for name, source in sources.items():
            if not available.issuperset(source.tensors):
                continue
            stored = [tuple(checkpoint.shape(tensor)) for tensor in source.tensors]
            if not _makes(source, stored, shapes[name]):
                listed = ", ".join(
                    f"{t} {list(s)}" for t, s in zip(source.tensors, stored, strict=True)
                )
                faults.append(f"{listed} should make {name} {list(shapes[name])}")
        if faults:
            listed = "; ".join(faults[:20]) + ("; ..." if len(faults) > 20 else "")
            raise CheckpointError(
                f"the checkpoint does not fit its config: {len(faults)} fault(s): {listed}"
            )

    def _is_ignored(self, name: str) -> bool:
        beginnings = tuple(part for part in self.ignored if part.endswith("."))
        return (
            name.endswith((*_HARMLESS_SUFFIXES, *self.ignored))
            or name.startswith(beginnings)
            or _KV_SCALE.fullmatch(name) is not None
        )


def build_model(
    config: Config, max_model_len: int | None = None, checkpoint: Checkpoint | None = None
) -> Model:
    """Traces the model that a Hugging Face config describes.

    max_model_len bounds positions (the model's own limit unless given). With `checkpoint`, whose
    weights are meant for it, embeddings that the config ties are so only if they are not stored
    apart with different values. Raises UnsupportedArchitecture, CheckpointError for a config that
    lacks a field, InvalidArgument.
    """
    architecture = find_architecture(config)
    spec = architecture.spec(config)
    if max_model_len is not None:
        if not 1 <= max_model_len <= spec.max_position_embeddings:
            raise InvalidArgument(
                f"max_model_len is {max_model_len}: the model takes 1 to "
                f"{spec.max_position_embeddings} tokens"
            )
        spec = dataclasses.replace(spec, max_position_embeddings=max_model_len)
    sources = architecture.sources(spec)
    ignored = architecture.ignored
    if getattr(spec, "tie_embeddings", False):
        untied = dataclasses.replace(spec, tie_embeddings=False)
        both = architecture.sources(untied)
        ignored = (*ignored, *both["lm_head"].tensors) if "lm_head" in both else ignored
        if checkpoint is not None and "lm_head" in both:
            both = _as_named_there(both, checkpoint, architecture.roots)
            found = _compare(checkpoint, both["embed"].tensors[0], both["lm_head"].tensors[0])
            if found == "different":
                spec, sources, ignored = untied, architecture.sources(untied), architecture.ignored
            elif found == "only the second":
                sources = {**sources, "embed": both["lm_head"]}
    return Model(
        spec,
        architecture.program(spec),
        sources,
        functools.partial(architecture.constants, spec),
        architecture.roots,
        ignored,
    )


def _as_named_there(sources: Sources, checkpoint: Checkpoint, roots: tuple[str, ...]) -> Sources:
    """Checkpoints of a bare base model lack the first part of its tensors' names; those of a model
    within another may have one of `roots` there. Some weights may be stored in other ways."""
    names = set(checkpoint.names())

    def find(name: str) -> str:
        bare = name.partition(".")[2]
        there = (root + bare for root in ("", *roots) if root + bare in names)
        return name if name in names else next(there, name)

    def choose(source: Source) -> Source:
        found = dataclasses.replace(source, tensors=tuple(map(find, source.tensors)))
        if source.otherwise is None or names.issuperset(found.tensors):
            return found
        other = choose(source.otherwise)
        return other if names.issuperset(other.tensors) else found

    return {name: choose(source) for name, source in sources.items()}


def _compare(checkpoint: Checkpoint, first: str, second: str) -> str:
    """If a checkpoint has two tensors, and if with the same values: what transformers goes by."""
    names = checkpoint.names()
    if second not in names:
        return "not the second"
    if first not in names:
        return "only the second"
    if checkpoint.shape(first) != checkpoint.shape(second):
        return "different"
    (a, a_dtype), (b, b_dtype) = checkpoint.tensor(first), checkpoint.tensor(second)
    same = all(
        np.array_equal(_to_float32(a[i : i + 64], a_dtype), _to_float32(b[i : i + 64], b_dtype))
        for i in range(0, len(a), 64)
    )
    checkpoint.release(first)
    checkpoint.release(second)
    return "the same" if same else "different"


def _makes(source: Source, stored: Sequence[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """True if tensors of shapes `stored` make a weight of shape `wanted`."""
    try:
        shapes = [source.transform.shape(shape) for shape in stored]
    except ValueError:
        return False
    return sum(shape[0] for shape in shapes if shape) == wanted[0] and all(
        shape[1:] == wanted[1:] for shape in shapes
    )


def _read(checkpoint: Checkpoint, source: Source) -> tuple[npt.NDArray[Any], str]:
    """The source's values, and their dtype."""
    tensors = [checkpoint.tensor(name) for name in source.tensors]
    dtypes = {dtype for _, dtype in tensors}
    if source.transform.is_arithmetic or len(dtypes) > 1:
        tensors = [(_to_float32(*tensor), "float32") for tensor in tensors]
    arrays = [source.transform.apply(values) for values, _ in tensors]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), tensors[0][1]


def _read_blocks(
    checkpoint: Checkpoint, source: Source
) -> tuple[npt.NDArray[np.uint8], str] | None:
    """The source in quantised blocks, and their format; None unless all tensors have the same."""
    if not source.transform.moves_rows:
        return None
    found = [checkpoint.blocks(name) for name in source.tensors]
    formats = {part[1] for part in found if part is not None}
    if None in found or len(formats) != 1:
        return None
    blocks = [source.transform.apply(part[0]) for part in found if part is not None]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), formats.pop()


def _to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
