"""Model definitions: an architecture is a DecoderSpec and where its weights come from."""

from fastpage.models.decoder import decoder
from fastpage.models.loader import Model, build_model
from fastpage.models.registry import Architecture, register_architecture, supported_architectures
from fastpage.models.rotary import RotarySpec
from fastpage.models.sources import Source, Sources, Transform, source
from fastpage.models.spec import DecoderSpec, MoeSpec

__all__ = [
    "Architecture",
    "DecoderSpec",
    "Model",
    "MoeSpec",
    "RotarySpec",
    "Source",
    "Sources",
    "Transform",
    "build_model",
    "decoder",
    "register_architecture",
    "source",
    "supported_architectures",
]
