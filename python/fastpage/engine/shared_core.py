"""A core whose process belongs to somebody else: one of several front ends over one engine."""

from __future__ import annotations

from fastpage.engine.channel_core import ChannelCore
from fastpage.engine.core import EngineDied


class SharedCore(ChannelCore):
    """Whoever owns the process hands a socket over each time that it has started it."""

    def take(self, fileno: int) -> None:
        """Takes the socket over. Requests in progress are lost if the end of the engine before has
        not been seen yet."""
        if self._client is not None:
            died = EngineDied("the engine's process has ended: try again in a few seconds")
            self.close(died)
            if self._listener is not None:
                self._listener.on_died(died)
        self.open(fileno)
        if self._listener is not None:
            self._listener.on_started()
