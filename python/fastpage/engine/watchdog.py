"""Notices a process that hangs: one that is there, and does nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

_logger = logging.getLogger("fastpage.engine")

_LOOKS = 8


class Watchdog:
    """Looks _LOOKS times in `timeout` seconds whether anything was heard since the last look, asks
    (ping) if not, and gives up (hangs) after _LOOKS looks in a row without any answer.

    A look that comes much later than it should says that this process itself was stopped, asleep or
    busy, and the other with it perhaps: the silence until then counts for nothing. However long a
    process is away, it is but one look, so that no pause of it makes another look hung. For one
    event loop.
    """

    def __init__(
        self,
        timeout: float,
        ping: Callable[[], None],
        hangs: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = timeout / _LOOKS
        self._ping = ping
        self._hangs = hangs
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._progress: int | None = None
        self.heard = False  # since the last look: whoever hears of a step sets it

    def start(self) -> None:
        """The process is there, and new."""
        self._num_silent = 0
        self._progress = None
        self.heard = True
        self._look_later()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def answered(self, progress: int) -> None:
        """To a ping. An engine that got no further since the last answer has only said so."""
        self.heard = self.heard or progress != self._progress
        self._progress = progress

    def look(self) -> None:
        is_late = self._clock() > self._due + self._interval
        self._num_silent = 0 if self.heard or is_late else self._num_silent + 1
        if self._num_silent == _LOOKS:
            self._timer = None
            return self._hangs()
        has_heard, self.heard = self.heard, False
        self._look_later()
        if has_heard:
            return
        try:
            self._ping()
        except Exception:
            self.heard = True  # nobody was asked: what is not answered says nothing
            _logger.exception("a process could not be asked whether it is there")

    def _look_later(self) -> None:
        self._due = self._clock() + self._interval
        self._timer = asyncio.get_running_loop().call_later(self._interval, self.look)
