"""What the endpoints share."""

from __future__ import annotations

import time

from fastpage.engine.async_engine import AsyncEngine
from fastpage.serving.metrics import EngineMetrics, Exposition
from fastpage.serving.openai.errors import not_ready
from fastpage.serving.openai.exchange import Limits
from fastpage.serving.openai.reply import Model


class ServerState:
    """Raises MissingExtra if prometheus_client is not there."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.started = int(time.time())
        self.draining = False
        self._metrics = EngineMetrics()
        self.exposition = Exposition(self._metrics)
        self._engine: AsyncEngine | None = None
        self._model: Model | None = None

    def set_engine(self, engine: AsyncEngine) -> None:
        engine.add_observer(self._metrics)
        self._engine = engine
        self._model = Model(engine.info, engine.tokenizer, engine.get_default_sampling_params())

    @property
    def ready(self) -> bool:
        return self._engine is not None and self._engine.ready and not self.draining

    def ready_engine(self) -> AsyncEngine:
        """Raises ApiError (503) while there is none that takes requests."""
        if self.draining:
            raise not_ready("the server is shutting down", "shutting_down")
        if self._engine is None:
            raise not_ready("the model is being loaded: try again in a few seconds", "loading")
        if not self._engine.ready:
            raise not_ready("the engine is being started again", "engine_died")
        return self._engine

    def model(self) -> Model:
        assert self._model is not None
        return self._model
