"""What an AsyncEngine tells whoever keeps metrics, logs or traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastpage import _C
    from fastpage.engine.async_engine import AsyncEngine
    from fastpage.engine.core import EngineDied
    from fastpage.engine.output_processor import RequestState


class StepReport(NamedTuple):
    """One step that has ended. Lists, not a call for each request: an observer's time is taken from
    the event loop in every step."""

    # The totals up to it. They begin anew when an engine process was started again.
    stats: _C.EngineStats
    num_tokens: int  # that the model computed
    num_new_tokens: int  # of outputs, as they were delivered
    first_tokens: list[RequestState]  # requests whose first token came
    token_gaps: list[float]  # seconds since its token before, of each output that got another


class EngineObserver:
    """Does nothing: override what is of interest. All methods are called on the event loop, and
    must be quick. What one raises is logged. Times are time.monotonic()."""

    def request_added(self, request: RequestState) -> None:
        """It is in the engine's queue. Called in the context (contextvars) of who added it."""

    def request_refused(self, request_id: str, error: Exception) -> None:
        """InvalidArgument, ResourceExhausted or EngineStopped instead of a stream."""

    def request_finished(self, request: RequestState) -> None:
        """Its last output is there: finish reasons in `request.samples`, or `request.error`."""

    def stepped(self, report: StepReport) -> None:
        """Before request_finished() of those that ended in it."""

    def engine_started(self, engine: AsyncEngine) -> None:
        """It is ready, for the first time or again."""

    def engine_died(self, error: EngineDied) -> None:
        """Its process has ended (EngineHung: was killed); it is being started again."""
