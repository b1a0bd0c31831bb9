"""Copies between the CPU and a GPU that nobody waits for before the result is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # bytes; what kernels ask of vectors


def send(arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays on the device, parts of one buffer: one copy, in order with the current stream.

    They may change as soon as this returns. The pinned memory between is torch's, which does not
    give it away again before the copy is done.
    """
    places: dict[str, tuple[int, int]] = {}
    size = 0
    for name, array in arrays.items():
        places[name] = (size, size + array.nbytes)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    to = host.numpy()
    for name, (begin, end) in places.items():
        to[begin:end] = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return {
        name: there[begin:end].view(_torch_dtype(arrays[name])).view(arrays[name].shape)
        for name, (begin, end) in places.items()
    }


class Received:
    """A tensor on its way to the CPU, behind what the current stream has to do before."""

    def __init__(self, tensor: torch.Tensor) -> None:
        on_gpu = tensor.is_cuda
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> npt.NDArray[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        array: npt.NDArray[Any] = self._host.numpy()
        return array


def _torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    return {"i4": torch.int32, "i8": torch.int64, "f4": torch.float32}[array.dtype.str[1:]]
