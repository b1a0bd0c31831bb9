"""Blocks of the KV cache that are copied, or moved to the host and back, beside the steps."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpage.executors.torch import IntArray

Caches = Sequence[tuple[torch.Tensor, torch.Tensor]]  # on the device, and on the host

_MOST_STAGED = 64


def num_staging_blocks(num_host_blocks: int) -> int:
    """Blocks that the device's cache needs behind those of the scheduler."""
    return 2 * min(_MOST_STAGED // 2, num_host_blocks)


class BlockTransfers:
    """Launches what a step asks to be done to the cache before it computes anything.

    A block is swapped out because the step takes it for something else. So that the step need not
    wait for the bus, its contents are first copied to a staging block, at the speed of the device's
    memory, and go from there to the host on a stream of their own, while the step computes. What
    is swapped in is read by the step itself, which therefore waits: on the device, as all do here.

    caches: [layers, blocks, ...], those of the device with num_staging_blocks() behind num_blocks.
    """

    def __init__(
        self, kernels: Any, caches: Caches, *, num_blocks: int, device: torch.device
    ) -> None:
        self._kernels = kernels
        self._caches = [(there.flatten(2), host.flatten(2)) for there, host in caches]
        self._side = _SideStream(device)
        self._size = (caches[0][0].shape[1] - num_blocks) // 2  # of a part of the staging blocks
        self._parts = deque(_Part(num_blocks + i * self._size) for i in range(2))
        # Memory must not go back to torch while the stream, of which torch knows nothing, uses it.
        weakref.finalize(self, self._side.synchronize).atexit = False

    def launch(self, swap_outs: IntArray, block_copies: IntArray, swap_ins: IntArray) -> None:
        """As CpuExecutor.apply_transfers."""
        staged: _Staged | None = None
        for begin in range(0, len(swap_outs), max(self._size, 1)):
            if staged is not None:
                self._send(staged)
            staged = self._stage(swap_outs[begin : begin + self._size])
        # What comes in goes before what goes out, as the step waits for it: but for what is only
        # now on its way out.
        if staged is not None and np.isin(swap_ins[:, 1], swap_outs[:, 1]).any():
            self._send(staged)
            staged = None
        if len(block_copies):
            self._copy(block_copies)
        if len(swap_ins):
            arrived = self._side.launch(lambda: self._swap(swap_ins, "in"))
            arrived()
        if staged is not None:
            self._send(staged)

    def _stage(self, swap_outs: IntArray) -> _Staged:
        part = self._parts[0]
        self._parts.rotate()
        part.wait_until_sent()
        blocks = part.first + np.arange(len(swap_outs))
        self._copy(np.stack((swap_outs[:, 0], blocks), axis=1))
        return _Staged(part, np.stack((blocks, swap_outs[:, 1]), axis=1))

    def _send(self, staged: _Staged) -> None:
        launch = self._side.launch
        staged.part.wait_until_sent = launch(lambda: self._swap(staged.swap_outs, "out"))

    def _copy(self, block_copies: IntArray) -> None:
        for cache, _ in self._caches:
            self._kernels.copy_blocks(cache, block_copies)

    def _swap(self, swaps: IntArray, direction: str) -> None:
        for cache, host in self._caches:
            self._kernels.swap_blocks(cache, host, swaps, direction)


@dataclass
class _Part:
    """Of the staging blocks."""

    first: int
    wait_until_sent: Callable[[], None] = lambda: None  # of the current stream


@dataclass
class _Staged:
    part: _Part
    swap_outs: IntArray  # from staging blocks


class _SideStream:
    """A stream beside the current one. Without a GPU all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def launch(self, work: Callable[[], None]) -> Callable[[], None]:
        """Behind what the current stream has to do by now. What comes back lets the stream that is
        current when it is called wait for the end of the work."""
        if self._stream is None:
            work()
            return lambda: None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
