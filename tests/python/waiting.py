"""Waiting for what must come, on a machine of any speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

# Seconds. It ends a test that hangs, and decides nothing else.
PATIENCE = 300.0


def eventually(what: str, condition: Callable[[], Any]) -> None:
    """Returns once `condition()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """eventually(), on an event loop."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.001)


async def until_idle(stats: Callable[[], Awaitable[Any]]) -> None:
    """is_idle(), of what fastpage.v1's GetServerStats answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = await stats()
        busy = found.num_running + found.num_waiting
        if not busy and found.kv_blocks_free == found.kv_blocks_total:
            return
        assert time.monotonic() < deadline, f"left over: {found}"
        await asyncio.sleep(0.01)


def is_idle(scheduler: Any) -> bool:
    """Of SchedulerStats: no request is left, and all blocks are free."""
    busy = scheduler.num_running + scheduler.num_waiting
    return not busy and scheduler.num_free_blocks == scheduler.num_blocks
