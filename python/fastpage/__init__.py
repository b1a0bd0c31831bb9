"""fastpage: LLM serving around PagedAttention and continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpage._C import __version__ as __version__
    from fastpage.beam_search import BeamSearchOutput as BeamSearchOutput
    from fastpage.beam_search import BeamSearchParams as BeamSearchParams
    from fastpage.engine.args import EngineArgs as EngineArgs
    from fastpage.engine.async_engine import AsyncEngine as AsyncEngine
    from fastpage.llm import LLM as LLM
    from fastpage.models.registry import register_architecture as register_architecture
    from fastpage.outputs import CompletionOutput as CompletionOutput
    from fastpage.outputs import RequestOutput as RequestOutput
    from fastpage.sampling_params import SamplingParams as SamplingParams

# Imported when first asked for: `import fastpage` and `import fastpage._C` stay cheap.
_MODULES = {
    "LLM": "fastpage.llm",
    "AsyncEngine": "fastpage.engine.async_engine",
    "BeamSearchOutput": "fastpage.beam_search",
    "BeamSearchParams": "fastpage.beam_search",
    "CompletionOutput": "fastpage.outputs",
    "EngineArgs": "fastpage.engine.args",
    "RequestOutput": "fastpage.outputs",
    "SamplingParams": "fastpage.sampling_params",
    "__version__": "fastpage._C",
    "register_architecture": "fastpage.models.registry",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "RequestOutput",
    "SamplingParams",
    "register_architecture",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastpage' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
