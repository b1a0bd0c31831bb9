"""Model definitions: an architecture is a DecoderSpec and the names of its weights."""

from fastpage.models.decoder import decoder
from fastpage.models.loader import Model, build_model
from fastpage.models.registry import supported_architectures
from fastpage.models.rotary import RotarySpec
from fastpage.models.spec import DecoderSpec

__all__ = [
    "DecoderSpec",
    "Model",
    "RotarySpec",
    "build_model",
    "decoder",
    "supported_architectures",
]
