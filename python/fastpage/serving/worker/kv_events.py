"""What is in the prefix cache, for routers: the engine's KV events as numbered batches."""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag

from smg_grpc_proto.generated import common_pb2 as common

from fastpage import _C
from fastpage.engine.core import EngineDied
from fastpage.engine.observer import EngineObserver
from fastpage.errors import FastpageError

# What is kept for subscribers that come back or lag. Who needs more gets a snapshot.
_MOST_BATCHES = 4096
_MOST_BYTES = 16 << 20
# Microseconds since 1970 reach it in the year 2255.
_NUMBERS_OF_A_FRONT_END = 1 << 53
# Of a snapshot's message: some 400 KB, where a client takes 4 MiB.
_MOST_TOKENS_PER_CHUNK = 1 << 16


class CursorOutOfRange(FastpageError):
    """The subscriber asks to go on where this log never was, or no longer is."""


class _Tiers(IntFlag):
    DEVICE = 1
    HOST = 2


_TIERS = {"device": _Tiers.DEVICE, "host": _Tiers.HOST}
_TIERS_TO_PROTO = {
    _Tiers.DEVICE: common.KV_CACHE_TIER_DEVICE,
    _Tiers.HOST: common.KV_CACHE_TIER_HOST,
}


@dataclass(slots=True)
class _LiveBlock:
    parent: int | None
    token_ids: array[int]
    tiers: _Tiers


class _Events:
    """Events in the making. Blocks that continue one another become one event."""

    def __init__(self, block_size: int) -> None:
        self.events: list[common.KvCacheEvent] = []
        self._block_size = block_size
        self._tail: tuple[int, _Tiers] | None = None  # what the last event ends with

    def store(self, block_hash: int, block: _LiveBlock, tier: _Tiers) -> None:
        if block.parent is None or self._tail != (block.parent, tier):
            event = common.KvCacheEvent()
            event.stored.tier = _TIERS_TO_PROTO[tier]
            if block.parent is not None:
                event.stored.parent_block_hash = block.parent
            self.events.append(event)
        self.events[-1].stored.blocks.add(
            block_hash=block_hash, token_ids=block.token_ids, block_size=self._block_size
        )
        self._tail = (block_hash, tier)

    def remove(self, block_hash: int, tier: _Tiers) -> None:
        event = common.KvCacheEvent()
        event.removed.tier = _TIERS_TO_PROTO[tier]
        event.removed.block_hashes.append(block_hash)
        self.events.append(event)
        self._tail = None

    def clear(self) -> None:
        event = common.KvCacheEvent()
        event.cleared.SetInParent()
        self.events.append(event)
        self._tail = None


