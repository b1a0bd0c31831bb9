"""Plans of fastpage._C.cuda.paged_attention, and the memory that it needs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpage._C import Op
from fastpage.executors.torch import IntArray, Step

Shape = tuple[int, int, int]  # heads, KV heads, head_dim


def attention_shape(op: Op | Step) -> Shape:
    """Of an attend."""
    return int(op.attrs["num_heads"]), int(op.attrs["num_kv_heads"]), int(op.attrs["head_dim"])


def new_plan(kernels: Any, shape: Shape, device: torch.device, **options: Any) -> Any:
    heads, kv_heads, head_dim = shape
    return kernels.AttentionPlan(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_multiprocessors=_num_multiprocessors(device),
        **options,
    )


@dataclass
class PlannedAttention:
    """A step's attention of one shape: arguments of paged_attention."""

    plan: Any
    buffer: torch.Tensor
    workspace: torch.Tensor
    counters: torch.Tensor


class Scratch:
    """Memory for plans of one shape that run one after the other, as large as the largest needs."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = torch.empty(0, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, plan: Any) -> None:
        if plan.workspace_size > len(self._workspace):
            self._workspace = self._workspace.new_empty(plan.workspace_size)
        if plan.num_counters > len(self._counters):
            self._counters = self._counters.new_zeros(plan.num_counters)

    def beside(self, plan: Any, buffer: torch.Tensor) -> PlannedAttention:
        """For a plan in `buffer`, which reserve() has seen."""
        workspace = self._workspace[: plan.workspace_size]
        return PlannedAttention(plan, buffer, workspace, self._counters[: plan.num_counters])


class GrowingPlans:
    """Plans of one shape for whatever steps come: made anew when one does not fit."""

    def __init__(
        self, kernels: Any, shape: Shape, device: torch.device, *, batch_invariant: bool
    ) -> None:
        self._kernels, self._shape, self._device = kernels, shape, device
        self._batch_invariant = batch_invariant
        self._limits = {"max_num_seqs": 0, "max_num_tokens": 0, "max_seq_len": 0}
        self._scratch = Scratch(device)

    def lay_out(self, query_start_loc: IntArray, seq_lens: IntArray) -> IntArray:
        """What has to be in the buffer of the step's attention."""
        wanted = {
            "max_num_seqs": len(seq_lens),
            "max_num_tokens": int(query_start_loc[-1]),
            "max_seq_len": int(max(seq_lens)),
        }
        if any(wanted[name] > limit for name, limit in self._limits.items()):
            self._limits = {n: max(_power_of_two(w), self._limits[n]) for n, w in wanted.items()}
            self._plan = new_plan(
                self._kernels,
                self._shape,
                self._device,
                batch_invariant=self._batch_invariant,
                **self._limits,
            )
            self._scratch.reserve(self._plan)
            self._image = np.zeros(self._plan.plan_size, np.int32)
        self._plan.plan(query_start_loc, seq_lens, self._image)
        return self._image

    def beside(self, buffer: torch.Tensor) -> PlannedAttention:
        """For the step laid out last."""
        return self._scratch.beside(self._plan, buffer)


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
