"""What the servers' commands have in common, without a process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import load_alphabet
from waiting import PATIENCE

from fastpage import AsyncEngine
from fastpage.engine.args import EngineArgs
from fastpage.serving import lifecycle


@pytest.mark.parametrize("installed", [False, True])
def test_a_server_runs_on_uvloop_where_it_is_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = []

    async def main() -> None:
        loops.append(type(asyncio.get_running_loop()).__module__.partition(".")[0])

    if installed:
        pytest.importorskip("uvloop")
    else:
        monkeypatch.setitem(sys.modules, "uvloop", None)
    lifecycle.run_on_a_loop(main())
    assert loops == ["uvloop" if installed else "asyncio"]


class Home:
    """Stops as soon as it is ready."""

    def __init__(self) -> None:
        self.signals = lifecycle.Signals()
        self.num_frozen = 0

    async def start_engine(self, args: EngineArgs) -> AsyncEngine:
        return AsyncEngine(load_alphabet())

    def say(self, text: str) -> None: ...

    def listening(self, addresses: Sequence[str], model: str) -> None: ...

    def ready(self, engine: AsyncEngine, addresses: Sequence[str]) -> None:
        self.num_frozen = gc.get_freeze_count()
        self.signals.first.set()


def test_collections_leave_out_what_is_there_when_a_server_is_ready() -> None:
    async def close() -> None: ...

    observing: Any = SimpleNamespace(observers=[], close=close)
    options = argparse.Namespace(drain_timeout=0.0)
    parsed = lifecycle.Parsed(options, EngineArgs(model="alphabet"), [], observing, None)

    async def main() -> int:
        home = Home()
        await asyncio.wait_for(lifecycle.Server(parsed, home).run(), PATIENCE)
        return home.num_frozen

    assert gc.get_freeze_count() == 0
    try:
        assert asyncio.run(main()) > 10_000
    finally:
        gc.unfreeze()
