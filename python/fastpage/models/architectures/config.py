"""Reading the fields that Hugging Face configs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpage.errors import CheckpointError, UnsupportedArchitecture
from fastpage.models.rotary import RotarySpec, yarn_magnitude
from fastpage.models.spec import DecoderSpec

Config = Mapping[str, Any]

# Called the same in `rope_parameters` and in RotarySpec.
_SCALING_FIELDS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
)


def required(config: Config, name: str) -> Any:
    """A field that has no default. Raises CheckpointError if it is not there."""
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"config.json has no {name}")
    return value


def base_spec(config: Config, *, head_dim: int | None = None, **more: Any) -> DecoderSpec:
    """The fields that are the same in the Llama family; `more` adds an architecture's own."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedArchitecture(f"hidden_act is {activation!r}: only 'silu' is supported")
    hidden_size = required(config, "hidden_size")
    num_heads = required(config, "num_attention_heads")
    head_dim = config.get("head_dim") or head_dim or hidden_size // num_heads
    max_position = required(config, "max_position_embeddings")
    return DecoderSpec(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required(config, "intermediate_size"),
        num_layers=required(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position,
        rotary=rotary_spec(config, head_dim, max_position),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **more,
    )


def rotary_spec(config: Config, head_dim: int, max_position: int) -> RotarySpec:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling not in RotarySpec.SCALINGS:
        raise UnsupportedArchitecture(
            f"rope_type is {scaling!r}: one of {', '.join(RotarySpec.SCALINGS)} is supported"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    given = {name: rope[name] for name in _SCALING_FIELDS if rope.get(name) is not None}
    return RotarySpec(
        dim=int(head_dim * partial),
        theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        scaling=scaling,
        original_max_position=(
            config.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or max_position
        ),
        magnitude=_magnitude(rope) if scaling == "yarn" else 1.0,
        **given,
    )


def _magnitude(rope: Config) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = required(rope, "factor")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor)


def qwen_sliding_windows(config: Config) -> tuple[int, ...]:
    """Qwen's layers see all positions unless use_sliding_window is on and a layer is listed."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window") or not window:
        return ()
    num_layers = required(config, "num_hidden_layers")
    first = config.get("max_window_layers", 28)
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
