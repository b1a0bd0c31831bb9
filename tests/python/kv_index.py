"""What routers make of KV events."""

from __future__ import annotations

from smg_grpc_proto.generated import common_pb2 as common


class Index:
    """What a router makes of the batches."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], set[int]]] = {}

    def apply(self, batch: common.KvEventBatch) -> None:
        if not batch.HasField("snapshot") or batch.snapshot.index:
            assert self.number is None or batch.sequence_number == self.number + 1
        self.number = batch.sequence_number
        for event in batch.events:
            kind = event.WhichOneof("data")
            if kind == "cleared":
                self.blocks.clear()
            elif kind == "removed":
                for block_hash in event.removed.block_hashes:
                    if block_hash in self.blocks:
                        tiers = self.blocks[block_hash][2]
                        tiers.discard(event.removed.tier)
                        if not tiers:
                            del self.blocks[block_hash]
            else:
                self._store(event.stored)

    def _store(self, stored: common.KvBlocksStored) -> None:
        parent = stored.parent_block_hash if stored.HasField("parent_block_hash") else None
        for block in stored.blocks:
            assert len(block.token_ids) == block.block_size
            entry = self.blocks.setdefault(
                block.block_hash, (parent, tuple(block.token_ids), set())
            )
            assert entry[:2] == (parent, tuple(block.token_ids))
            entry[2].add(stored.tier)
            parent = block.block_hash

    def prompts(self) -> set[tuple[int, ...]]:
        """All that a prompt can begin with and find."""
        found = set()
        for block_hash in self.blocks:
            tokens: tuple[int, ...] = ()
            at: int | None = block_hash
            while at is not None and at in self.blocks:
                tokens = self.blocks[at][1] + tokens
                at = self.blocks[at][0]
            if at is None:
                found.add(tokens)
        return found
