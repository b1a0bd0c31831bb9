"""SmolLM3ForCausalLM: SmolLM3, which is Llama with no positions in every fourth layer."""

from __future__ import annotations

from dataclasses import replace

from fastpage.errors import CheckpointError
from fastpage.models.architectures import llama
from fastpage.models.architectures.config import Config, num_layers, refuse_other, size
from fastpage.models.architectures.llama import sources
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    refuse_other(config, "use_sliding_window", False)
    spec = llama.spec({"rope_theta": 2_000_000.0, "tie_word_embeddings": True, **config})
    return replace(spec, rotary_layers=_rotary_layers(config))


def _rotary_layers(config: Config) -> tuple[bool, ...]:
    layers = num_layers(config)
    given = config.get("no_rope_layers")  # 1 means that the layer has a rotary embedding
    if given is None:
        interval = size(config, "no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers:
        raise CheckpointError(
            f"the model's config has no no_rope_layers for each of {layers} layers"
        )
    return tuple(bool(has_rotary) for has_rotary in given[:layers])


__all__ = ["sources", "spec"]
