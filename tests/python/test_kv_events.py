"""The log of KV events: whoever follows it knows what is cached."""

from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace
from typing import Any

import pytest
from kv_index import Index

from fastpage.engine.core import EngineDied
from fastpage.serving.worker import kv_events
from fastpage.serving.worker.kv_events import CursorOutOfRange, KvEventLog


class Cache:
    """Makes events as the block manager does: blocks come and go, in two tiers, the last ones of a
    prompt going first."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tiers: dict[str, set[tuple[int, ...]]] = {"device": set(), "host": set()}

    def prompts(self) -> set[tuple[int, ...]]:
        return self.tiers["device"] | self.tiers["host"]

    def events(self) -> list[Any]:
        made = []
        for _ in range(self.random.randint(0, 4)):
            action = self.random.random()
            if action < 0.01:
                self.tiers = {"device": set(), "host": set()}
                made.append(event("cleared"))
            elif action < 0.4:
                made += self._evict("device" if action < 0.3 else "host")
            else:
                made += self._compute()
        return made

    def _evict(self, tier: str) -> list[Any]:
        beginnings = {prompt[:-2] for prompt in self.prompts()}
        last = sorted(self.tiers[tier] - beginnings)
        if not last:
            return []
        made = []
        prompt = self.random.choice(last)
        if tier == "device" and prompt not in self.tiers["host"] and self.random.random() < 0.5:
            self.tiers["host"].add(prompt)
            made.append(event("stored", number(prompt), tier="host"))
        self.tiers[tier].remove(prompt)
        return [*made, event("removed", number(prompt), tier=tier)]

    def _compute(self) -> list[Any]:
        """A prompt's blocks that are not there."""
        made = []
        prompt: tuple[int, ...] = ()
        for _ in range(self.random.randint(1, 5)):
            parent = number(prompt) if prompt else None
            own = (self.random.randint(0, 2), 0)
            prompt += own
            if prompt not in self.tiers["device"]:
                self.tiers["device"].add(prompt)
                made.append(event("stored", number(prompt), parent, own))
        return made


def number(prompt: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(bytes(prompt), digest_size=16).digest(), "little")


def event(
    kind: str,
    block: int | None = None,
    parent: int | None = None,
    token_ids: tuple[int, ...] = (),
    tier: str = "device",
) -> Any:
    def as_bytes(value: int | None) -> bytes | None:
        return None if value is None else value.to_bytes(16, "little")

    return SimpleNamespace(
        kind=kind,
        tier=tier,
        hash=as_bytes(block),
        parent_hash=as_bytes(parent),
        token_ids=list(token_ids),
    )


@pytest.mark.parametrize("seed", range(8))
def test_every_subscriber_sees_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were there from the start, that come late, that lag behind what is kept."""
    monkeypatch.setattr(kv_events, "_MOST_BATCHES", 8)
    monkeypatch.setattr(kv_events, "_MOST_TOKENS_PER_CHUNK", 6)
    log = KvEventLog(block_size=2)
    cache = Cache(seed)
    subscribers = [(Index(), log.start(0))]
    for step in range(300):
        log.take_in(cache.events())
        if step % 40 == 0:
            subscribers.append((Index(), log.start(0)))
        for i, (index, cursor) in enumerate(subscribers):
            if cache.random.random() < 0.15:
                for batch in log.read(cursor):
                    index.apply(batch)
                    cursor = batch.sequence_number
                subscribers[i] = (index, cursor)
                assert index.prompts() == cache.prompts()
    for index, cursor in subscribers:
        for batch in log.read(cursor):
            index.apply(batch)
        assert index.prompts() == cache.prompts()
    assert len(log._batches) <= 8
    log.engine_died(EngineDied("killed"))
    (batch,) = log.read(log._last - 1)
    index.apply(batch)
    assert index.prompts() == set()


def test_a_snapshot_has_no_blocks_that_no_prompt_finds() -> None:
    log = KvEventLog(block_size=2)
    log.take_in([event("stored", 1, None, (1, 1)), event("stored", 2, 1, (2, 2))])
    log.take_in([event("removed", 1), event("stored", 3, None, (3, 3))])
    index = Index()
    for batch in log.read(None):
        index.apply(batch)
    assert index.prompts() == {(3, 3)}


def test_a_snapshot_is_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_MOST_TOKENS_PER_CHUNK", 2)
    log = KvEventLog(block_size=2)
    log.take_in([event("stored", 1, None, (1, 1)), event("stored", 2, 1, (2, 2))])
    index = Index()
    for i, batch in enumerate(log.read(None)):
        log.take_in([event("stored", 10 + i, None, (i, i)), event("removed", 2)])
        index.apply(batch)
    assert index.prompts() == {(1, 1), (1, 1, 2, 2)}
    for batch in log.read(index.number):
        index.apply(batch)
    assert index.prompts() == {(1, 1), (0, 0)}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_MOST_BYTES", 10_000)
    log = KvEventLog(block_size=64)
    start = log.start(0)
    assert start is not None
    for i in range(1000):
        log.take_in([event("stored", i + 1, None, (i,) * 64)])
        log.take_in([event("removed", i + 1)])
    assert sum(map(len, log._batches)) <= 10_000
    assert not log._live
    with pytest.raises(CursorOutOfRange, match="start at 0"):
        log.start(start)
    (snapshot,) = log.read(start)
    assert snapshot.snapshot.blocks == 0


def test_a_log_does_not_take_another_ones_cursor() -> None:
    old = KvEventLog(block_size=2, first_number=KvEventLog(block_size=2)._last - 1_000_000)
    for i in range(100):
        old.take_in([event("stored", i + 1, None, (i, i))])
    new = KvEventLog(block_size=2)
    new.take_in([event("stored", 1, None, (1, 1))])
    with pytest.raises(CursorOutOfRange):
        new.start(old._last)
