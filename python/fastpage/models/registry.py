"""From the `architectures` entry of a config to the module that describes it."""

from __future__ import annotations

from types import ModuleType

from fastpage.errors import UnsupportedArchitecture
from fastpage.models.architectures import llama, mistral, qwen2, qwen3
from fastpage.models.architectures.config import Config

_ARCHITECTURES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def supported_architectures() -> list[str]:
    return sorted(_ARCHITECTURES)


def find_architecture(config: Config) -> ModuleType:
    """The first of the config's `architectures` that is known. Raises UnsupportedArchitecture."""
    given = config.get("architectures") or []
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)]
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    raise UnsupportedArchitecture(
        f"architecture {', '.join(names) or '(none given in its config)'} is not supported; "
        f"supported: {', '.join(supported_architectures())}"
    )
