"""How evenly decode attention's plans fill a GPU: as they are, and with KV cut absolutely.

No GPU is needed: a model of one runs the plan's blocks in order, two on each multiprocessor. A
block reads at the rate at which its own loads come back, or at its share of the memory's, whichever
is less. The time for the bytes alone, over the model's, is what is printed: what uneven cuts, too
few blocks and their ends cost. The time to merge is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import sys
from typing import Any

import torch

from fastpage import _C

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOKEN_BYTES = 2 * HEAD_DIM * 2  # of a KV head: key and value, 16 bits each
MULTIPROCESSORS, BLOCKS_EACH = 132, 2
MEMORY = 3.0e12  # bytes a second
BLOCK = 40e9  # of a block alone: 64 KB on their way, and what it computes, some 1.6 us
START = 2e-6  # seconds until a block's first tile is there

SHAPES: dict[str, list[int]] = {
    **{f"{n} x 1024 tokens": [1024] * n for n in (1, 8, 16, 32, 64)},
    "64 x 1000 tokens": [1000] * 64,
    "64 of 100 to 3250 tokens": [100 + 50 * i for i in range(64)],
    "256 x 2048 tokens": [2048] * 256,
    "8 x 16384 tokens": [16384] * 8,
    "1 x 131072 tokens": [131072],
    "1 x 131072, 63 x 500 tokens": [131072] + [500] * 63,
}


def plan_class() -> Any:
    """AttentionPlan, of a build with CUDA or of the emulation that tests build."""
    if hasattr(_C.cuda, "AttentionPlan"):
        return _C.cuda.AttentionPlan
    with contextlib.suppress(ImportError):
        from cuda_kernels import load_emulation

        emulation = load_emulation()
        if emulation is not None:
            return emulation.AttentionPlan
    sys.exit(
        "error: this needs a build with CUDA, or one with tests and tests/python in PYTHONPATH"
    )


def tokens_of_blocks(
    plan_type: Any, lens: list[int], batch_invariant: bool, piece: int
) -> list[int]:
    """In the order in which they start, for one KV head."""
    count = len(lens)
    plan = plan_type(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_num_seqs=count,
        max_num_tokens=count,
        max_seq_len=max(lens),
        num_multiprocessors=MULTIPROCESSORS,
        batch_invariant=batch_invariant,
    )
    buffer = torch.zeros(plan.plan_size, dtype=torch.int32)
    plan.plan(torch.arange(count + 1), torch.tensor(lens), buffer)
    at = sum(-(-n // 4) * 4 for n in (4, count + 1, count, count, count))
    items, width = plan.num_decode_items, 8 if batch_invariant else 4
    rows = buffer[at : at + width * items].view(items, width).tolist()
    if batch_invariant:
        return [min(piece * end, lens[seq]) - piece * first for seq, _, first, end, *_ in rows]
    return [end - begin for _, begin, end, _ in rows]


def seconds(blocks: list[int]) -> float:
    """Of the model: bytes still to be read by each block that runs; all get the same rate."""
    waiting = [tokens * TOKEN_BYTES + START * BLOCK for tokens in blocks * KV_HEADS]
    waiting.reverse()
    # `read`: what a block that has run since the beginning would have read.
    running: list[float] = []
    read = now = 0.0
    while waiting or running:
        while waiting and len(running) < MULTIPROCESSORS * BLOCKS_EACH:
            heapq.heappush(running, read + waiting.pop())
        rate = min(BLOCK, MEMORY / len(running))
        end = heapq.heappop(running)
        now += (end - read) / rate
        read = end
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--piece", type=int, default=512, help="kPieceTokens of the build")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    plan_type = plan_class()
    rows = []
    print(f"{'':32}{'MB of KV':>10}{'as planned':>14}{'absolute cuts':>16}")
    for name, lens in SHAPES.items():
        size = sum(lens) * TOKEN_BYTES * KV_HEADS
        shares, counts = [], []
        for mode in (False, True):
            blocks = tokens_of_blocks(plan_type, lens, mode, arguments.piece)
            assert sum(blocks) == sum(lens)
            counts.append(len(blocks) * KV_HEADS)
            shares.append(size / MEMORY / seconds(blocks))
        rows.append({"shape": name, "bytes": size, "blocks": counts, "shares": shares})
        print(f"{name:32}{size / 1e6:10.0f}{shares[0]:14.0%}{shares[1]:16.0%}   {counts} blocks")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
