"""What architectures with mixtures of experts share: MoeSpec from a config, experts' tensors."""

from __future__ import annotations

import dataclasses

from fastpage.models.architectures.config import Config, num_layers, size
from fastpage.models.sources import Sources, part_of, source
from fastpage.models.spec import DecoderSpec, MoeSpec

_MAX_EXPERTS = 65_536  # of all layers together


def moe_spec(config: Config, num_experts: int, top_k: int, intermediate_size: int) -> MoeSpec:
    """Numbers of experts as configs have them, or these defaults. Raises CheckpointError."""
    most = _MAX_EXPERTS // num_layers(config)
    for name in ("num_local_experts", "num_experts"):
        num_experts = size(config, name, num_experts, maximum=most)
    return MoeSpec(
        num_experts=num_experts,
        top_k=size(config, "num_experts_per_tok", top_k, maximum=num_experts),
        intermediate_size=intermediate_size,
    )


def expert_sources(spec: DecoderSpec, block: str, gate: str, up: str, down: str) -> Sources:
    """Of the layers that have experts.

    block: the module of theirs that holds the router, `gate`, and the experts, whose matrices are
    called `gate`, `up` and `down`. Newer writers put the same matrices of all experts into one
    tensor, those of gate and up on top of each other.
    """
    if spec.moe is None:
        return {}
    count = spec.moe.num_experts
    names: Sources = {}
    for layer in range(spec.num_layers):
        if not spec.has_experts(layer):
            continue
        ours, theirs = f"layers.{layer}.moe", f"model.layers.{layer}.{block}"
        stacked = f"model.layers.{layer}.mlp"
        names[f"{ours}.router"] = dataclasses.replace(
            source(f"{theirs}.gate.weight"), otherwise=source(f"{stacked}.gate.weight")
        )
        for i in range(count):
            for weight, parts in (("gate_up", (gate, up)), ("down", (down,))):
                names[f"{ours}.experts.{i}.{weight}"] = dataclasses.replace(
                    source(*(f"{theirs}.experts.{i}.{part}.weight" for part in parts)),
                    otherwise=source(
                        f"{stacked}.experts.{weight}_proj", transform=part_of(i, count)
                    ),
                )
    return names
