"""Attention of others, where it is installed, over inputs of kernels_cuda.py.

A peer takes inputs and returns what launches its kernels; that returns the output. Whatever it
plans, allocates or compiles is done by then.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
MODULES = {"FlashInfer": "flashinfer", "FlashAttention-3": "fa3_fwd_interface"}


@dataclass
class Paged:
    """Sequences, each of which ends with `new` tokens whose queries there are; bfloat16."""

    lens: list[int]
    new: int
    q: torch.Tensor  # [tokens, HEADS * HEAD_DIM]
    k: torch.Tensor  # [blocks, BLOCK, KV_HEADS, HEAD_DIM]
    v: torch.Tensor
    tables: torch.Tensor  # [sequences, blocks of the longest]

    @staticmethod
    def random(lens: list[int], new: int) -> Paged:
        blocks_each = -(-max(lens) // BLOCK)
        total = blocks_each * len(lens)
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        shape = (total, BLOCK, KV_HEADS, HEAD_DIM)
        k, v = (torch.randn(shape, **options) for _ in range(2))
        q = torch.randn(len(lens) * new, HEADS * HEAD_DIM, **options)
        tables = torch.randperm(total, device="cuda").int().view(len(lens), -1)
        return Paged(lens, new, q, k, v, tables)

    def heads(self) -> torch.Tensor:
        return self.q.view(-1, HEADS, HEAD_DIM)

    def in_one_piece(self, cache: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, KV_HEADS, HEAD_DIM]; all are as long as the first."""
        return cache[self.tables.long()].flatten(1, 2)[:, : self.lens[0]].contiguous()


Peer = Callable[[Paged], Callable[[], Any]]


@functools.cache
def _workspace() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def _pages(paged: Paged) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each sequence's pages begin, the pages, and how much of each last one is used."""
    pages = [-(-length // BLOCK) for length in paged.lens]
    begins = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.cat([row[:n] for row, n in zip(paged.tables, pages, strict=True)])
    last = torch.tensor([(length - 1) % BLOCK + 1 for length in paged.lens], dtype=torch.int32)
    return begins.cuda(), indices, last.cuda()


@functools.cache
def _flashinfer() -> Any:
    """It links what it compiles with -lcuda, for which not every toolkit has a stub: the driver's
    library, which torch has loaded, does as well."""
    maps = Path("/proc/self/maps").read_text().split()
    driver = next((Path(x) for x in maps if "/libcuda.so" in x), None)
    if driver is not None:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        (folder / "libcuda.so").symlink_to(driver)
        places = [str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")])]
        os.environ["LIBRARY_PATH"] = os.pathsep.join(places)
    return importlib.import_module("flashinfer")


def flashinfer_decode(paged: Paged) -> Callable[[], Any]:
    wrapper = _flashinfer().BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=True, backend="fa2"
    )
    sizes = (HEADS, KV_HEADS, HEAD_DIM, BLOCK)
    wrapper.plan(*_pages(paged), *sizes, q_data_type=torch.bfloat16)
    q, cache, out = paged.heads(), (paged.k, paged.v), torch.empty_like(paged.heads())
    return lambda: wrapper.run(q, cache, out=out)


def flashinfer_prefill(paged: Paged) -> Callable[[], Any]:
    wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    starts = torch.arange(len(paged.lens) + 1, dtype=torch.int32, device="cuda") * paged.new
    sizes = (HEADS, KV_HEADS, HEAD_DIM, BLOCK)
    wrapper.plan(starts, *_pages(paged), *sizes, causal=True, q_data_type=torch.bfloat16)
    q, cache, out = paged.heads(), (paged.k, paged.v), torch.empty_like(paged.heads())
    return lambda: wrapper.run(q, cache, out=out)


def flash_attention_3(paged: Paged) -> Callable[[], Any]:
    """Its own choice of splits; keys and values are not paged, which its package leaves out."""
    from fa3_fwd_interface import flash_attn_with_kvcache

    q = paged.q.view(len(paged.lens), paged.new, HEADS, HEAD_DIM)
    k, v = paged.in_one_piece(paged.k), paged.in_one_piece(paged.v)
    return lambda: flash_attn_with_kvcache(q, k, v, causal=True, num_splits=0)


def _installed(peers: dict[str, Peer]) -> dict[str, Peer]:
    return {
        name: peer
        for name, peer in peers.items()
        if importlib.util.find_spec(MODULES[name.split(",")[0]]) is not None
    }


# Those that are installed.
DECODE = _installed(
    {
        "FlashInfer, fa2": flashinfer_decode,
        "FlashAttention-3, not paged": flash_attention_3,
    }
)
PREFILL = _installed(
    {
        "FlashInfer, fa2": flashinfer_prefill,
        "FlashAttention-3, not paged": flash_attention_3,
    }
)


def missing() -> list[str]:
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
