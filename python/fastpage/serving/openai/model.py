"""The model that is served, as the endpoints know it."""

from __future__ import annotations

from dataclasses import dataclass

from fastpage.engine.loading import ModelInfo
from fastpage.sampling_params import SamplingParams
from fastpage.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    info: ModelInfo
    tokenizer: Tokenizer
    defaults: SamplingParams
