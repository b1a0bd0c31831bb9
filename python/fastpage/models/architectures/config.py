"""Reading the fields that Hugging Face configs share. A field that makes no sense is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models.rotary import RotarySpec, longrope_magnitude, yarn_magnitude
from fastpage.models.spec import DecoderSpec

Config = Mapping[str, Any]

# As transformers names them; several names of GELU's approximation by tanh.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 1000
_MAX_HEADS = 1 << 16
_MAX_NUMBER = float(np.finfo(np.float32).max)


def size(config: Config, name: str, default: int | None = None, maximum: int = _MAX_SIZE) -> int:
    """A whole number above 0; `default` if the field is absent or null. Raises CheckpointError."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise CheckpointError(f"the model's config has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise CheckpointError(
            f"the model's config has {name} {value!r:.40}: a whole number, 1 to {maximum}, needed"
        )
    return value


def number(config: Config, name: str, default: float, above: float = 0) -> float:
    """Finite in fp32; `default` if the field is absent or null. Raises CheckpointError."""
    value = config.get(name)
    if value is None:
        return default
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not above < value <= _MAX_NUMBER
    ):
        raise CheckpointError(
            f"the model's config has {name} {value!r:.40}: a number above {above} needed"
        )
    return float(value)


def present(config: Config, *names: str) -> str:
    """The first of a field's names that the config has, else the last."""
    return next((name for name in names if config.get(name) is not None), names[-1])