class KvEventLog(EngineObserver):
    """Keeps the last batches, and which blocks are cached now. Belongs to one event loop.

    The first number comes from the clock, so that nobody who goes on with a number of an earlier
    process finds it in this one's log, and from the `index` of the front end, so that it is not
    found in another one's either.
    """

    def __init__(self, block_size: int, first_number: int | None = None, index: int = 0) -> None:
        self._block_size = block_size
        self._last = first_number or time.time_ns() // 1000 + index * _NUMBERS_OF_A_FRONT_END
        self._live: dict[int, _LiveBlock] = {}
        self._batches: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_new = True
        self._closed = False
        self._subscribers: set[asyncio.Event] = set()

    def take_in(self, events: Sequence[_C.KvEvent]) -> None:
        """One batch of what a step stored and removed."""
        made = _Events(self._block_size)
        for event in events:
            if event.kind == "cleared":
                self._live.clear()
                made.clear()
                continue
            assert event.hash is not None
            block_hash, tier = _short(event.hash), _TIERS[event.tier]
            if event.kind == "stored":
                self._store(block_hash, tier, event, made)
            else:
                self._remove(block_hash, tier, made)
        if made.events:
            self._append(made.events)

    def engine_died(self, error: EngineDied) -> None:
        made = _Events(self._block_size)
        made.clear()
        self._live.clear()
        self._append(made.events)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Tells the subscribers that there is going to be no more."""
        self._closed = True
        for news in self._subscribers:
            news.set()

    def start(self, number: int) -> int | None:
        """Where a subscriber begins that has all up to batch `number` (0: nothing). Raises
        CursorOutOfRange unless what came after that batch is still here."""
        if number == 0:
            return self._last if self._is_new else None
        oldest = self._last - len(self._batches)
        if self._is_new or not oldest <= number <= self._last:
            raise CursorOutOfRange(
                f"start_sequence_number={number} is not within {oldest} and {self._last}: start "
                "at 0, from the current state"
            )
        return number

    def read(self, cursor: int | None) -> Iterator[common.KvEventBatch]:
        """The batches after number `cursor`, or a snapshot if they are no longer here (or it is
        None). Nothing if there is nothing new."""
        if self._is_new or cursor == self._last:
            return iter(())
        if cursor is None or cursor < self._last - len(self._batches):
            return self._snapshot()
        start = len(self._batches) - (self._last - cursor)
        kept = list(itertools.islice(self._batches, start, None))
        return map(common.KvEventBatch.FromString, kept)

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Event]:
        """The event is set with every batch."""
        news = asyncio.Event()
        self._subscribers.add(news)
        try:
            yield news
        finally:
            self._subscribers.remove(news)

    # ----

    def _store(self, block_hash: int, tier: _Tiers, event: _C.KvEvent, made: _Events) -> None:
        block = self._live.get(block_hash)
        if block is None:
            parent = None if event.parent_hash is None else _short(event.parent_hash)
            block = _LiveBlock(parent, array("I", event.token_ids), _Tiers(0))
            self._live[block_hash] = block
        block.tiers |= tier
        made.store(block_hash, block, tier)

    def _remove(self, block_hash: int, tier: _Tiers, made: _Events) -> None:
        block = self._live.get(block_hash)
        if block is not None:
            block.tiers &= ~tier
            if not block.tiers:
                del self._live[block_hash]
        made.remove(block_hash, tier)

    def _append(self, events: list[common.KvCacheEvent]) -> None:
        self._last += 1
        self._is_new = False
        batch = common.KvEventBatch(
            sequence_number=self._last, timestamp=time.time(), events=events, dp_rank=0
        ).SerializeToString()
        self._batches.append(batch)
        self._num_bytes += len(batch)
        while len(self._batches) > _MOST_BATCHES or self._num_bytes > _MOST_BYTES:
            self._num_bytes -= len(self._batches.popleft())
        for news in self._subscribers:
            news.set()

    def _snapshot(self) -> Iterator[common.KvEventBatch]:
        """Of now: what comes later changes nothing in it. Its numbers end with the newest
        batch's."""
        blocks = [
            (block_hash, block, tier)
            for block_hash, block in _parents_first(self._live)
            for tier in (_Tiers.DEVICE, _Tiers.HOST)
            if tier in block.tiers
        ]
        return self._chunks(blocks, self._last)

    def _chunks(
        self, blocks: list[tuple[int, _LiveBlock, _Tiers]], last: int
    ) -> Iterator[common.KvEventBatch]:
        size = max(1, _MOST_TOKENS_PER_CHUNK // self._block_size)
        count = max(1, -(-len(blocks) // size))
        for index in range(count):
            made = _Events(self._block_size)
            if index == 0:
                made.clear()
            for block_hash, block, tier in blocks[index * size : (index + 1) * size]:
                made.store(block_hash, block, tier)
            yield common.KvEventBatch(
                sequence_number=last - (count - 1 - index),
                timestamp=time.time(),
                events=made.events,
                dp_rank=0,
                snapshot=common.KvSnapshotChunk(index=index, count=count, blocks=len(blocks)),
            )


def _short(block_hash: bytes) -> int:
    """64 of its 128 bits: two blocks of one cache have the same by chance about never."""
    return int.from_bytes(block_hash[:8], "little", signed=True)


def _parents_first(live: dict[int, _LiveBlock]) -> list[tuple[int, _LiveBlock]]:
    """Chain after chain. Blocks behind one that is gone are left out: no prompt finds them."""
    children: dict[int | None, list[int]] = {}
    for block_hash, block in live.items():
        children.setdefault(block.parent, []).append(block_hash)
    ordered = []
    stack = children.get(None, [])[::-1]
    while stack:
        block_hash = stack.pop()
        ordered.append((block_hash, live[block_hash]))
        stack += children.get(block_hash, ())
    return ordered
