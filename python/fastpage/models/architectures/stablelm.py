"""StableLmForCausalLM: StableLM 3B, 2 1.6B and 2 12B."""

from __future__ import annotations

from fastpage.models.architectures.config import Config, base_spec, flag, number
from fastpage.models.architectures.llama import llama_sources
from fastpage.models.sources import Sources, source
from fastpage.models.spec import DecoderSpec


def spec(config: Config) -> DecoderSpec:
    return base_spec(
        {"partial_rotary_factor": 0.25, **config},
        norm_kind="layer",
        norm_bias=True,
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        qkv_bias=flag(config, "use_qkv_bias", False),
        qk_norm="each_head" if flag(config, "qk_layernorm", False) else "",
        residual="parallel" if flag(config, "use_parallel_residual", False) else "sequential",
    )


def sources(spec: DecoderSpec) -> Sources:
    norms = {"attn_norm": "input_layernorm"} if spec.residual == "parallel" else None
    names = llama_sources(spec, norms)
    for layer in range(spec.num_layers) if spec.qk_norm else ():
        for ours, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads)):
            module = f"model.layers.{layer}.self_attn.{ours}_layernorm.norms"
            names[f"layers.{layer}.attn.{ours}_norm"] = source(
                *(f"{module}.{head}.weight" for head in range(heads))
            )
    return names
