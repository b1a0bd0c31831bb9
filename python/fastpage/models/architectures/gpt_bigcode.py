"""GPTBigCodeForCausalLM: StarCoder, SantaCoder (GPT-2 with one key and value head for all)."""

from __future__ import annotations

import dataclasses

from fastpage.models.architectures import gpt2
from fastpage.models.architectures.config import Config, flag
from fastpage.models.sources import AS_IS, Sources, ungrouped_qkv
from fastpage.models.spec import DecoderSpec

IGNORED = gpt2.IGNORED

_DEFAULTS = {**gpt2.DEFAULTS, "activation_function": "gelu_pytorch_tanh"}


def spec(config: Config) -> DecoderSpec:
    spec = gpt2.absolute_spec({**_DEFAULTS, **config})
    if flag(config, "multi_query", True):
        spec = dataclasses.replace(spec, num_kv_heads=1)
    return spec


def sources(spec: DecoderSpec) -> Sources:
    # One key and value head: q, k, v. As many as queries: each head's q, k, v together.
    qkv = AS_IS if spec.num_kv_heads == 1 else ungrouped_qkv(spec.num_heads, spec.head_dim)
    return gpt2.absolute_sources(spec, qkv=qkv)
