"""The thread that steps the core."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable

from fastpage import _C

_logger = logging.getLogger("fastpage.engine")
_SECONDS_BETWEEN_WARNINGS = 10.0


class PreemptionLog:
    """Warns when sequences were preempted. One line for all of several seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_time = 0.0
        self._num_preemptions = 0
        self._num_swapped = 0

    def look_at(self, stats: _C.SchedulerStats) -> None:
        if stats.num_preemptions < self._num_preemptions:  # an engine that was started again
            self._num_preemptions = self._num_swapped = 0
        num_new = stats.num_preemptions - self._num_preemptions
        if num_new == 0 or self._clock() < self._next_time:
            return
        num_swapped = stats.num_preemptions_swap - self._num_swapped
        self._next_time = self._clock() + _SECONDS_BETWEEN_WARNINGS
        self._num_preemptions = stats.num_preemptions
        self._num_swapped = stats.num_preemptions_swap
        _logger.warning(
            "sequences made room for others: %d preempted (%d by swapping to the host cache, %d to "
            "be computed again); %d of %d blocks are free now. Nothing is lost but time: give more "
            "kv_cache_memory (num_kv_blocks)%s, or lower max_num_seqs; where many blocks are free, "
            "more urgent requests or beams took their places: raise max_num_seqs",
            num_new,
            num_swapped,
            num_new - num_swapped,
            stats.num_free_blocks,
            stats.num_blocks,
            "" if stats.num_host_blocks else " or some host_cache_memory",
        )


class SchedulerWatch:
    """Looks at the statistics after each step: keeps the peak, and warns of preemptions."""

    def __init__(self) -> None:
        self.peak_used_blocks = 0  # most KV blocks in use at the end of a step
        self._preemption_log = PreemptionLog()

    def look_at(self, stats: _C.SchedulerStats) -> None:
        used = stats.num_blocks - stats.num_free_blocks
        self.peak_used_blocks = max(self.peak_used_blocks, used)
        self._preemption_log.look_at(stats)


class EngineThread:
    """Calls engine.step() while there is work, and waits without spinning while there is none.

    Both callbacks are called on this thread, and must return quickly: the next step waits for them.
    """

    def __init__(
        self,
        engine: _C.Engine,
        on_step: Callable[[_C.StepOutput, _C.EngineStats], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_error = on_error
        self._stopping = False
        self.watch = SchedulerWatch()
        self._thread = threading.Thread(target=self._run, name="fastpage-engine", daemon=True)

    def start(self) -> None:
        # A thread that comes back from a step while the interpreter goes down ends the process with
        # a crash.
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the step in progress is done."""
        self._stopping = True
        self._engine.wake()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        while not self._stopping:
            if not self._engine.wait_for_work(timeout_seconds=1.0):
                continue
            try:
                step = self._engine.step()
            except Exception as error:
                self._on_error(error)
                # The requests of that step are lost, not the engine. If it goes on like this there
                # is no hurry.
                time.sleep(0.01)
                continue
            stats = self._engine.stats()
            self._on_step(step, stats)
            self.watch.look_at(stats.scheduler)
