"""What an AsyncEngine tells whoever keeps metrics, logs or traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpage import _C
    from fastpage.engine.output_processor import RequestState


class EngineObserver:
    """Does nothing: override what is of interest. All methods are called on the event loop, and
    must be quick and not raise. Times are time.monotonic()."""

    def request_added(self, request: RequestState) -> None:
        """It is in the engine's queue."""

    def request_refused(self, error: Exception) -> None:
        """InvalidArgument, ResourceExhausted or EngineStopped instead of a stream."""

    def request_progressed(self, request: RequestState, now: float) -> None:
        """A step brought news of it: tokens, prompt logprobs, ends. Its metrics, and the token ids
        of `request.samples`, are up to it."""

    def request_finished(self, request: RequestState) -> None:
        """Its last output is there: finish reasons in `request.samples`, or `request.error`."""

    def stepped(self, stats: _C.EngineStats, num_tokens: int) -> None:
        """A step has ended that computed `num_tokens`; the totals are up to it. They begin anew
        when an engine process was started again."""

    def engine_started(self) -> None:
        """It is ready, for the first time or again."""

    def engine_died(self, why: str) -> None:
        """Its process has ended; it is being started again."""