def flag(config: Config, name: str, default: bool) -> bool:
    """true or false; `default` if the field is absent or null. Raises CheckpointError."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"the model's config has {name} {value!r:.40}: true or false needed")
    return value


def refuse_other(config: Config, name: str, *supported: Any) -> None:
    """For options that change the maths: UnsupportedArchitecture unless the field is absent, null
    or one of `supported`."""
    value = config.get(name)
    if value is not None and value not in supported:
        listed = ", ".join(repr(one) for one in supported) or "null"
        raise UnsupportedArchitecture(f"{name} is {value!r:.40}: only {listed} is supported")


def activation(config: Config, name: str, default: str) -> str:
    """The field `name` as DecoderSpec.activation. Raises UnsupportedArchitecture."""
    given = config.get(name) or default
    if not isinstance(given, str) or given not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"{name} is {given!r:.40}: one of {', '.join(_ACTIVATIONS)} is supported"
        )
    return _ACTIVATIONS[given]


def head_size(hidden_size: int, num_heads: int) -> int:
    """Columns of a head, an equal share of the hidden state. Raises CheckpointError."""
    if hidden_size % num_heads:
        raise CheckpointError(
            f"the model's config has {num_heads} heads, which do not divide a hidden size of "
            f"{hidden_size}"
        )
    return hidden_size // num_heads


def base_spec(config: Config, *, head_dim: int | None = None, **more: Any) -> DecoderSpec:
    """The fields that are the same in the Llama family; `more` adds an architecture's own, which
    go before those read here."""
    hidden_size = size(config, "hidden_size")
    heads = num_heads(config)
    head_dim = size(config, "head_dim", head_dim or max(hidden_size // heads, 1))
    max_position = size(config, "max_position_embeddings")
    rotary = rotary_spec(config, head_dim, max_position) if "rotary" not in more else None
    fields: dict[str, Any] = {
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(config, "intermediate_size"),
        "num_layers": num_layers(config),
        "num_heads": heads,
        "num_kv_heads": num_kv_heads(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "max_position_embeddings": _longest(max_position, rotary),
        "rotary": rotary,
        "activation": activation(config, "hidden_act", "silu"),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
    }
    return DecoderSpec(**{**fields, **more})


def num_layers(config: Config, name: str = "num_hidden_layers", default: int | None = None) -> int:
    return size(config, name, default, maximum=_MAX_LAYERS)


def num_heads(config: Config, name: str = "num_attention_heads") -> int:
    return size(config, name, maximum=_MAX_HEADS)


def num_kv_heads(config: Config, name: str, heads: int) -> int:
    """As many as heads unless given. Raises CheckpointError where they do not share these out."""
    count = size(config, name, heads, maximum=heads)
    if heads % count:
        raise CheckpointError(
            f"the model's config has {name} {count}, which do not divide {heads} heads"
        )
    return count


def rotary_spec(config: Config, head_dim: int, max_position: int) -> RotarySpec:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"the model's config has rope parameters {rope!r:.40}: no mapping")
    scaling = _scaling(rope)
    partial = number(rope, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    dim = rotary_dim(head_dim, head_dim * partial)
    original = size(rope, "original_max_position_embeddings", max_position)
    original = size(config, "original_max_position_embeddings", original)
    low_freq_factor = number(rope, "low_freq_factor", 1.0)
    is_extended = scaling in ("yarn", "longrope")
    factor = number(rope, "factor", max_position / original if is_extended else 1.0)
    is_longrope = scaling == "longrope"
    return RotarySpec(
        dim=dim,
        theta=number(rope, "rope_theta", number(config, "rope_theta", 10000.0, above=1), above=1),
        scaling=scaling,
        factor=factor,
        original_max_position=original,
        low_freq_factor=low_freq_factor,
        high_freq_factor=number(rope, "high_freq_factor", 4 * low_freq_factor, low_freq_factor),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=bool(rope.get("truncate", True)),
        magnitude=_magnitude(rope, scaling, factor, original),
        short_factors=_factors(rope, "short_factor", dim // 2) if is_longrope else (),
        long_factors=_factors(rope, "long_factor", dim // 2) if is_longrope else (),
    )


def rotary_dim(head_dim: int, columns: float) -> int:
    """How many whole columns of a head are rotated. Raises CheckpointError."""
    if not 2 <= columns <= head_dim or int(columns) % 2:
        raise CheckpointError(
            f"the model's config has a rotary embedding of {columns:g} of a head's {head_dim} "
            "columns: an even number of them needed"
        )
    return int(columns)


def _scaling(rope: Config) -> str:
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    # "dynamic" begins to scale beyond max_position_embeddings, and that is where we end. "su" is
    # LongRoPE's first name.
    scaling = {"dynamic": "default", "su": "longrope"}.get(str(scaling), scaling)
    if scaling not in RotarySpec.SCALINGS:
        raise UnsupportedArchitecture(
            f"rope_type is {scaling!r:.40}: one of {', '.join(RotarySpec.SCALINGS)}, dynamic is "
            "supported"
        )
    return str(scaling)


def _magnitude(rope: Config, scaling: str, factor: float, original: int) -> float:
    if scaling == "yarn":
        default = yarn_magnitude(factor)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            default = yarn_magnitude(factor, number(rope, "mscale", 1.0)) / yarn_magnitude(
                factor, number(rope, "mscale_all_dim", 1.0)
            )
    elif scaling == "longrope":
        default = longrope_magnitude(factor, original)
    else:
        return 1.0
    return number(rope, "attention_factor", default)


def _factors(rope: Config, name: str, count: int) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != count or None in values:
        raise CheckpointError(f"the model's config has no {name} of {count} numbers for longrope")
    return tuple(number({name: value}, name, 0.0) for value in values)


def _longest(max_position: int, rotary: RotarySpec | None) -> int:
    """max_position_embeddings of the extended model; configs give that of the one before, as vLLM
    reads them, too."""
    if rotary is None or rotary.scaling not in ("linear", "yarn"):
        return max_position
    start = max_position if rotary.scaling == "linear" else rotary.original_max_position
    return max(max_position, int(min(start * rotary.factor, _MAX_SIZE)))


def layered_rotary(
    config: Config, head_dim: int, max_position: int, theta: float, local_theta: float
) -> tuple[RotarySpec, RotarySpec]:
    """Of layers that see all positions, and of those with a sliding window.

    From `rope_parameters` by kind of layer; older configs have rope_theta and rope_scaling for the
    former and rope_local_base_freq for the latter. The last two: rope_theta where it is not given.
    """
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and not rope.keys().isdisjoint(_LAYER_TYPES):
        whole, local = (
            {"rope_parameters": rope.get(kind), "rope_theta": default}
            for kind, default in zip(_LAYER_TYPES, (theta, local_theta), strict=True)
        )
    else:
        whole = {"rope_theta": theta, **config}
        local = {"rope_theta": number(config, "rope_local_base_freq", local_theta, above=1)}
    return rotary_spec(whole, head_dim, max_position), rotary_spec(local, head_dim, max_position)


def windows_everywhere(config: Config) -> tuple[int, ...]:
    """The config's sliding_window for each layer; null or none: no entries."""
    if config.get("sliding_window") is None:
        return ()
    return (size(config, "sliding_window"),) * num_layers(config)


def every_nth_layer(config: Config, n: int) -> list[str]:
    """layer_types where only every n-th layer sees all positions."""
    return [_LAYER_TYPES[i % n != n - 1] for i in range(num_layers(config))]


def sliding_windows(config: Config, window: int, default: list[str]) -> tuple[int, ...]:
    """`window` for the layers with a sliding one, by `layer_types` or else by `default`."""
    types, layers = config.get("layer_types"), num_layers(config)
    types = default if types is None else types
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"the model's config has no layer_types for each of {layers} layers")
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise UnsupportedArchitecture(
                f"layer_types has {kind!r:.40}: only {', '.join(_LAYER_TYPES)} are supported"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def qwen_sliding_windows(config: Config) -> tuple[int, ...]:
    """Qwen's layers see all positions unless use_sliding_window is on and a layer is listed."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return ()
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise CheckpointError(f"the model's config has max_window_layers {first!r:.40}")
    types = [_LAYER_TYPES[i >= first] for i in range(num_layers(config))]
    return sliding_windows(config, size(config, "sliding_window"), types)
