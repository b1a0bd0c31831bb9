"""From the `architectures` entry of a config to what describes it.

Those that come with fastpage are modules of fastpage.models.architectures. Others are registered
by `register_architecture`, or found through the entry point group "fastpage.architectures" of
installed packages: the entry point's name is the architecture's, its object an Architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastpage._C import Program
from fastpage.errors import InvalidArgument, UnsupportedArchitecture
from fastpage.models.architectures.config import Config
from fastpage.models.constants import constants
from fastpage.models.decoder import decoder
from fastpage.models.sources import Sources

_ENTRY_POINTS = "fastpage.architectures"


@dataclass(frozen=True)
class Architecture:
    """How a model is built from a Hugging Face config.

    spec: the config, a dict -> a DecoderSpec; with a `program` of one's own, any frozen dataclass
    that has a field max_position_embeddings, which fastpage may lower.
    sources: the spec -> where each weight comes from, by canonical name.
    program: the spec -> a Program traced over fastpage.ops, one KV cache layer per attend.
    constants: the spec -> the values of weights that are computed, not read.
    roots: beginnings that checkpoints may have in the place of the first part of `sources`' names.
    ignored: tensors that checkpoints may carry and the model does not read: endings of their names,
    or beginnings, which end with a dot.
    """

    spec: Callable[[Config], Any]
    sources: Callable[[Any], Sources]
    program: Callable[[Any], Program] = decoder
    constants: Callable[[Any], dict[str, npt.NDArray[np.float32]]] = constants
    roots: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


# Name in `architectures`: module of fastpage.models.architectures, imported when it is wanted.
_BUILT_IN: Mapping[str, str] = {
    "BaiChuanForCausalLM": "baichuan",
    "BaichuanForCausalLM": "baichuan",
    "BloomForCausalLM": "bloom",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "GlmForCausalLM": "glm",
    "GraniteForCausalLM": "granite",
    "LLaMAForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "MPTForCausalLM": "mpt",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "MptForCausalLM": "mpt",
    "OPTForCausalLM": "opt",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
_registered: dict[str, Architecture] = {}


def supported_architectures() -> list[str]:
    return sorted({*_BUILT_IN, *_registered, *_entry_points()})


def register_architecture(name: str, architecture: Architecture) -> None:
    """Makes configs whose `architectures` has `name` load as `architecture` says.

    It goes before one of the same name that comes with fastpage. Raises InvalidArgument if the name
    is registered already.
    """
    if name in _registered:
        raise InvalidArgument(f"architecture {name!r} is registered already")
    _registered[name] = architecture


def architecture_names(config: Config) -> list[str]:
    """The config's `architectures`, which may be one string."""
    given = config.get("architectures") or []
    return [str(name) for name in given] if isinstance(given, list) else [str(given)]


def find_architecture(config: Config) -> Architecture:
    """The first of the config's `architectures` that is known. Raises UnsupportedArchitecture."""
    names = architecture_names(config)
    for name in names:
        if name in _registered:
            return _registered[name]
        if name in _BUILT_IN:
            return _built_in(_BUILT_IN[name])
    entry_points = _entry_points()
    for name in names:
        if name in entry_points:
            return _load(name, entry_points[name])
    raise UnsupportedArchitecture(
        f"architecture {', '.join(names) or '(none given in its config)'} is not supported; "
        f"supported: {', '.join(supported_architectures())}"
    )


def _built_in(module_name: str) -> Architecture:
    module = importlib.import_module(f"fastpage.models.architectures.{module_name}")
    return Architecture(
        module.spec,
        module.sources,
        roots=getattr(module, "ROOTS", ()),
        ignored=getattr(module, "IGNORED", ()),
    )


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_ENTRY_POINTS)}


def _load(name: str, entry_point: Any) -> Architecture:
    try:
        architecture = entry_point.load()
    except Exception as error:  # a stranger's module: anything may happen
        raise UnsupportedArchitecture(
            f"architecture {name}: its entry point {entry_point.value} failed: {error!r:.200}"
        ) from error
    if not isinstance(architecture, Architecture):
        raise UnsupportedArchitecture(
            f"architecture {name}: its entry point {entry_point.value} is a "
            f"{type(architecture).__name__}, not a fastpage.models.Architecture"
        )
    return architecture
